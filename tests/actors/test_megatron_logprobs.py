"""Log-probabilities of one rank against torch.log_softmax; split vocabularies are in test_megatron_model.py."""

import pytest
import torch

from actors import megatron_logprobs
from actors.megatron_logprobs import vocab_parallel_logprobs


@pytest.mark.parametrize("chunk_elements", [1, 1 << 24])
def test_values_and_gradient_equal_log_softmax(monkeypatch: pytest.MonkeyPatch, chunk_elements: int) -> None:
    monkeypatch.setattr(megatron_logprobs, "_CHUNK_ELEMENTS", chunk_elements)
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(6, 11, generator=generator) * 30).requires_grad_()
    labels = torch.randint(0, 9, (6,), generator=generator)
    weights = torch.randn(6, generator=generator)

    got = vocab_parallel_logprobs(logits, labels, temperature=0.7, vocab_size=9, group=None)
    (got_grad,) = torch.autograd.grad((got * weights).sum(), logits)
    want = torch.log_softmax(logits[:, :9] / 0.7, dim=-1).gather(1, labels[:, None])[:, 0]
    (want_grad,) = torch.autograd.grad((want * weights).sum(), logits)

    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-5, atol=1e-6)
    assert torch.all(got_grad[:, 9:] == 0)


def test_bfloat16_logits_are_summed_in_float32() -> None:
    logits = torch.full((1, 5000), 2.0, dtype=torch.bfloat16)
    got = vocab_parallel_logprobs(logits, torch.tensor([7]), temperature=1.0, vocab_size=5000, group=None)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, -torch.tensor([5000.0]).log())

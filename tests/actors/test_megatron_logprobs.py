"""Log-probabilities of one rank against torch.log_softmax; split vocabularies are in test_megatron_model.py."""

import pytest
import torch

from actors import megatron_vocabulary
from actors.megatron_logprobs import vocab_parallel_logprobs


@pytest.mark.parametrize("chunk_elements", [1, 1 << 24])
@pytest.mark.parametrize("part", ["logprobs", "entropy", "both"])
def test_values_and_gradients_equal_torch(
    monkeypatch: pytest.MonkeyPatch, chunk_elements: int, part: str
) -> None:
    monkeypatch.setattr(megatron_vocabulary, "_CHUNK_ELEMENTS", chunk_elements)
    generator = torch.Generator().manual_seed(0)
    scale = 30 if part == "logprobs" else 3
    logits = (torch.randn(6, 11, generator=generator) * scale).requires_grad_()
    labels = torch.randint(0, 9, (6,), generator=generator)
    weights = torch.randn(6, generator=generator)
    untouched = logits.detach().clone()

    got, entropy = vocab_parallel_logprobs(logits, labels, temperature=0.7, vocab_size=9, group=None)
    distribution = torch.log_softmax(logits[:, :9] / 0.7, dim=-1)
    want = distribution.gather(1, labels[:, None])[:, 0]
    want_entropy = torch.distributions.Categorical(logits=logits[:, :9] / 0.7).entropy()
    parts = {"logprobs": (1.0, 0.0), "entropy": (0.0, 1.0), "both": (0.5, 2.0)}[part]
    got_loss = parts[0] * (got * weights).sum() + parts[1] * (entropy * weights.flip(0)).sum()
    want_loss = parts[0] * (want * weights).sum() + parts[1] * (want_entropy * weights.flip(0)).sum()
    (got_grad,) = torch.autograd.grad(got_loss, logits)
    (want_grad,) = torch.autograd.grad(want_loss, logits)

    torch.testing.assert_close(got, want)
    # Another function's backward pass may need them after this one's.
    assert torch.equal(logits, untouched)
    torch.testing.assert_close(entropy, want_entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-5, atol=1e-6)
    assert torch.all(got_grad[:, 9:] == 0)


def test_bfloat16_logits_are_summed_in_float32() -> None:
    logits = torch.full((1, 5000), 2.0, dtype=torch.bfloat16)
    got, entropy = vocab_parallel_logprobs(
        logits, torch.tensor([7]), temperature=1.0, vocab_size=5000, group=None
    )
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, -torch.tensor([5000.0]).log())
    torch.testing.assert_close(entropy, torch.tensor([5000.0]).log())

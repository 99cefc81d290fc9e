"""Divergences of one rank against the definition in float64; split vocabularies are in test_megatron_gkd.py."""

import pytest
import torch

from actors import megatron_vocabulary
from actors.megatron_divergence import aligned, vocab_parallel_divergence
from actors.megatron_topk import topk_divergence, vocab_parallel_topk
from tests.actors import gkd_reference
from tests.actors.gkd_reference import BETAS

VOCAB, PADDED, TOKENS = 37, 40, 6


def make_logits(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student, teacher and weights of the tokens; padding holds numbers that would be noticed."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(TOKENS, PADDED, generator=generator) * 2 for _ in range(2))
    teacher[0] = student[0]
    for logits in (student, teacher):
        logits[:, VOCAB:] = 50.0
    return (
        student.to(dtype).requires_grad_(),
        teacher.to(dtype).requires_grad_(),
        torch.randn(TOKENS, generator=generator),
    )


@pytest.mark.parametrize("temperature", [1.0, 0.9])
@pytest.mark.parametrize("beta", BETAS)
def test_values_and_gradient_equal_the_definition(
    beta: float, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(megatron_vocabulary, "_CHUNK_ELEMENTS", 2 * PADDED)
    student, teacher, weights = make_logits()
    got = vocab_parallel_divergence(
        student, teacher, beta=beta, temperature=temperature, vocab_size=VOCAB, group=None
    )
    want = gkd_reference.of_logits(student[:, :VOCAB], teacher[:, :VOCAB].detach(), beta, temperature)
    got_grad, teacher_grad = torch.autograd.grad((got * weights).sum(), (student, teacher), allow_unused=True)
    (want_grad,) = torch.autograd.grad((want * weights).sum(), student)

    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-5, atol=1e-6)
    assert torch.all(got_grad[:, VOCAB:] == 0)
    assert teacher_grad is None
    assert got[0].abs() < 1e-6


@pytest.mark.parametrize("beta", BETAS)
def test_bfloat16_logits_are_summed_in_float32(beta: float) -> None:
    student, teacher, weights = make_logits(torch.bfloat16)
    got = vocab_parallel_divergence(
        student, teacher, beta=beta, temperature=1.0, vocab_size=VOCAB, group=None
    )
    want = gkd_reference.of_logits(student[:, :VOCAB], teacher[:, :VOCAB].detach(), beta, 1.0)
    (got_grad,) = torch.autograd.grad((got * weights).sum(), student)
    (want_grad,) = torch.autograd.grad((want * weights).sum(), student)

    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    assert got_grad.dtype == torch.bfloat16
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-2, atol=1e-6)


def test_what_is_between_the_ends_goes_to_zero_there() -> None:
    student, teacher, _ = make_logits()
    near, end = (
        vocab_parallel_divergence(
            student, teacher, beta=beta, temperature=1.0, vocab_size=VOCAB, group=None
        ).mean()
        for beta in (0.001, 0.0)
    )
    assert near < 0.01 * end


def test_a_teacher_with_other_padding_is_cut_where_the_student_is() -> None:
    _, teacher, _ = make_logits()
    wider = aligned(teacher, 44, VOCAB, None)
    assert wider.shape == (TOKENS, 44)
    torch.testing.assert_close(wider[:, :VOCAB], teacher[:, :VOCAB])
    torch.testing.assert_close(aligned(wider, PADDED, VOCAB, None)[:, :VOCAB], teacher[:, :VOCAB])


@pytest.mark.parametrize(("temperature", "tail"), [(1.0, False), (0.9, False), (1.0, True)])
@pytest.mark.parametrize("beta", BETAS)
def test_topk_values_and_gradient_equal_the_definition(beta: float, temperature: float, tail: bool) -> None:
    student, teacher, weights = make_logits()
    ids, logprobs = vocab_parallel_topk(teacher.detach(), 5, vocab_size=VOCAB, group=None)
    order = torch.log_softmax(teacher.detach()[:, :VOCAB], -1).sort(dim=1, descending=True)
    torch.testing.assert_close(logprobs, order.values[:, :5])
    assert torch.equal(ids, order.indices[:, :5])

    got = topk_divergence(
        student,
        ids,
        logprobs,
        beta=beta,
        temperature=temperature,
        vocab_size=VOCAB,
        group=None,
        tail=tail,
    )
    want = gkd_reference.of_topk(
        student[:, :VOCAB], teacher[:, :VOCAB].detach(), ids, beta, temperature, tail=tail
    )
    (got_grad,) = torch.autograd.grad((got * weights).sum(), student)
    (want_grad,) = torch.autograd.grad((want * weights).sum(), student)

    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-4, atol=1e-5)
    assert torch.all(got_grad[:, VOCAB:] == 0)


@pytest.mark.parametrize("beta", BETAS)
def test_topk_with_gaps_counts_the_tokens_there_are(beta: float) -> None:
    student, teacher, weights = make_logits()
    ids, logprobs = vocab_parallel_topk(teacher.detach(), 5, vocab_size=VOCAB, group=None)
    fewer = ids.clone()
    fewer[1, 3:] = -1
    fewer[2] = -1
    got = topk_divergence(student, fewer, logprobs, beta=beta, temperature=1.0, vocab_size=VOCAB, group=None)
    want = gkd_reference.of_topk(
        student[:, :VOCAB], teacher[:, :VOCAB].detach(), ids[:, :3], beta, 1.0, tail=False
    )
    (grad,) = torch.autograd.grad((got * weights).sum(), student)
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-5, atol=1e-5)
    assert got[2] == 0
    assert torch.all(grad[2] == 0)
    assert torch.isfinite(grad).all()


def test_topk_of_the_whole_vocabulary_is_the_whole_divergence() -> None:
    student, teacher, _ = make_logits()
    ids, logprobs = vocab_parallel_topk(teacher.detach(), 99, vocab_size=VOCAB, group=None)
    assert ids.shape == (TOKENS, VOCAB)
    for beta in BETAS:
        got = topk_divergence(
            student, ids, logprobs, beta=beta, temperature=0.9, vocab_size=VOCAB, group=None
        )
        want = gkd_reference.of_logits(student[:, :VOCAB], teacher[:, :VOCAB], beta, 0.9)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)

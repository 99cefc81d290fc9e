"""The precision report against a hand computation, and the reference against transformers' own forward."""

import math
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from actors.precision import compare_logits, reference_logits, sample_tokens
from actors.tiny_model import build_tiny_model, train_tokenizer
from configs.errors import BasculeError

HF = torch.tensor([[[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]], [[0.0, 5.0, 1.0], [1.0, 2.0, 3.0]]])
CHANGE = torch.tensor([[[0.5, 0.0, -0.25], [0.0, 0.0, 0.0]], [[0.0, -4.5, 0.0], [0.0, 0.0, 0.75]]])
PADDING = torch.full((2, 2, 2), 99.0)
MASK = torch.tensor([[1, 1], [0, 1]])


def test_the_numbers_are_those_worked_out_by_hand() -> None:
    report = compare_logits(HF, torch.cat([HF + CHANGE, PADDING], dim=-1), MASK)
    assert report.token_mean_diff == (0.25, 0.0, 1.5, 0.25)
    assert report.mean_diff == 0.5
    assert report.max_diff == 4.5
    assert report.hf_tokens == (2, 0, 1, 2)
    assert report.mg_tokens == (2, 0, 2, 2)
    assert (report.token_diff, report.num_tokens) == (1, 4)
    assert report.mean_diff_with_loss == pytest.approx(0.5 / 3)
    assert report.max_diff_with_loss == 0.75
    assert (report.token_diff_with_loss, report.num_loss_tokens) == (0, 3)
    assert report.passes(0.2)
    assert not report.passes(0.16)


def test_the_lines_have_the_names_that_users_know() -> None:
    lines = compare_logits(HF, HF + CHANGE, MASK).lines()
    assert lines == [
        "token_mean_diff: [2.50e-01, 0.00e+00, 1.50e+00, 2.50e-01]",
        "mean_diff: 5.000e-01, max_diff: 4.500e+00",
        "mean_diff (with loss): 1.667e-01, max_diff (with loss): 7.500e-01",
        "hf_tokens: [2, 0, 1, 2]",
        "mg_tokens: [2, 0, 2, 2]",
        "token_diff: 1 of 4",
        "token_diff (with loss): 0 of 3",
    ]


def test_without_loss_tokens_all_count_and_nan_never_passes() -> None:
    report = compare_logits(HF, HF + CHANGE, torch.zeros(2, 2))
    assert report.mean_diff_with_loss is None
    assert not any("with loss" in line for line in report.lines())
    assert report.passes(0.51)
    assert not report.passes(0.5)
    broken = compare_logits(HF, HF * math.nan, MASK)
    assert not broken.passes(1e9)


def test_half_precision_is_compared_in_float32() -> None:
    report = compare_logits(HF.bfloat16(), (HF + 1e-4).float(), MASK)
    assert report.mean_diff == pytest.approx(1e-4, rel=1e-2)


@pytest.mark.parametrize(
    ("megatron", "mask"), [(HF[..., :2], MASK), (HF[:1], MASK), (HF, MASK[:1]), (HF[:, :1], MASK)]
)
def test_shapes_that_do_not_belong_together_are_named(megatron: torch.Tensor, mask: torch.Tensor) -> None:
    with pytest.raises(BasculeError, match="do not belong together"):
        compare_logits(HF, megatron, mask)


def test_a_chat_has_its_loss_on_the_answer() -> None:
    tokenizer = train_tokenizer()
    batch = sample_tokens(tokenizer, len(tokenizer), 0, max_length=120)
    assert batch.tokens.shape == batch.labels.shape == batch.loss_mask.shape == (1, 120)
    assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
    inside = tokenizer.decode(batch.labels[batch.loss_mask])
    before = tokenizer.decode(batch.tokens[~batch.loss_mask])
    assert inside.startswith("A bascule bridge carries")
    assert before == "<|user|>How does a bascule bridge open, and why does it take so little power?"


def test_without_a_template_the_text_is_plain() -> None:
    tokenizer = train_tokenizer()
    tokenizer.chat_template = None
    batch = sample_tokens(tokenizer, len(tokenizer), 0)
    assert batch.tokens.shape == (1, 256)
    assert tokenizer.decode(batch.labels[batch.loss_mask]).startswith("A bascule bridge")
    with pytest.raises(BasculeError, match="vocabulary has 100"):
        sample_tokens(tokenizer, 100, 0)


def test_random_tokens_are_in_the_vocabulary_and_repeat_with_the_seed() -> None:
    batch = sample_tokens(None, 37, 5, max_length=30)
    assert batch.tokens.shape == (1, 24)
    assert int(batch.tokens.max()) < 37
    assert bool(batch.loss_mask.all())
    again = sample_tokens(None, 37, 5, max_length=30)
    assert torch.equal(batch.tokens, again.tokens)
    assert torch.equal(batch.labels, again.labels)
    assert not torch.equal(batch.tokens, sample_tokens(None, 37, 6, max_length=30).tokens)


def test_reference_logits_are_transformers_own(tmp_path: Path) -> None:
    build_tiny_model(tmp_path, seed=1)
    tokens = sample_tokens(None, 100, 0).tokens
    got = reference_logits(tmp_path, tokens, torch.float32)
    model = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(tokens).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    rounded = reference_logits(tmp_path, tokens, torch.bfloat16)
    assert rounded.dtype == torch.float32
    assert 1e-4 < float((rounded - expected).abs().max()) < 0.2
    with pytest.raises(BasculeError, match="transformers cannot load"):
        reference_logits(tmp_path / "none", tokens, torch.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(BasculeError, match=r"tensors that are not there: model\.norm\.weight"):
        reference_logits(tmp_path, tokens, torch.float32)

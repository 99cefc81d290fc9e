"""The tiny model as transformers sees it, and its data as JSON."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from actors.cli import main
from actors.tiny_model import build_tiny_model, train_tokenizer, write_arithmetic


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("tiny"), seed=7)


def test_model_loads_and_can_be_split_by_two(model_dir: Path) -> None:
    config: Any = AutoConfig.from_pretrained(model_dir)
    assert config.model_type == "qwen3"
    assert config.tie_word_embeddings
    assert config.head_dim * config.num_attention_heads == config.hidden_size
    for size in (config.num_hidden_layers, config.num_key_value_heads):
        assert size % 2 == 0
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    assert model.dtype == torch.float32
    assert 900_000 < model.num_parameters() < 1_100_000
    logits = model(torch.tensor([[3, 4, 5]])).logits
    assert logits.shape == (1, 3, config.vocab_size)
    assert torch.isfinite(logits).all()


def test_ids_agree_in_tokenizer_and_configs(model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    config: Any = AutoConfig.from_pretrained(model_dir)
    generation = GenerationConfig.from_pretrained(model_dir)
    assert len(tokenizer) == config.vocab_size
    for each in (config, generation):
        assert each.eos_token_id == tokenizer.convert_tokens_to_ids("<|end|>")
        assert each.pad_token_id == tokenizer.convert_tokens_to_ids("<|pad|>")


def test_same_seed_same_bytes_and_no_effect_on_the_caller(model_dir: Path, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    build_tiny_model(tmp_path / "again", seed=7)
    build_tiny_model(tmp_path / "other", seed=8)
    assert torch.equal(torch.random.get_rng_state(), before)
    for path in model_dir.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name
    weights = "model.safetensors"
    assert (tmp_path / "other" / weights).read_bytes() != (model_dir / weights).read_bytes()


def test_digits_are_single_tokens_and_any_text_survives() -> None:
    tokenizer = train_tokenizer()
    assert tokenizer.tokenize("range 52937") == ["range", "Ġ", "5", "2", "9", "3", "7"]
    for text in ("range 52937", "Grüße, 42\n", "日本 <|x|>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_chat_template_marks_turns_and_ends_the_assistants(model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    question = [{"role": "system", "content": "s"}, {"role": "user", "content": "range 41"}]
    answer = {"role": "assistant", "content": "3"}
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*question, answer], tokenize=False)
    assert prompt == "<|system|>s<|user|>range 41<|assistant|>"
    assert whole == prompt + "3<|end|>"
    ids = tokenizer.apply_chat_template([*question, answer], tokenize=True, return_dict=False)
    assert tokenizer.convert_ids_to_tokens(ids) == [
        *("<|system|>", "s", "<|user|>", "range", "Ġ", "4", "1", "<|assistant|>", "3", "<|end|>")
    ]


def test_arithmetic_files(tmp_path: Path) -> None:
    write_arithmetic(tmp_path, seed=1, warm_up=10, train=40, held_out=20)
    rows = {
        path.name: [json.loads(line) for line in path.read_text().splitlines()] for path in tmp_path.iterdir()
    }
    assert {name: len(found) for name, found in rows.items()} == {
        "sft.jsonl": 10,
        "train.jsonl": 40,
        "eval.jsonl": 20,
    }
    assert all(set(row) == {"prompt", "completion"} for row in rows["sft.jsonl"])
    assert all(set(row) == {"prompt", "answer"} for row in rows["train.jsonl"] + rows["eval.jsonl"])
    for row in rows["train.jsonl"]:
        digits = [int(digit) for digit in row["prompt"].removeprefix("range ")]
        assert row["answer"] == str(max(digits) - min(digits))


def test_the_command_wants_a_directory(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert main(["make-model", "tiny", "--output_dir", str(tmp_path / "file")]) == 2
    assert f"--output_dir: {tmp_path / 'file'} is not a directory" in capsys.readouterr().err

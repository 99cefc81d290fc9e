"""Both backends against transformers' own generate, and every kind of wrong input."""

import logging
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import set_verbosity_warning

from actors.cli import main
from actors.infer import infer
from actors.tiny_model import build_tiny_model
from configs.errors import ConfigError
from configs.export import InferConfig
from tests.actors.engine_helpers import make_model, save_tokenizer

PROMPT = "w17 w5 w29"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama whose tokens are words, without a chat template."""
    path = tmp_path_factory.mktemp("words")
    make_model("llama", seed=1).save_pretrained(path)
    save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("tiny"), seed=7)


@pytest.fixture(scope="module")
def spelling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that goes on through `xéyж`, whose letters beyond ASCII are two tokens each."""
    path = build_tiny_model(tmp_path_factory.mktemp("spelling"), seed=7)
    tokens = AutoTokenizer.from_pretrained(path).encode("xéyж")
    config = AutoConfig.from_pretrained(path)
    config.tie_word_embeddings = False
    model: Any = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        # Nothing is added to a token's embedding, so the head chooses by the last token alone.
        for token, following in pairwise(tokens):
            model.lm_head.weight[following] = model.model.embed_tokens.weight[token]
    model.save_pretrained(path)
    return path


def greedy(path: Path, prompt: str, count: int) -> str:
    """What transformers generates by itself."""
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokens = torch.tensor([tokenizer.encode(prompt)])
    output = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=count
    )
    return tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True)


def ask(path: Path, **options: Any) -> tuple[str, list[str]]:
    pieces: list[str] = []
    config = InferConfig(model=str(path), **{"prompt": PROMPT, "backend": "transformers", **options})
    return infer(config, pieces.append), pieces


def test_transformers_answers_as_generate_does_in_pieces(words: Path) -> None:
    text, pieces = ask(words, max_new_tokens=12)
    assert text == greedy(words, PROMPT, 12)
    assert len(text.split()) > 3
    assert "".join(pieces).split() == text.split()
    assert len([piece for piece in pieces if piece]) > 3


@pytest.mark.engine
def test_vllm_answers_alike_and_prints_only_the_answer(spelling: Path) -> None:
    # Four tokens end in the middle of a letter, of which vLLM itself says nothing.
    arguments = ["infer", "--model", str(spelling), "--prompt", "x", "--chat", "false"]
    arguments += ["--max_new_tokens", "4", "--stream"]
    process = subprocess.run(
        [sys.executable, "-m", "actors.cli", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout == greedy(spelling, "x", 4) + "\n" == "éy\ufffd\n"
    assert "Traceback" not in process.stderr


def test_the_command_prints_the_answer(words: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["infer", "--model", str(words), "--prompt", PROMPT, "--backend", "transformers"]
    expected = greedy(words, PROMPT, 5)
    capsys.readouterr()
    assert main([*arguments, "--max_new_tokens", "5"]) == 0
    assert capsys.readouterr().out == f"{expected}\n"
    assert main([*arguments, "--max_new_tokens", "5", "--stream", "true"]) == 0
    assert capsys.readouterr().out.split() == expected.split()


def test_the_chat_template_is_used_when_there_is_one(words: Path, tmp_path: Path) -> None:
    shutil.copytree(words, tmp_path, dirs_exist_ok=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(words)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'w9 ' if m['role'] == 'system' else 'w10 ' }}{{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}w11{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)
    text, _ = ask(tmp_path, system_prompt="w40 w41", max_new_tokens=6)
    assert text == greedy(words, f"w9 w40 w41 w10 {PROMPT} w11", 6)
    alone, _ = ask(tmp_path, max_new_tokens=6)
    assert alone == greedy(words, f"w10 {PROMPT} w11", 6)
    plain, _ = ask(tmp_path, chat=False, max_new_tokens=6)
    assert plain == greedy(words, PROMPT, 6)
    assert len({text, alone, plain}) == 3


def test_sampling_repeats_with_the_seed(words: Path) -> None:
    first, again, other = (ask(words, temperature=2.0, max_new_tokens=20, seed=seed)[0] for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_the_models_length_ends_the_answer(tiny: Path) -> None:
    text, _ = ask(tiny, prompt="a", chat=False, max_new_tokens=1000)
    assert text == greedy(tiny, "a", 127)
    with pytest.raises(ConfigError, match=r"has \d+ tokens; the model takes 128"):
        ask(tiny, prompt="a b c " * 100)


def test_wrong_input_is_named(words: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no directory"):
        ask(tmp_path / "gone")
    with pytest.raises(ConfigError, match="no chat template"):
        ask(words, chat=True)
    with pytest.raises(ConfigError, match="no chat template"):
        ask(words, system_prompt="Be brief.")
    (tmp_path / "config.json").write_text((words / "config.json").read_text())
    with pytest.raises(ConfigError, match="no tokenizer can be loaded"):
        ask(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="has no safetensors files"):
        ask(tmp_path)
    tensors = load_file(words / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"needs tensors that are not there: model\.norm\.weight$"):
        ask(tmp_path)


def test_layers_that_transformers_does_not_have_are_left_out_in_silence(
    words: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(words, tmp_path, dirs_exist_ok=True)
    tensors = load_file(words / "model.safetensors")
    extra = {"model.layers.2.eh_proj.weight": torch.zeros(64, 128)}
    save_file(tensors | extra, tmp_path / "model.safetensors", {"format": "pt"})
    expected, _ = ask(words, max_new_tokens=3)
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    set_verbosity_warning()
    assert ask(tmp_path, max_new_tokens=3)[0] == expected
    assert caplog.messages == []


def test_an_empty_prompt_is_refused_before_anything_loads(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["infer", "--model", "m", "--prompt", " "]) == 2
    assert "prompt: is empty" in capsys.readouterr().err
    assert main(["infer", "--model", "m"]) == 2
    assert "prompt is required" in capsys.readouterr().err

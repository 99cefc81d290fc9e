import json
from pathlib import Path

import pytest
import yaml

from configs.load import load_config
from configs.schema import RunConfig
from configs.words import as_words

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def back(config: RunConfig) -> RunConfig:
    return load_config(None, as_words(config), config.algorithm)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_come_back(path: Path) -> None:
    config = load_config(path, [], yaml.safe_load(path.read_text())["algorithm"])
    assert back(config) == config
    # Nothing that everyone has anyway.
    assert not any(word.startswith("--trainer.adam_beta1") for word in as_words(config))


def test_values_that_look_like_something_else_come_back(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    strange = [
        "null",
        "~",
        "'quoted'",
        '"',
        "[1",
        "{a: b}",
        "--dashes",
        "a = b",
        "two words",
        "2026",
        "true",
        "ü",
    ]
    content = {
        "model": {"model": "[a] directory"},
        "trainer": {"lr": 1.5e-7, "freeze": ["*.bias", "lm_head.*"]},
        "data": {"dataset": "-", "system_prompt": None},
        "grpo": {"stop": strange},
        "rewards": [
            {"function": "f.py:one", "kwargs": {"pattern": text, "many": [1, {"deep": None}]}}
            for text in strange
        ],
    }
    content["data"] = {"dataset": "~/data.jsonl"}
    file.write_text(json.dumps(content))
    config = load_config(file, [], "grpo")
    assert back(config) == config
    assert config.grpo.stop == tuple(strange)


def test_a_first_entry_that_is_default_keeps_its_place(tmp_path: Path) -> None:
    words = [
        *("--model.model", "m", "--data.dataset", "d", "--rewards.0.function", "a.py:f"),
        *("--rewards.1.url", "http://host/score", "--rewards.1.weight", "0.25"),
    ]
    config = load_config(None, words, "grpo")
    assert back(config) == config

"""adapter_config.json against peft's own reading of it."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
from peft.tuners.tuners_utils import check_target_module_exists

from bridge.adapter_config import (
    ADAPTER_CONFIG,
    parse_adapter_config,
    read_adapter_config,
)
from configs.errors import ConfigError

MODULES = [
    *(f"model.layers.{layer}.self_attn.{leaf}_proj" for layer in (0, 1, 11) for leaf in "qkvo"),
    *(f"model.layers.{layer}.mlp.experts.{expert}.up_proj" for layer in (0, 1) for expert in (1, 11)),
    "model.embed_tokens",
    "lm_head",
]
SETTINGS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "self_attn.v_proj"]},
    {"target_modules": r".*\.layers\.1\..*(q|up)_proj"},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 11]},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    {"target_modules": ["q_proj", "v_proj", "lm_head"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    {"target_modules": ["q_proj", "lm_head"], "exclude_modules": r".*\.0\..*"},
    {"target_modules": ["q_proj", "lm_head", "embed_tokens"], "modules_to_save": ["lm_head", "embed_tokens"]},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_it_targets_what_peft_targets(tmp_path: Path, settings: dict[str, Any]) -> None:
    theirs = peft.LoraConfig(r=4, task_type="CAUSAL_LM", **settings)
    theirs.save_pretrained(tmp_path)
    ours = read_adapter_config(tmp_path)
    found = [module for module in MODULES if ours.targets(module)]
    assert found == [
        module for module in MODULES if (hit := check_target_module_exists(theirs, module)) and bool(hit)
    ]
    assert found


def test_ranks_and_scales_are_pefts() -> None:
    from torch import nn

    patterns = {"rank_pattern": {"a.x": 2, "x": 3}, "alpha_pattern": {r"[ab]\.x": 5}}
    for rslora in (False, True):
        model = nn.ModuleDict(
            {name: nn.ModuleDict({"x": nn.Linear(4, 4), "y": nn.Linear(4, 4)}) for name in "abc"}
        )
        config = {"r": 4, "lora_alpha": 6, "target_modules": ["x", "y"], "use_rslora": rslora, **patterns}
        adapted: Any = peft.get_peft_model(model, peft.LoraConfig(**config))  # pyright: ignore[reportArgumentType]
        ours = parse_adapter_config({"peft_type": "LORA", **config})
        for name in ("a.x", "a.y", "b.x", "b.y", "c.x"):
            layer = adapted.base_model.model.get_submodule(name)
            assert ours.rank_of(name) == layer.r["default"]
            assert ours.scale_of(name) == pytest.approx(layer.scaling["default"])


def test_what_was_read_is_written_again(tmp_path: Path) -> None:
    settings = {"rank_pattern": {"q_proj": 2}, "layers_to_transform": [1], "modules_to_save": ["lm_head"]}
    peft.LoraConfig(
        r=4, lora_alpha=7, target_modules=["q_proj"], base_model_name_or_path="some/model", **settings
    ).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    written = read_adapter_config(tmp_path).to_json("elsewhere", ["q_proj"])
    assert {key: written[key] for key in stored} == stored
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(written))
    again = peft.LoraConfig.from_pretrained(tmp_path)
    assert (again.r, again.lora_alpha, again.layers_to_transform) == (4, 7, [1])


def test_a_new_config_is_read_by_peft(tmp_path: Path) -> None:
    config = parse_adapter_config(
        {"peft_type": "LORA", "r": 4, "lora_alpha": 7, "target_modules": "all-linear"}
    )
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(config.to_json("m", ["v_proj", "q_proj"])))
    theirs: Any = peft.PeftConfig.from_pretrained(tmp_path)
    assert (theirs.r, theirs.lora_alpha, theirs.target_modules) == (4, 7, {"q_proj", "v_proj"})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "must hold a JSON object"),
        ('{"peft_type": "IA3"}', "peft_type: 'IA3' is not supported"),
        (
            '{"peft_type": "LORA", "target_modules": ["q"], "use_dora": true}',
            "use_dora: True is not supported",
        ),
        ('{"peft_type": "LORA", "target_modules": ["q"], "bias": "all"}', "bias: 'all' is not supported"),
        (
            '{"peft_type": "LORA", "target_modules": ["q"], "init_lora_weights": "pissa"}',
            "changes the base model",
        ),
        ('{"peft_type": "LORA", "target_modules": ["q"], "new_trick": 1}', "new_trick: not known here"),
        (
            '{"peft_type": "LORA", "target_modules": ["q"], "r": 0}',
            "r: a rank must be a whole number above 0",
        ),
        ('{"peft_type": "LORA"}', "target_modules: names no module"),
    ],
)
def test_what_cannot_be_done_is_named(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / ADAPTER_CONFIG).write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_adapter_config(tmp_path)
    assert words in str(caught.value)
    assert str(tmp_path / ADAPTER_CONFIG) in str(caught.value)


def test_a_directory_without_an_adapter_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is this a PEFT adapter"):
        read_adapter_config(tmp_path)

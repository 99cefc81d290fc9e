"""Whether a checkpoint fits a model, from headers alone: against what transformers writes for every family.

That the parameters are those of Megatron is in tests/actors/test_megatron_paper.py.
"""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from bridge.checkpoint import CheckpointReader
from bridge.families import spec_of
from bridge.parameters import check_tensors
from bridge.rules import RuleError
from tests.bridge.family_models import CONFIGS, build, save


def check(directory: Path, *, mtp: bool) -> None:
    family, spec = spec_of(directory)
    with CheckpointReader(directory) as reader:
        check_tensors(family, spec, reader.tensors, directory, mtp=mtp)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_transformers_writes_fits(name: str, tmp_path: Path) -> None:
    save(build(CONFIGS[name]), CONFIGS[name], tmp_path)
    check(tmp_path, mtp=True)
    check(tmp_path, mtp=False)


def complaint(directory: Path, *, mtp: bool) -> str:
    with pytest.raises(RuleError) as caught:
        check(directory, mtp=mtp)
    return str(caught.value)


def test_everything_that_does_not_fit_is_named_with_the_directory(tmp_path: Path) -> None:
    config = CONFIGS["deepseek_v3"]
    save(build(config), config, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.experts.5.up_proj.weight"]
    del tensors["model.layers.2.enorm.weight"]
    tensors["model.layers.0.self_attn.o_proj.weight"] = tensors["model.norm.weight"].clone()
    tensors["mystery"] = tensors["model.norm.weight"].clone()
    save_file(tensors, path)
    expert = "the checkpoint does not have model.layers.1.mlp.experts.5.up_proj.weight"
    message = complaint(tmp_path, mtp=False)
    assert message.startswith(f"{tmp_path}: the checkpoint does not fit the model of config.json:\n")
    for words in (
        expert,
        "model.layers.0.self_attn.o_proj.weight is [24] in the checkpoint, the model needs [24, 60]",
        "no rule reads these tensors of the checkpoint: mystery",
    ):
        assert words in message
    assert "enorm" not in message
    assert "the checkpoint does not have model.layers.2.enorm.weight" in complaint(tmp_path, mtp=True)


def test_tensors_that_nothing_reads_are_named_with_the_directory(tmp_path: Path) -> None:
    save(build(CONFIGS["llama"]), CONFIGS["llama"], tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"model.layers.2.mlp.up_proj.weight": tensors["model.norm.weight"].clone()}, path)
    assert complaint(tmp_path, mtp=False) == (
        f"{tmp_path}: no rule reads these tensors of the checkpoint: model.layers.2.mlp.up_proj.weight"
    )

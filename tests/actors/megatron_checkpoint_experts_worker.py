"""One rank of the torch_dist tests of models with experts: as megatron_checkpoint_worker.py, which see.

python megatron_checkpoint_experts_worker.py RANK WORLD_SIZE DIRECTORY
"""

import copy
import json
import resource
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

# Installs what Megatron needs on CPU, and so comes before everything that imports megatron.
from megatron_families_worker import loader, make_run, mine, shard, worst_named  # isort: skip
from megatron_families import CLIP_GRAD, CONFIGS, build, cloned, megatron_tensors, optimizer_of, reference
from megatron_worker import join, split_rows
from megatron_worker_reference import TEMPERATURE, num_loss_tokens, reference_step, token_loss

from actors.checkpoint_files import LATEST
from actors.megatron_checkpoint import (
    MegatronCheckpointError,
    holds,
    load_torch_dist,
    save_torch_dist,
)
from actors.megatron_model import FrozenModel, MegatronModel
from actors.megatron_setup import shutdown_megatron
from actors.model_source import ModelSource, tensors_of, write_beside
from bridge.families import family_of
from bridge.megatron import named_parameters
from bridge.model_bridge import ModelBridge
from configs.errors import WriteError
from tests.bridge import family_models

FAMILIES = ("qwen2_moe", "deepseek_v3")
WITH_MTP = ("deepseek_v3", "glm4_moe")
NOT_FINITE = {
    "decoder.layers.1.mlp.router.expert_bias": torch.nan,
    "decoder.layers.0.mlp.linear_fc1.weight": -torch.inf,
}
# Bytes; a rank's file of weights has more.
FILE_LIMIT = 30_000
SAVES = {2: ("ep2-split", "pp2-vpp2"), 1: ()}
LOADS = {2: ("tp2-sp-ep2", "ep2-split", "pp2-vpp2"), 1: ("one",)}


@cache
def trained(family: str, steps: int) -> dict[str, torch.Tensor]:
    """Whole Megatron tensors of transformers' model after that many steps of torch's AdamW."""
    config = copy.deepcopy(CONFIGS[family])
    if "num_nextn_predict_layers" in config.to_dict():
        config.num_nextn_predict_layers = 0
    model = build(config)
    optimizer = optimizer_of(model)
    for _ in range(steps):
        reference_step(model, optimizer, reference(family).rows, CLIP_GRAD)
    return cloned(megatron_tensors(model, config))


def build_model(layout: str, family: str, load: Any) -> MegatronModel:
    want = reference(family)
    spec = family_of(want.config).megatron(want.config)
    return MegatronModel(make_run(layout, True), spec, device="cpu", load=load)


def step(model: MegatronModel, layout: str, family: str) -> None:
    rows = reference(family).rows
    batches, _ = split_rows(rows, 2 if "pp2" in layout else 1)
    model.step(batches, num_loss_tokens(rows), token_loss, TEMPERATURE)


def fill_wrong(chunks: list[Any]) -> None:
    with torch.no_grad():
        for chunk in chunks:
            for name, tensor in [*chunk.named_parameters(), *chunk.named_buffers()]:
                if name.endswith(("weight", "bias")):
                    tensor.fill_(100.0)


def error_of(model: MegatronModel, want: dict[str, torch.Tensor]) -> Any:
    return worst_named((name, p.detach(), shard(name, want)) for name, p in mine(model.chunks))


def bias_error(model: MegatronModel, want: dict[str, torch.Tensor]) -> float:
    """Of the routers' expert bias, which is no parameter."""
    from megatron_families_worker import global_name

    return max(
        (
            float((buffer - want[global_name(chunk, name)]).abs().max())
            for chunk in model.chunks
            for name, buffer in chunk.named_buffers()
            if name.endswith("expert_bias")
        ),
        default=0.0,
    )


def save(layout: str, family: str, place: Path) -> None:
    model = build_model(layout, family, loader(trained(family, 0)))
    step(model, layout, family)
    save_torch_dist(model.chunks, place, optimizer=model.optimizer, scheduler=model.scheduler, iteration=1)


def load(layout: str, family: str, place: Path) -> dict[str, Any]:
    model = build_model(layout, family, fill_wrong)
    load_torch_dist(model.chunks, place, optimizer=model.optimizer, scheduler=model.scheduler)
    result = {
        "weights": error_of(model, trained(family, 1)),
        "bias": bias_error(model, trained(family, 1)),
    }
    step(model, layout, family)
    return {**result, "next": error_of(model, trained(family, 2))}


def frozen(layout: str, bridge: ModelBridge, load: Any, *, mtp: bool) -> FrozenModel:
    trainer = make_run(layout, True).trainer
    return FrozenModel(trainer, torch.float32, bridge.spec, device="cpu", load=load, mtp=mtp)


def save_mtp(layout: str, family: str, place: Path) -> dict[str, Any]:
    """A model with layers for multi-token prediction as an export writes it, then as a trainer does."""
    if torch.distributed.get_rank() == 0:
        config = family_models.CONFIGS[family]
        family_models.save(family_models.build(config), config, place / "source")
    torch.distributed.barrier()
    bridge = ModelBridge(place / "source")
    exported = frozen(layout, bridge, bridge.load, mtp=True)
    whole, without = place / "whole", place / "without"
    visible: list[bool] = []

    def beside() -> None:
        visible.append((whole / LATEST).exists())
        write_beside(whole, bridge, torch_dtype=None, mtp=True)

    save_torch_dist(exported.chunks, whole, iteration=1, write_beside=beside)
    trained = frozen(layout, bridge, fill_wrong, mtp=False)
    said = ""
    try:
        load_torch_dist(trained.chunks, whole)
    except MegatronCheckpointError as error:
        said = str(error)
    load_torch_dist(trained.chunks, whole, ignored=("mtp.",))
    save_torch_dist(
        trained.chunks,
        without,
        iteration=1,
        write_beside=partial(write_beside, without, bridge, torch_dtype=None, mtp=False),
    )
    return {
        "visible": visible,
        "said": said,
        "no_files": unwritable_beside(trained, place / "fails"),
        "full_disk": full_disk(trained, place / "full"),
        "not_finite": not_finite(trained, bridge, place / "not_finite"),
    }


def unwritable_beside(model: FrozenModel, place: Path) -> tuple[str, list[str]]:
    """What is said when what belongs beside a checkpoint cannot be written, and what is left of it."""
    said = ""

    def fail() -> None:
        raise OSError("no space")

    try:
        save_torch_dist(model.chunks, place, iteration=1, write_beside=fail)
    except WriteError as error:
        said = str(error)
    torch.distributed.barrier()
    return said, sorted(path.name for path in place.iterdir())


def full_disk(model: FrozenModel, place: Path) -> tuple[str, list[str]]:
    """The same when the system refuses to write in the middle of a file of weights."""
    said = ""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, limits[1]))
    try:
        save_torch_dist(model.chunks, place, iteration=1)
    except WriteError as error:
        said = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    torch.distributed.barrier()
    return said, sorted(path.name for path in place.iterdir())


def not_finite(model: FrozenModel, bridge: ModelBridge, place: Path) -> list[str]:
    """Names of the tensors with NaN or infinities, loaded from where they were saved."""
    with torch.no_grad():
        for name, parameter in named_parameters(model.chunks).items():
            if name in NOT_FINITE:
                parameter.view(-1)[0] = NOT_FINITE[name]
    save_torch_dist(model.chunks, place, iteration=1)
    for parameter in named_parameters(model.chunks).values():
        parameter.detach().zero_()
    before = bridge.not_finite(model.chunks)
    load_torch_dist(model.chunks, place)
    return [*before, *bridge.not_finite(model.chunks)]


def load_mtp(layout: str, place: Path, name: str) -> dict[str, Any]:
    """An export back to Hugging Face of what save_mtp wrote, against the file that transformers wrote."""
    source = ModelSource(directory=place / name, mcore=place / name)
    bridge = ModelBridge(source.directory, tensors_of(source))
    with_mtp = holds(place / name, "mtp.")
    model = frozen(layout, bridge, fill_wrong, mtp=with_mtp)
    load_torch_dist(model.chunks, place / name)
    got, want = dict(bridge.export(model.chunks)), load_file(place / "source" / "model.safetensors")
    return {
        "with_mtp": with_mtp,
        "listed": sorted(bridge.tensors or ()) == sorted(got),
        "extra": sorted(got.keys() - want.keys()),
        "missing": sorted(want.keys() - got.keys()),
        "all": sorted(want),
        "differ": [key for key, tensor in got.items() if not torch.equal(tensor, want[key])],
    }


def main(rank: int, world_size: int, directory: Path) -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for layout in SAVES[world_size]:
        join(make_run(layout, True).trainer, rank, world_size, directory / f"save-{layout}")
        for family in FAMILIES:
            save(layout, family, directory / family / layout)
        for family in WITH_MTP if layout == "ep2-split" else ():
            results[f"mtp/{family}"] = save_mtp(layout, family, directory / "mtp" / family)
        shutdown_megatron()
    for layout in LOADS[world_size]:
        join(make_run(layout, True).trainer, rank, world_size, directory / f"load-{layout}")
        for family in FAMILIES:
            for saved in SAVES[2]:
                results[f"{family}/{saved}/{layout}"] = load(layout, family, directory / family / saved)
        for family in WITH_MTP if layout in ("tp2-sp-ep2", "one") else ():
            for name in ("whole", "without"):
                results[f"mtp/{family}/{name}/{layout}"] = load_mtp(layout, directory / "mtp" / family, name)
        shutdown_megatron()
    (directory / f"{world_size}-{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))

"""One rank of the torch_dist tests of models with experts: as megatron_checkpoint_worker.py, which see.

python megatron_checkpoint_experts_worker.py RANK WORLD_SIZE DIRECTORY
"""

import copy
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

# Installs what Megatron needs on CPU, and so comes before everything that imports megatron.
from megatron_families_worker import loader, make_run, mine, shard, worst_named  # isort: skip
from megatron_families import CLIP_GRAD, CONFIGS, build, cloned, megatron_tensors, optimizer_of, reference
from megatron_worker import split_rows
from megatron_worker_reference import TEMPERATURE, num_loss_tokens, reference_step, token_loss

from actors.megatron_checkpoint import load_torch_dist, save_torch_dist
from actors.megatron_model import MegatronModel
from actors.megatron_setup import initialize_megatron, shutdown_megatron
from bridge.families import family_of

FAMILIES = ("qwen2_moe", "deepseek_v3")
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


def join(layout: str, rank: int, world_size: int, meeting: Path) -> None:
    initialize_megatron(
        make_run(layout, True).trainer,
        rank=rank,
        world_size=world_size,
        init_method=f"file://{meeting}",
        timeout_s=60,
        seed=1,
        device="cpu",
    )


def main(rank: int, world_size: int, directory: Path) -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for layout in SAVES[world_size]:
        join(layout, rank, world_size, directory / f"save-{layout}")
        for family in FAMILIES:
            save(layout, family, directory / family / layout)
        shutdown_megatron()
    for layout in LOADS[world_size]:
        join(layout, rank, world_size, directory / f"load-{layout}")
        for family in FAMILIES:
            for saved in SAVES[2]:
                results[f"{family}/{saved}/{layout}"] = load(layout, family, directory / family / saved)
        shutdown_megatron()
    (directory / f"{world_size}-{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))

"""One rank of the torch_dist tests: saves and loads many checkpoints in one process, writes what it measured.

python megatron_checkpoint_worker.py RANK WORLD_SIZE DIRECTORY; test_megatron_checkpoint.py starts it, with two
processes first and with one afterwards, which loads what the two have saved.
"""

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from actors import megatron_cpu

megatron_cpu.install()

from megatron.core import dist_checkpointing  # noqa: E402
from megatron_worker import join, loader, make_run, mine, split_rows, weights_of, worst  # noqa: E402
from megatron_worker_reference import (  # noqa: E402
    TEMPERATURE,
    build_reference,
    make_optimizer,
    make_sequences,
    mcore_tensors,
    num_loss_tokens,
    reference_step,
    token_loss,
)

from actors.megatron_checkpoint import load_torch_dist, save_torch_dist  # noqa: E402
from actors.megatron_model import FrozenModel, MegatronModel  # noqa: E402
from actors.megatron_setup import shutdown_megatron  # noqa: E402
from bridge.families import family_of  # noqa: E402
from configs.errors import BasculeError  # noqa: E402

TWO = ("tp2-sp", "pp2", "dp2")
FAMILIES = ("llama", "qwen3")
ROWS = 131  # of the vocabulary; two tensor-parallel ranks need one more
CLIP_GRAD = 0.05


def spec_of(reference: Any) -> Any:
    config = reference.config.to_dict()
    return family_of(config).megatron(config)


def build(layout: str, reference: Any, load: Any, dtype: str = "float32", **trainer: Any) -> MegatronModel:
    run = make_run(layout, trainer.pop("distributed", True), dtype, **trainer)
    return MegatronModel(run, spec_of(reference), device="cpu", load=load)


def bare_model(layout: str, reference: Any, load: Any) -> FrozenModel:
    trainer = make_run(layout, True).trainer
    return FrozenModel(trainer, torch.float32, spec_of(reference), device="cpu", load=load)


def fill_nan(chunks: list[Any]) -> None:
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(float("nan"))


def step(model: MegatronModel) -> float:
    rows = make_sequences(ROWS)
    batches, _ = split_rows(rows, 1)
    return model.step(batches, num_loss_tokens(rows), token_loss, TEMPERATURE).loss


def trained(family: str, steps: int) -> Any:
    """transformers and torch's AdamW after that many steps."""
    reference = build_reference(family)
    optimizer = make_optimizer(reference)
    for _ in range(steps):
        reference_step(reference, optimizer, make_sequences(ROWS), CLIP_GRAD)
    return reference


def error_of(chunks: list[Any], reference: Any) -> float:
    """Against transformers, the rows of padding (zero) included."""
    weights = weights_of(reference)
    if not all(bool(p.isfinite().all()) for _, p in mine(chunks)):
        return math.inf
    return worst((p.detach(), weights[name]) for name, p in mine(chunks))


def save(layout: str, family: str, place: Path, **options: Any) -> None:
    """One optimizer step, then a checkpoint of everything."""
    reference = build_reference(family)
    model = build(layout, reference, loader(reference), **options)
    step(model)
    save_torch_dist(model.chunks, place, optimizer=model.optimizer, scheduler=model.scheduler, iteration=1)


def load(layout: str, family: str, place: Path, **options: Any) -> dict[str, Any]:
    """A model full of NaN gets the checkpoint and goes on training; errors against transformers."""
    reference = trained(family, 1)
    model = build(layout, reference, fill_nan, **options)
    iteration = load_torch_dist(model.chunks, place, optimizer=model.optimizer, scheduler=model.scheduler)
    result: dict[str, Any] = {"iteration": iteration, "weights": error_of(model.chunks, reference)}
    result["done"] = model.scheduler.num_steps
    step(model)
    result["next"] = error_of(model.chunks, trained(family, 2))
    return result


def plain(place: Path, family: str) -> dict[str, Any]:
    """What Megatron's own reader finds, against the weights mapped by hand. Without a model, so no layers."""
    reference = trained(family, 1)
    named = {name: p.detach() for name, p in reference.named_parameters()}
    whole = mcore_tensors(reference, named)
    tensors = dist_checkpointing.load_plain_tensors(str(place / "iter_0000001"))
    stacked = "decoder.layers.self_attention.linear_proj.weight"
    layers = [whole[f"decoder.layers.{n}.self_attention.linear_proj.weight"] for n in range(2)]
    fc1 = torch.stack([whole[f"decoder.layers.{n}.mlp.linear_fc1.weight"].flatten(0, 1) for n in range(2)])
    embedding = tensors["embedding.word_embeddings.weight"]
    return {
        "stacked": worst(iter([(tensors[stacked], torch.stack(layers))])),
        "fc1": worst(iter([(tensors["decoder.layers.mlp.linear_fc1.weight"], fc1)])),
        "embedding": worst(iter([(embedding[:ROWS], whole["embedding.word_embeddings.weight"])])),
        "keys": sorted(key for key in tensors if not key.startswith("optimizer.")),
    }


def bfloat16(layout: str, place: Path) -> dict[str, Any]:
    """A loaded bfloat16 model goes on bit for bit like the one that was saved."""
    reference = build_reference("llama")
    model = build(layout, reference, loader(reference), "bfloat16")
    step(model)
    save_torch_dist(model.chunks, place, optimizer=model.optimizer, scheduler=model.scheduler, iteration=7)
    other = build(layout, reference, fill_nan, "bfloat16")
    iteration = load_torch_dist(other.chunks, place, optimizer=other.optimizer, scheduler=other.scheduler)
    losses = [step(each) for each in (model, other) for _ in range(2)]
    pairs = zip(mine(model.chunks), mine(other.chunks), strict=True)
    same = all(torch.equal(a, b) for (_, a), (_, b) in pairs)
    return {"iteration": iteration, "losses": losses, "same": same}


def weights_only(layout: str, place: Path, root: Path) -> dict[str, Any]:
    """The model part of a checkpoint with optimizer state into bare chunks; and one saved without."""
    reference = trained("qwen3", 1)
    frozen = bare_model(layout, reference, fill_nan)
    load_torch_dist(frozen.chunks, place)
    error = error_of(frozen.chunks, reference)
    bare = root / "bare"
    save_torch_dist(frozen.chunks, bare, iteration=3)
    save_torch_dist(frozen.chunks, bare, iteration=3)
    model = build(layout, reference, fill_nan)
    refused = message(
        lambda: load_torch_dist(model.chunks, bare, optimizer=model.optimizer, scheduler=model.scheduler)
    )
    if torch.distributed.get_rank() == 0:
        (bare / "latest_checkpointed_iteration.txt").write_text("release")
        (bare / "iter_0000003").rename(bare / "release")
    torch.distributed.barrier()
    fill_nan(frozen.chunks)
    load_torch_dist(frozen.chunks, bare)
    again = error_of(frozen.chunks, reference)
    return {
        "error": error,
        "again": again,
        "no_state": refused,
        "left": sorted(path.name for path in bare.iterdir()),
    }


def message(action: Callable[[], Any]) -> str:
    try:
        action()
    except BasculeError as error:
        return str(error)
    return ""


def refusals(layout: str, place: Path, root: Path) -> dict[str, Any]:
    """What is said about checkpoints that do not fit or are damaged; the model must stay as it was."""
    reference = build_reference("llama")
    frozen = bare_model(layout, reference, loader(reference))
    before = [p.detach().clone() for _, p in mine(frozen.chunks)]
    said: dict[str, Any] = {"other": message(lambda: load_torch_dist(frozen.chunks, place))}
    said["nothing"] = message(lambda: load_torch_dist(frozen.chunks, root / "nowhere"))
    damaged = root / "damaged"
    save_torch_dist(frozen.chunks, damaged, iteration=1)
    file = damaged / "iter_0000001" / "__0_0.distcp"
    if torch.distributed.get_rank() == 0:
        os.truncate(file, file.stat().st_size - 100)
    torch.distributed.barrier()
    said["truncated"] = message(lambda: load_torch_dist(frozen.chunks, damaged))
    if torch.distributed.get_rank() == 0:
        file.with_name(".metadata").write_bytes(b"\x80")
    torch.distributed.barrier()
    said["metadata"] = message(lambda: load_torch_dist(frozen.chunks, damaged))
    blocked = root / "blocked"
    blocked.touch()
    said["unwritable"] = message(lambda: save_torch_dist(frozen.chunks, blocked, iteration=1))
    same = all(torch.equal(a, b) for a, (_, b) in zip(before, mine(frozen.chunks), strict=True))
    return said | {"kept": same}


def cases_of_two(layout: str, root: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    if layout == "pp2":
        results["bf16"] = bfloat16(layout, root / "bf16")
        results["weights"] = weights_only(layout, root / "qwen3" / "tp2-sp", root)
        results["refusals"] = refusals(layout, root / "qwen3" / "tp2-sp", root)
    for family in FAMILIES:
        for saved in TWO:
            results[f"{family}/{saved}/{layout}"] = load(layout, family, root / family / saved)
    whole = root / "whole" / "pp2"
    results[f"whole/pp2/{layout}"] = load(layout, "llama", whole, distributed=False)
    return results


def cases_of_one(root: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for family in FAMILIES:
        for saved in TWO:
            results[f"{family}/{saved}/one"] = load("one", family, root / family / saved)
            results[f"plain/{family}/{saved}"] = plain(root / family / saved, family)
    return results


def main(rank: int, world_size: int, directory: Path) -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    if world_size == 2:
        for layout in TWO:
            join(make_run(layout, True).trainer, rank, world_size, directory / f"save-{layout}")
            for family in FAMILIES:
                save(layout, family, directory / family / layout)
            if layout == "pp2":
                save(layout, "llama", directory / "whole" / layout, distributed=False)
            shutdown_megatron()
    for layout in TWO if world_size == 2 else ("one",):
        join(make_run(layout, True).trainer, rank, world_size, directory / f"load-{layout}")
        results |= cases_of_two(layout, directory) if world_size == 2 else cases_of_one(directory)
        shutdown_megatron()
    (directory / f"{world_size}-{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))

"""One rank of the tests of LoRA on Megatron: many layouts and models in one process; writes what it measured.

python megatron_lora_worker.py RANK WORLD_SIZE DIRECTORY; test_megatron_lora.py starts it. Two ranks write
checkpoints that one then reads.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron_lora_layouts import SIZES, STEPS, TRIPS, steps_of
from megatron_lora_reference import CASES, CLIP_GRAD, reference, weights

# Installs what Megatron needs on CPU, and so comes before everything that imports megatron.
from megatron_families_worker import loader, shard  # isort: skip
from megatron_families import CONFIGS
from megatron_vision import look
from megatron_worker import join, run_under, split_rows, worst
from megatron_worker_reference import TEMPERATURE, num_loss_tokens, token_loss

from bridge.families import family_of
from bridge.lora import Part, Target, keys_of, targets_of
from bridge.megatron import EMBEDDING, OUTPUT_LAYER, adapter_parameters, named_parameters, place_of_this_rank
from configs.schema import TrainerConfig

import torch.distributed as dist  # isort: skip
from torch.distributed.checkpoint.filesystem import FileSystemReader  # isort: skip

from actors.megatron_adapter_checkpoint import load_adapter, save_adapter  # isort: skip
from actors.megatron_checkpoint import load_torch_dist, save_torch_dist  # isort: skip
from actors.megatron_lora import adapters_off, attach  # isort: skip
from actors.megatron_model import FrozenModel, MegatronModel  # isort: skip
from actors.megatron_setup import shutdown_megatron  # isort: skip

SAVED = {"embed_tokens": EMBEDDING, "lm_head": OUTPUT_LAYER}
"""Megatron's names of modules that are trained whole."""
DROPOUT = 0.4


def spec_of(name: str) -> Any:
    config = CONFIGS[CASES[name].family].to_dict()
    return family_of(config), family_of(config).megatron(config)


class Adapt:
    """Attaches the case's adapters, and fills them with the reference's values."""

    def __init__(self, name: str, *, fill: bool = True, dropout: float = 0.0) -> None:
        self.name, self.fill, self.dropout = name, fill, dropout
        self.targets: tuple[Target, ...] = ()

    def __call__(self, chunks: list[Any]) -> None:
        family, spec = spec_of(self.name)
        config = replace(CASES[self.name].config, lora_dropout=self.dropout)
        parameters = named_parameters(chunks)
        self.targets = targets_of(family, spec, parameters, place_of_this_rank(), config)
        attach(chunks, self.targets, seed=7, trainable=[SAVED[module] for module in config.modules_to_save])
        if self.fill:
            with torch.no_grad():
                for parameter, whole in self.pairs(chunks, reference(self.name).first):
                    parameter.copy_(whole)

    def pairs(self, chunks: list[Any], wholes: dict[str, torch.Tensor]) -> Iterator[Any]:
        """This rank's A and B, and its parts of the whole ones by PEFT's names."""
        held = adapter_parameters(chunks)
        for target in self.targets:
            for part in target.parts:
                key_A, key_B = keys_of(target, part)
                yield held[target.parameter(part, "A")], columns_of(part, wholes[key_A])
                yield held[target.parameter(part, "B")], rows_of(part, wholes[key_B])
        base = named_parameters(chunks)
        for key, whole in wholes.items():
            name = SAVED.get(key.split(".")[-2]) if ".lora_" not in key else None
            if name in base:
                yield base[name], shard(name, {name: whole})


def columns_of(part: Part, whole: torch.Tensor) -> torch.Tensor:
    start, stop = part.columns
    return torch.nn.functional.pad(whole[:, start:stop], (0, part.local_in - (stop - start)))


def rows_of(part: Part, whole: torch.Tensor) -> torch.Tensor:
    return torch.cat([whole[:0], *(whole[rows.hf : rows.hf + rows.count] for rows in part.rows)])


def make(layout: str, name: str, adapt: Any, distributed: bool, **trainer: Any) -> MegatronModel:
    run = run_under(SIZES[layout], distributed, clip_grad=CLIP_GRAD, **trainer)
    load = loader(weights(CASES[name].family))
    return MegatronModel(run, spec_of(name)[1], device="cpu", load=load, adapt=adapt, look=look)


def batches_of(layout: str, rows: list[Any]) -> Any:
    return split_rows(rows, 3 if "vpp" in layout else 1)


def worst_pair(pairs: Iterator[Any]) -> float:
    """Largest difference of tensors with elements; a pipeline stage may have none."""
    return max([worst(iter([pair])) for pair in pairs if pair[0].numel()], default=0.0)


def bytes_of(model: MegatronModel) -> dict[str, torch.Tensor]:
    """Copies of what is not trained."""
    tensors = named_parameters(model.chunks).items()
    return {name: tensor.detach().clone() for name, tensor in tensors if not tensor.requires_grad}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def step_errors(model: MegatronModel, batches: Any, rows: Any, want: Any) -> dict[str, float]:
    result = model.step(batches, num_loss_tokens(rows), token_loss, TEMPERATURE)
    return {
        "loss": abs(result.loss - want.loss) / abs(want.loss),
        "norm": abs(result.grad_norm - want.norm) / want.norm,
    }


def run_case(layout: str, name: str, *, distributed: bool) -> dict[str, Any]:
    want = reference(name)
    adapt = Adapt(name)
    model = make(layout, name, adapt, distributed)
    batches, groups = batches_of(layout, want.rows)
    found: dict[str, Any] = {"logprobs": logprob_error(want, model, batches, groups)}
    if distributed and not CASES[name].config.modules_to_save:
        found["base_is_base"] = base_is_base(layout, name, model, batches)
    before = bytes_of(model)
    # The distributed optimizer keeps only this rank's part of the summed gradient.
    steps = want.steps if distributed else want.steps[:1]
    for number, step in enumerate(steps):
        for key, error in step_errors(model, batches, want.rows, step).items():
            found[f"{key}_{number}"] = error
        if not distributed:
            pairs = adapt.pairs(model.chunks, step.grads)
            found["grads"] = worst_pair((p.main_grad, g) for p, g in pairs if p.numel())
    found["after"] = worst_pair((p.detach(), w) for p, w in adapt.pairs(model.chunks, steps[-1].after))
    found["base_kept"] = equal(before, bytes_of(model))
    trained = [p for chunk in model.chunks for p in chunk.parameters() if p.requires_grad]
    parts = model.optimizer.chained_optimizers
    found["optimized"] = sum(p.numel() for part in parts for p in part.get_parameters())
    found["trained"] = sum(parameter.numel() for parameter in trained)
    found["adapters"] = sum(parameter.numel() for parameter in adapter_parameters(model.chunks).values())
    return found


def logprob_error(want: Any, model: Any, batches: Any, groups: Any) -> float | None:
    got = model.logprobs(batches, TEMPERATURE)
    if got is None:
        return None
    known = {id(row): values for row, values in zip(want.rows, want.logprobs, strict=True)}
    errors = []
    for row, group in zip(got, groups, strict=True):
        values = torch.cat([known[id(sequence)] for sequence in group])
        errors.append(float((torch.tensor(row[: len(values)]) - values).abs().max()))
    return max(errors)


def base_is_base(layout: str, name: str, model: MegatronModel, batches: Any) -> list[bool]:
    """Whether without adapters each log-probability is to the bit the base model's, and with them is not."""
    settings = TrainerConfig.model_validate(SIZES[layout])
    load = loader(weights(CASES[name].family))
    base = FrozenModel(settings, torch.float32, spec_of(name)[1], device="cpu", load=load)
    for chunk in base.chunks:
        # Megatron multiplies with a frozen weight in another shape, which rounds otherwise.
        chunk.requires_grad_(False)
    want = base.logprobs(batches, TEMPERATURE)
    got, adapted = model.base_logprobs(batches, TEMPERATURE), model.logprobs(batches, TEMPERATURE)
    if want is None or got is None or adapted is None:
        return []
    same = all((one == other).all() for one, other in zip(want, got, strict=True))
    changed = any((one != other).any() for one, other in zip(want, adapted, strict=True))
    return [bool(same), bool(changed)]


def bfloat16(layout: str, name: str) -> dict[str, Any]:
    """How far loss and gradient norm are from float32's, and whether the base is left alone."""
    want = reference(name)
    run = run_under(SIZES[layout], True, "bfloat16", clip_grad=CLIP_GRAD)
    load = loader(weights(CASES[name].family))
    model = MegatronModel(run, spec_of(name)[1], device="cpu", load=load, adapt=Adapt(name))
    batches, _ = batches_of(layout, want.rows)
    before = bytes_of(model)
    found: dict[str, Any] = step_errors(model, batches, want.rows, want.steps[0])
    return found | {"base_kept": equal(before, bytes_of(model))}


def initial(layout: str, name: str) -> dict[str, Any]:
    """A and B as they start, every part with the columns and rows that it is."""
    adapt = Adapt(name, fill=False)
    model = make(layout, name, adapt, True)
    held = adapter_parameters(model.chunks)
    found: dict[str, Any] = {}
    for target in adapt.targets:
        for part in target.parts:
            start, stop = part.columns
            A = held[target.parameter(part, "A")][:, : stop - start]
            found[part.module] = {
                "columns": part.columns,
                "in": part.in_features,
                "A": A.tolist(),
                "B": held[target.parameter(part, "B")].tolist(),
            }
    return found


def save_trip(layout: str, name: str, directory: Path) -> None:
    """Two steps, and a checkpoint of the adapters and one of the base model."""
    want = reference(name)
    model = make(layout, name, Adapt(name), True)
    batches, _ = batches_of(layout, want.rows)
    for step in want.steps[:2]:
        step_errors(model, batches, want.rows, step)
    folder = directory / f"trip-{layout}-{name}"
    save_adapter(model.chunks, folder, optimizer=model.optimizer, scheduler=model.scheduler, iteration=2)
    save_torch_dist(model.chunks, folder / "base", iteration=0)


def go_on(layout: str, name: str, folder: Path) -> dict[str, Any]:
    """The third step after loading into other adapters."""
    want = reference(name)
    adapt = Adapt(name, fill=False)
    model = make(layout, name, adapt, True)
    iteration = load_adapter(model.chunks, folder, optimizer=model.optimizer, scheduler=model.scheduler)
    found: dict[str, Any] = {"iteration": iteration}
    found["loaded"] = worst_pair((p.detach(), w) for p, w in adapt.pairs(model.chunks, want.steps[1].after))
    batches, _ = batches_of(layout, want.rows)
    found |= step_errors(model, batches, want.rows, want.steps[2])
    found["after"] = worst_pair((p.detach(), w) for p, w in adapt.pairs(model.chunks, want.steps[2].after))
    keys = FileSystemReader(folder / "iter_0000002").read_metadata().state_dict_metadata
    found["other_keys"] = sorted(key for key in keys if ".lora." not in key and "optimizer." not in key)
    keys = FileSystemReader(folder / "base" / "iter_0000000").read_metadata().state_dict_metadata
    found["adapter_keys"] = sorted(key for key in keys if ".lora." in key)
    before = bytes_of(model)
    with torch.no_grad():
        for key in before:
            named_parameters(model.chunks)[key].fill_(3)
    load_torch_dist(model.chunks, folder / "base")
    found["base"] = equal(before, bytes_of(model))
    return found


def dropped(layout: str) -> dict[str, Any]:
    """How many inputs of the first layer's q, v and o adapters are kept, by token.

    For o by token and tensor-parallel rank: the ranks' As are ones and thousands.
    """
    model = make(layout, "llama", Adapt("llama", fill=False, dropout=DROPOUT), True)
    chunk: Any = model.chunks[0]
    attention = chunk.decoder.layers[0].self_attention
    qkv, proj = attention.linear_qkv, attention.linear_proj
    rank = dist.get_rank()
    with torch.no_grad():
        for name, parameter in adapter_parameters(model.chunks).items():
            parameter.fill_(1000**rank if name.endswith("o_proj.A") else 1)
    rows = {part.leaf: part.rows[0].local for part in qkv.lora.target.parts}

    def kept(linear: Any, *, training: bool) -> torch.Tensor:
        """The adapters' part of the output, divided by what one input gives."""
        chunk.train(training)
        inputs = torch.ones(8, 1, linear.weight.shape[1])
        with torch.no_grad():
            adapted = linear(inputs)[0]
            with adapters_off(model.chunks):
                delta = (adapted - linear(inputs)[0])[:, 0]
        return (delta / 5 * (1 - DROPOUT if training else 1)).round().int()

    both = kept(qkv, training=True)
    total = kept(proj, training=True)[:, 0]
    return {
        "q": both[:, rows["q_proj"]].tolist(),
        "v": both[:, rows["v_proj"]].tolist(),
        "o": torch.stack([total % 1000, total // 1000]).tolist(),
        "evaluated": kept(qkv, training=False)[:, rows["q_proj"]].tolist(),
        "inputs": [qkv.weight.shape[1], proj.weight.shape[1]],
    }


def cases_of(layout: str, directory: Path) -> Iterator[tuple[str, Any]]:
    for name, distributed in steps_of(layout):
        variant = "split" if distributed else "whole"
        yield f"{layout}/{name}/{variant}", run_case(layout, name, distributed=distributed)
    if layout in ("one", "tp2-sp"):
        yield f"{layout}/initial", initial(layout, "llama")
    if layout in ("tp2", "tp2-sp"):
        yield f"{layout}/dropout", dropped(layout)
    if layout == "tp2-sp-ep2":
        yield f"{layout}/bfloat16", bfloat16(layout, "qwen3_moe")
    for first, _, name in TRIPS:
        if first == layout:
            save_trip(layout, name, directory)


def main(rank: int, world_size: int, directory: Path) -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    wanted = sys.argv[4:]
    for layout in STEPS:
        settings = TrainerConfig.model_validate(SIZES[layout])
        if settings.world_size != world_size or (wanted and layout not in wanted):
            continue
        join(settings, rank, world_size, directory / layout)
        results |= cases_of(layout, directory)
        shutdown_megatron()
    for first, second, name in TRIPS:
        layout = "one" if world_size == 1 else second
        folder = directory / f"trip-{first}-{name}"
        settings = TrainerConfig.model_validate(SIZES[layout])
        if folder.exists():
            join(settings, rank, world_size, directory / f"{first}-{layout}-{name}")
            results[f"{layout}/{first}/{name}/trip"] = go_on(layout, name, folder)
            shutdown_megatron()
    (directory / f"{world_size}-{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))

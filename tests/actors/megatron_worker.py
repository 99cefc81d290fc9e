"""One rank of the Megatron tests: runs many cases in one process and writes the errors it measured.

python megatron_worker.py RANK WORLD_SIZE DIRECTORY; test_megatron_model.py starts it and reads the results.
"""

import json
import re
import socket
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron_worker_reference import (
    BETAS,
    EPS,
    LR,
    TEMPERATURE,
    WEIGHT_DECAY,
    build_reference,
    cut,
    make_conversations,
    make_optimizer,
    make_sequences,
    mcore_tensors,
    num_loss_tokens,
    pack,
    reference_logprobs,
    reference_step,
    token_loss,
    transformers_sft_loss,
)

from actors import megatron_cpu
from actors.trainer_rank import freeze
from algorithms.losses import sft_loss
from algorithms.packing import pack as pack_samples
from algorithms.roles import Predictions
from bridge.families import family_of
from bridge.frozen import frozen_parameters
from configs.errors import BasculeError
from configs.schema import LayoutConfig, RunConfig

megatron_cpu.install()

from megatron.core import parallel_state  # noqa: E402

from actors.megatron_model import FrozenModel, MegatronModel, StepFailedError  # noqa: E402
from actors.megatron_setup import initialize_megatron, shutdown_megatron  # noqa: E402

STEPS = 2
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2-sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "dp2": {"data_parallel_size": 2},
    "tp2-sp-pp2": {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "pipeline_model_parallel_size": 2,
    },
    "pp2-dp2": {"pipeline_model_parallel_size": 2, "data_parallel_size": 2},
}
FAMILIES = {
    **dict.fromkeys(LAYOUTS, ("llama", "qwen2", "qwen3")),
    "tp2-sp-pp2": ("llama", "qwen3"),
    "pp2-dp2": ("qwen2",),
}
VARIANTS = ((1, True), (2, False))
BF16_LAYOUTS = ("one", "tp2-sp", "dp2")
CLIP_GRAD = 0.05
SFT_LAYOUTS = ("one", "tp2-sp", "pp2", "dp2")
# Of two stages the first one is left with nothing to train, but what the tied head of the second shares.
FROZEN = {
    "whole": (),
    "part": ("model.embed_tokens.weight", "model.layers.0.*", "*.[qkv]_proj.*", "model.norm.weight"),
}


def make_run(layout: str, distributed_optimizer: bool, dtype: str = "float32", **trainer: Any) -> RunConfig:
    return run_under(LAYOUTS[layout], distributed_optimizer, dtype, **trainer)


def run_under(
    sizes: dict[str, Any], distributed_optimizer: bool, dtype: str = "float32", **trainer: Any
) -> RunConfig:
    """A run of the reference's optimizer under the parallel `sizes`."""
    settings = {
        "lr": LR,
        "weight_decay": WEIGHT_DECAY,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "adam_eps": EPS,
        "clip_grad": CLIP_GRAD,
        "use_distributed_optimizer": distributed_optimizer,
        **sizes,
        **trainer,
    }
    return RunConfig.model_validate(
        {
            "algorithm": "sft",
            "max_steps": 10,
            "model": {"model": "tiny", "torch_dtype": dtype},
            "trainer": settings,
            "data": {"dataset": "none.jsonl"},
        }
    )


def join(layout: LayoutConfig, rank: int, world_size: int, meeting: Path) -> None:
    """Make the process groups; the ranks meet at a file."""
    initialize_megatron(
        layout,
        rank=rank,
        world_size=world_size,
        init_method=f"file://{meeting}",
        timeout_s=60,
        seed=1,
        device="cpu",
    )


def mine(chunks: list[Any]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This rank's parameters with their global names."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            local = re.match(r"decoder\.layers\.(\d+)", name)
            if local is None:
                yield name, parameter
            else:
                number = chunk.decoder.layers[int(local[1])].layer_number - 1
                yield f"decoder.layers.{number}" + name[local.end() :], parameter


def shards(reference: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """This tensor-parallel rank's part of every Megatron tensor."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    return {name: cut(name, whole, rank, size) for name, whole in mcore_tensors(reference, tensors).items()}


def weights_of(reference: Any) -> dict[str, torch.Tensor]:
    return shards(reference, {name: p.detach() for name, p in reference.named_parameters()})


def grads_of(reference: Any) -> dict[str, torch.Tensor]:
    return shards(reference, {name: p.grad for name, p in reference.named_parameters()})


def loader(reference: Any) -> Any:
    def load(chunks: list[Any]) -> None:
        values = weights_of(reference)
        with torch.no_grad():
            for name, parameter in mine(chunks):
                assert parameter.shape == values[name].shape, name
                parameter.copy_(values[name])

    return load


def worst(pairs: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Largest difference relative to the largest entry of its tensor."""
    return max(
        float((got.float() - want).abs().max() / want.abs().max().clamp_min(1e-6)) for got, want in pairs
    )


def split_rows(rows: list[Any], micro_batches: int) -> tuple[list[Any], list[list[Any]]]:
    """This data-parallel rank's micro-batches, and the sequences in each of them."""
    dp_size = parallel_state.get_data_parallel_world_size()
    parts = dp_size * micro_batches
    groups = [rows[part::parts] for part in range(parts)]
    # A few tokens of padding, few enough that every sequence-parallel rank has loss tokens.
    length = max(sum(len(row.tokens_T) for row in group) for group in groups) // 4 * 4 + 4
    start = parallel_state.get_data_parallel_rank() * micro_batches
    groups = groups[start : start + micro_batches]
    return [pack(group, length) for group in groups], groups


def logprob_error(reference: Any, model: Any, batches: list[Any], groups: list[list[Any]]) -> float | None:
    got = model.logprobs(batches, TEMPERATURE)
    if got is None:
        return None
    errors = []
    for row, group in zip(got, groups, strict=True):
        with torch.no_grad():
            want = torch.cat([reference_logprobs(reference, sequence) for sequence in group])
        errors.append(float((torch.tensor(row[: len(want)]) - want).abs().max() / want.abs().max()))
    return max(errors)


def run_case(layout: str, family: str, micro_batches: int, distributed_optimizer: bool) -> dict[str, Any]:
    reference = build_reference(family)
    spec = family_of(reference.config.to_dict()).megatron(reference.config.to_dict())
    run = make_run(layout, distributed_optimizer)
    model = MegatronModel(run, spec, device="cpu", load=loader(reference))
    rows = make_sequences(spec.vocab_size)
    batches, groups = split_rows(rows, micro_batches)
    errors: dict[str, Any] = {"logprobs": logprob_error(reference, model, batches, groups)}
    errors |= failed_step(model, batches)
    optimizer = make_optimizer(reference)
    for step in range(STEPS):
        want = reference_step(reference, optimizer, rows, CLIP_GRAD)
        result = model.step(batches, num_loss_tokens(rows), token_loss, TEMPERATURE)
        got = (result.loss, result.metrics["entropy"], result.grad_norm)
        for name, one, other in zip(("loss", "metric", "grad_norm"), got, want, strict=True):
            errors[f"{name}_{step}"] = abs(one - other) / abs(other)
        errors[f"clipped_{step}"] = want[2] > 2 * CLIP_GRAD
        if step == 0 and not distributed_optimizer:
            grads = grads_of(reference)
            errors["grads"] = worst((p.main_grad, grads[name]) for name, p in mine(model.chunks))
    errors["learning_rate"] = result.learning_rate
    weights = weights_of(reference)
    errors["weights"] = worst((p.detach(), weights[name]) for name, p in mine(model.chunks))
    errors["logprobs_after"] = logprob_error(reference, model, batches, groups)
    return errors


def failed_step(model: MegatronModel, batches: list[Any]) -> dict[str, Any]:
    """A NaN loss: what the error says, and whether the weights stayed."""
    before = [p.detach().clone() for _, p in mine(model.chunks)]

    def broken(predictions: Predictions, row: Any) -> Any:
        return predictions.logprobs_T.sum() * float("nan"), {}

    try:
        model.step(batches, 1, broken, TEMPERATURE)
    except StepFailedError as error:
        message = str(error)
    else:
        message = ""
    same = all(torch.equal(old, p) for old, (_, p) in zip(before, mine(model.chunks), strict=True))
    return {"failure": message, "weights_kept": same}


def run_bf16(layout: str) -> dict[str, Any]:
    """bfloat16 weights must be the rounding of a float32 AdamW that sees the same gradients."""
    reference = build_reference("qwen2")
    spec = family_of(reference.config.to_dict()).megatron(reference.config.to_dict())
    run = make_run(layout, False, "bfloat16", clip_grad=0.0, lr=1e-4)
    model = MegatronModel(run, spec, device="cpu", load=loader(reference))
    rows = make_sequences(spec.vocab_size)
    batches, groups = split_rows(rows, 1)
    errors: dict[str, Any] = {"logprobs": logprob_error(reference, model, batches, groups)}
    copies = [torch.nn.Parameter(p.detach().float()) for _, p in mine(model.chunks)]
    first = [p.detach().clone() for _, p in mine(model.chunks)]
    optimizer = torch.optim.AdamW(copies, lr=1e-4, betas=BETAS, eps=EPS, weight_decay=0.0)
    optimizer.param_groups[0]["params"] = [p for p in copies if p.ndim == 1]
    optimizer.add_param_group({"params": [p for p in copies if p.ndim > 1], "weight_decay": WEIGHT_DECAY})
    for _ in range(30):
        model.step(batches, num_loss_tokens(rows), token_loss, TEMPERATURE)
        for (_, parameter), copy in zip(mine(model.chunks), copies, strict=True):
            assert parameter.main_grad.dtype == torch.float32
            copy.grad = parameter.main_grad.clone()
        optimizer.step()
    pairs = list(zip(mine(model.chunks), copies, strict=True))
    errors["differs"] = sum(int((p != copy.bfloat16()).sum()) for (_, p), copy in pairs)
    moves = zip(mine(model.chunks), first, strict=True)
    errors["moved"] = max(float((p.float() - old.float()).abs().max()) for (_, p), old in moves)
    return errors


def run_refused_rows(layout: str) -> dict[str, Any]:
    """Messages about rows that do not split over two ranks, and rows of two lengths."""
    reference = build_reference("llama")
    spec = family_of(reference.config.to_dict()).megatron(reference.config.to_dict())
    model = FrozenModel(
        make_run(layout, False).trainer, torch.float32, spec, device="cpu", load=loader(reference)
    )
    rows = make_sequences(spec.vocab_size)
    messages = {}
    for name, batches in (("odd", [pack(rows, 27)]), ("uneven", [pack(rows, 28), pack(rows, 32)])):
        try:
            model.logprobs(batches, TEMPERATURE)
        except BasculeError as error:
            messages[name] = str(error)
    return messages


def run_frozen(layout: str, family: str) -> dict[str, Any]:
    reference = build_reference(family)
    spec = family_of(reference.config.to_dict()).megatron(reference.config.to_dict())
    model = FrozenModel(
        make_run(layout, False).trainer, torch.float32, spec, device="cpu", load=loader(reference)
    )
    batches, groups = split_rows(make_sequences(spec.vocab_size), 1)
    return {"logprobs": logprob_error(reference, model, batches, groups)}


def run_sft(layout: str, patterns: tuple[str, ...]) -> dict[str, Any]:
    """Conversations with several trained turns against transformers with labels of -100, some of it frozen."""
    reference = build_reference("qwen3")
    config = reference.config.to_dict()
    spec = family_of(config).megatron(config)
    frozen = frozen_parameters(family_of(config), spec, None, patterns)
    run = make_run(layout, False, clip_grad=0.0, micro_batch_size=2)
    model = MegatronModel(run, spec, device="cpu", load=loader(reference), adapt=partial(freeze, frozen))
    samples = make_conversations(spec.vocab_size)
    batch = pack_samples(samples, run.trainer)
    want = transformers_sft_loss(reference, samples)
    want.backward()
    kept = {
        name: p.grad
        for name, p in reference.named_parameters()
        if not any(map(partial(fnmatch, name), patterns))
    }
    norm = torch.stack([grad.norm() for grad in kept.values()]).norm()
    before = {name: p.detach().clone() for name, p in mine(model.chunks)}
    micro_batches = batch.ranks[parallel_state.get_data_parallel_rank()]
    result = model.step(micro_batches, batch.num_loss_tokens, sft_loss, 1.0)
    grads = grads_of(reference)
    trained = [(name, p) for name, p in mine(model.chunks) if name not in frozen]
    held = [(name, p) for name, p in mine(model.chunks) if name in frozen]
    groups = [group["params"] for group in model.optimizer.param_groups]
    return {
        "loss": abs(result.loss - float(want)) / float(want),
        "grad_norm": abs(result.grad_norm - float(norm)) / float(norm),
        "grads": worst((p.main_grad, grads[name]) for name, p in trained) if trained else 0.0,
        "moved": sum(not torch.equal(p, before[name]) for name, p in trained) == len(trained),
        "held": all(torch.equal(p, before[name]) and p.grad is None for name, p in held),
        "without_gradient": not any(hasattr(p, "main_grad") for _, p in held),
        "with_state": sum(map(len, groups)) == len(trained),
        "count": len(held),
    }


def run_refused_join() -> dict[str, Any]:
    """Messages about a wrong number of ranks, and a rank that never comes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    messages = {}
    for name, layout, world_size in (("count", "tp2", 3), ("alone", "tp2", 2)):
        try:
            initialize_megatron(
                make_run(layout, True).trainer,
                rank=0,
                world_size=world_size,
                init_method=f"tcp://127.0.0.1:{port}",
                timeout_s=1,
                seed=1,
                device="cpu",
            )
        except BasculeError as error:
            messages[name] = str(error)
    return messages


def run_schedule(style: str) -> dict[str, Any]:
    """Learning rates that were applied in each of ten steps, two of them warm-up."""
    reference = build_reference("llama")
    spec = family_of(reference.config.to_dict()).megatron(reference.config.to_dict())
    run = make_run("one", True, lr_decay_style=style, lr_warmup_iters=2, min_lr=1e-3)
    model = MegatronModel(run, spec, device="cpu", load=loader(reference))
    rows = make_sequences(spec.vocab_size)
    batches, _ = split_rows(rows, 1)
    steps = [model.step(batches, num_loss_tokens(rows), token_loss, TEMPERATURE) for _ in range(10)]
    return {"learning_rates": [step.learning_rate for step in steps]}


def cases_of(layout: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for family in FAMILIES[layout]:
        for micro_batches, distributed in VARIANTS:
            name = f"{layout}/{family}/{micro_batches}/{'split' if distributed else 'whole'}"
            yield name, run_case(layout, family, micro_batches, distributed)
    if layout in SFT_LAYOUTS:
        for name, patterns in FROZEN.items():
            yield f"{layout}/sft-{name}", run_sft(layout, patterns)
    if layout in BF16_LAYOUTS:
        yield f"{layout}/bf16", run_bf16(layout)
    if layout == "tp2-sp":
        yield "tp2-sp/rows", run_refused_rows(layout)
    if layout == "one":
        yield "one/frozen", run_frozen(layout, "llama3")
        for style in ("constant", "linear", "cosine"):
            yield f"one/{style}", run_schedule(style)


def main(rank: int, world_size: int, directory: Path) -> None:
    torch.set_num_threads(1)
    results: dict[str, dict[str, Any]] = {}
    if world_size == 1:
        results["one/join"] = run_refused_join()
    for layout in LAYOUTS:
        run = make_run(layout, True)
        if run.trainer.world_size != world_size:
            continue
        join(run.trainer, rank, world_size, directory / layout)
        results |= cases_of(layout)
        shutdown_megatron()
    (directory / f"{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))

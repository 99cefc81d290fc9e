"""One rank of the tests of the experts' load: what is measured, and the gradient of its losses.

python megatron_balance_worker.py RANK WORLD_SIZE DIRECTORY; test_megatron_balance.py starts it. The reference is
torch's gradient of what transformers' routers say of every sample by itself.
"""

import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron_families import CONFIGS, build, gradients
from megatron_families_worker import loader, mine, shard, worst_named
from megatron_worker import join, run_under

from algorithms.data import TrainSample, float_row, int_row
from algorithms.losses import sft_loss
from algorithms.packing import pack
from bridge.families import family_of
from configs.schema import TrainerConfig
from tests.bridge.family_models import megatron_tensors

from megatron.core import parallel_state  # isort: skip

from actors.megatron_model import MegatronModel  # isort: skip
from actors.megatron_setup import shutdown_megatron  # isort: skip

AUX, Z = 0.3, 0.02
"""Large enough to be most of the routers' gradient, and a quarter of the whole."""
LENGTHS = (9, 4, 14, 5, 11, 3)
_EP = {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "one, recompute": {"recompute_granularity": "full"},
    "dp2-ep2": {"data_parallel_size": 2, **_EP},
    "tp2-sp-ep2": {"tensor_model_parallel_size": 2, "sequence_parallel": True, **_EP},
    "pp2": {"pipeline_model_parallel_size": 2},
    "cp2": {"context_parallel_size": 2},
}
PACKINGS: dict[str, tuple[dict[str, Any], bool]] = {
    "1": ({"micro_batch_size": 1}, False),
    "padded 2": ({"micro_batch_size": 2, "packing": False}, False),
    "20 tokens, other order": ({"micro_batch_tokens": 20}, True),
}
FAMILIES = {"one": ("qwen3_moe", "deepseek_v3"), "tp2-sp-ep2": ("qwen3_moe", "deepseek_v3")}
"""By layout; else the first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """Of one optimizer step."""

    loss: float
    metrics: dict[str, float]
    grads: dict[str, torch.Tensor]


def make_samples(vocab_size: int) -> list[TrainSample]:
    rng = np.random.default_rng(4)
    samples = []
    for size in LENGTHS:
        zeros = float_row(np.zeros(size))
        mask = int_row([0] * (size // 2) + [1] * (size - size // 2))
        tokens = int_row(rng.integers(0, vocab_size, size))
        samples.append(
            TrainSample(tokens=tokens, loss_mask=mask, advantages=zeros, logprobs=zeros, version=0)
        )
    return samples


def expected(model: Any, config: Any, samples: Sequence[TrainSample], aux: float, z: float) -> Expected:
    """Cross-entropy, E sum f P and z-loss over all samples, from transformers' logits and choices."""
    gates = [module for name, module in model.named_modules() if name.endswith(".mlp.gate")]
    said: dict[Any, list[Any]] = {gate: [] for gate in gates}
    hooks = [gate.register_forward_hook(lambda gate, _, output: said[gate].append(output)) for gate in gates]
    model.zero_grad()
    losses = []
    for sample in samples:
        ids = torch.tensor(sample.tokens, dtype=torch.int64)
        logprobs = torch.log_softmax(model(ids[None]).logits[0, :-1].float(), dim=-1)
        picked = logprobs.gather(1, ids[1:, None])[:, 0]
        losses.append(-(picked * torch.tensor(sample.loss_mask[1:])).sum())
    loss = torch.stack(losses).sum() / sum(sample.num_loss_tokens for sample in samples)
    balances, squares, loads = [], [], []
    for gate in gates:
        logits = torch.cat([output[0] for output in said[gate]]).float()
        chosen = torch.cat([output[2] for output in said[gate]])
        experts = logits.shape[1]
        share = torch.bincount(chosen.flatten(), minlength=experts) / chosen.numel()
        if hasattr(config, "scoring_func") or "deepseek" in config.model_type:
            scores = logits.sigmoid() / logits.sigmoid().sum(dim=1, keepdim=True)
        else:
            scores = logits.softmax(dim=1)
        balances.append(experts * (share * scores.mean(dim=0)).sum())
        squares.append(logits.logsumexp(dim=1).square().mean())
        loads.append(experts * share)
    for hook in hooks:
        hook.remove()
    (loss + aux * torch.stack(balances).sum() + z * torch.stack(squares).sum()).backward()
    return Expected(
        loss=float(loss.detach()),
        metrics={
            "moe/load_balancing_loss": float(torch.stack(balances).mean().detach()),
            "moe/z_loss": float(torch.stack(squares).mean().detach()),
            "moe/expert_load_max": float(torch.stack(loads).max()),
            "moe/expert_load_min": float(torch.stack(loads).min()),
        },
        grads=gradients(model, config),
    )


def measure(layout: str, family: str, aux: float, z: float) -> dict[str, Any]:
    """Errors of loss, metrics and gradient by way to pack."""
    config = copy.deepcopy(CONFIGS[family])
    values = config.to_dict()
    if "num_nextn_predict_layers" in values:
        config.num_nextn_predict_layers = 0
    reference = build(config)
    samples = make_samples(config.vocab_size)
    want = expected(reference, config, samples, aux, z)
    weights = megatron_tensors(reference, config)
    run = run_under(LAYOUTS[layout], False, clip_grad=0.0, moe_aux_loss_coeff=aux, moe_z_loss_coeff=z)
    model = MegatronModel(run, family_of(values).megatron(values), device="cpu", load=loader(weights))
    errors = {}
    for packing, (settings, is_reversed) in PACKINGS.items():
        loader(weights)(model.chunks)
        trainer = TrainerConfig.model_validate({**LAYOUTS[layout], **settings})
        batch = pack(samples[::-1] if is_reversed else samples, trainer)
        rows = batch.ranks[parallel_state.get_data_parallel_rank()]
        result = model.step(rows, batch.num_loss_tokens, sft_loss, 1.0)
        errors[packing] = {
            "loss": abs(result.loss - want.loss) / want.loss,
            "grads": worst_named(
                (name, p.main_grad, shard(name, want.grads)) for name, p in mine(model.chunks)
            ),
            "metrics": {
                name: abs(result.metrics[name] - value) / max(value, 1e-3)
                for name, value in want.metrics.items()
            },
        }
    return errors


def run_twice(layout: str) -> dict[str, Any]:
    """Whether the same two steps give the same bits in deterministic mode."""
    config = CONFIGS["qwen3_moe"]
    values, weights = config.to_dict(), megatron_tensors(build(config), config)
    run = run_under(LAYOUTS[layout], False, deterministic_mode=True, moe_aux_loss_coeff=AUX)
    batch = pack(make_samples(config.vocab_size), run.trainer)
    rows = batch.ranks[parallel_state.get_data_parallel_rank()]
    runs = []
    for _ in range(2):
        model = MegatronModel(run, family_of(values).megatron(values), device="cpu", load=loader(weights))
        steps = [model.step(rows, batch.num_loss_tokens, sft_loss, 1.0) for _ in range(2)]
        runs.append((steps, [p.detach().clone() for _, p in mine(model.chunks)]))
    (first, once), (second, again) = runs
    return {
        "enabled": torch.are_deterministic_algorithms_enabled(),
        "same_numbers": [step.numbers for step in first] == [step.numbers for step in second],
        "same_weights": all(torch.equal(one, other) for one, other in zip(once, again, strict=True)),
        "moved": any(
            not torch.equal(p, shard(name, weights))
            for p, (name, _) in zip(once, mine(model.chunks), strict=True)
        ),
    }


def main(rank: int, world_size: int, directory: Path) -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for layout, sizes in LAYOUTS.items():
        trainer = TrainerConfig.model_validate(sizes)
        if trainer.world_size != world_size:
            continue
        join(trainer, rank, world_size, directory / f"balance-{layout}")
        for family in FAMILIES.get(layout, ("qwen3_moe",)):
            results[f"{layout}/{family}"] = measure(layout, family, AUX, Z)
        if layout in ("one", "pp2"):
            results[f"{layout}/measured only"] = measure(layout, "qwen3_moe", 0.0, 0.0)
        shutdown_megatron()
        if layout in ("one", "tp2-sp-ep2"):
            strict = trainer.model_copy(update={"deterministic_mode": True})
            join(strict, rank, world_size, directory / f"strict-{layout}")
            torch.set_num_threads(2)
            results[f"{layout}/twice"] = run_twice(layout)
            torch.set_num_threads(1)
            shutdown_megatron()
    (directory / f"{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))

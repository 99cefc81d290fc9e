"""One rank of the tests of the loss as a contract: gradients however samples are packed, ordered and spread.

python megatron_contract_worker.py RANK WORLD_SIZE DIRECTORY; test_megatron_contract.py starts it. The gradient to
compare with is torch's, of transformers' model on every sample by itself.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron_contract_cases import LAYOUTS, LOSSES, PACKINGS, losses_of, packings_of
from megatron_worker import grads_of, join, loader, mine, run_under, worst
from megatron_worker_reference import TEMPERATURE, build_reference

from algorithms.data import TrainSample, float_row, int_row
from algorithms.distillation import distillation_advantages
from algorithms.experience import scaling
from algorithms.losses import sft_loss
from algorithms.packing import Scaling, pack
from algorithms.policy_loss import policy_loss
from algorithms.roles import Predictions, TokenLoss
from bridge.families import family_of
from configs.grpo import GRPOConfig
from configs.schema import TrainerConfig

from megatron.core import parallel_state  # isort: skip

from actors.megatron_model import MegatronModel  # isort: skip
from actors.megatron_setup import shutdown_megatron  # isort: skip

LENGTHS = ((3, 6), (1, 3), (5, 9), (2, 2), (4, 7), (2, 5), (6, 1))
"""Tokens of prompt and completion."""


def make_samples(model: torch.nn.Module, vocab_size: int) -> list[TrainSample]:
    """Samples whose engine, old and reference log-probabilities are near those of the model."""
    rng = np.random.default_rng(3)
    samples = []
    for prompt, completion in LENGTHS:
        size = prompt + completion
        tokens = int_row(rng.integers(0, vocab_size, size))
        mask = int_row([0] * prompt + [1] * completion)
        with torch.no_grad():
            near = reference_predictions(model, tokens)
        near_T = np.append(0.0, near.logprobs_T.numpy())

        def noisy(spread: float, near_T: np.ndarray = near_T) -> Any:
            return float_row(near_T + spread * rng.normal(size=near_T.size))

        samples.append(
            TrainSample(
                tokens=tokens,
                loss_mask=mask,
                advantages=float_row(mask * rng.normal()),
                logprobs=noisy(0.4),
                version=0,
                old_logprobs=noisy(0.2),
                ref_logprobs=noisy(0.5),
                policy_mask=int_row(mask * (rng.random(size) < 0.7)),
            )
        )
    return samples


def taught(sample: TrainSample, coefficient: float) -> TrainSample:
    """With the word of a teacher, which is what is the reference in other cases."""
    assert sample.old_logprobs is not None
    assert sample.ref_logprobs is not None
    added = distillation_advantages(sample, sample.old_logprobs, sample.ref_logprobs, coefficient)
    return replace(sample, advantages=float_row(sample.advantages + added))


def reference_predictions(model: torch.nn.Module, tokens: np.ndarray) -> Predictions:
    """Log-probabilities and entropies, without the place after the last token."""
    ids = torch.tensor(tokens, dtype=torch.int64)
    logits = model(ids[None]).logits[0, :-1].float() / TEMPERATURE
    distribution = torch.log_softmax(logits, dim=-1)
    return Predictions(
        logprobs_T=distribution.gather(1, ids[1:, None])[:, 0],
        entropy_T=-(distribution.exp() * distribution).sum(dim=-1),
    )


def reference_gradient(
    model: torch.nn.Module, samples: Sequence[TrainSample], loss: TokenLoss, scale: Scaling
) -> float:
    """Leaves the gradient in the model; returns the loss."""
    model.zero_grad()
    total = torch.zeros(())
    for sample in samples:
        found = reference_predictions(model, sample.tokens)
        padded = Predictions(
            logprobs_T=torch.cat([found.logprobs_T, torch.zeros(1)]),
            entropy_T=torch.cat([found.entropy_T, torch.zeros(1)]),
        )
        (micro,) = pack([sample], TrainerConfig(), scale).ranks[0]
        total = total + loss(padded, micro)[0] / scale.denominator
    total.backward()
    return float(total.detach())


def loss_and_scale(name: str, samples: Sequence[TrainSample]) -> tuple[TokenLoss, Scaling]:
    tokens = sum(sample.num_loss_tokens for sample in samples)
    if name == "sft":
        return sft_loss, Scaling(per="token", denominator=tokens)
    settings = GRPOConfig.model_validate(LOSSES[name])
    return policy_loss(settings), scaling(samples, tokens, settings)


def measure(reference: Any, model: MegatronModel, layout: str, name: str) -> dict[str, Any]:
    """Errors of loss and gradient, the largest over all ways to pack the samples."""
    samples = make_samples(reference, reference.config.vocab_size)
    if name == "distillation":
        samples = [taught(sample, LOSSES[name]["teacher_kl_coef"]) for sample in samples]
    loss, scale = loss_and_scale(name, samples)
    want = reference_gradient(reference, samples, loss, scale)
    grads = grads_of(reference)
    replica = parallel_state.get_data_parallel_rank()
    errors = {}
    for packing in packings_of(layout):
        settings, is_reversed = PACKINGS[packing]
        loader(reference)(model.chunks)
        trainer = TrainerConfig.model_validate({**LAYOUTS[layout], **settings})
        batch = pack(samples[::-1] if is_reversed else samples, trainer, scale)
        result = model.step(batch.ranks[replica], batch.num_loss_tokens, loss, TEMPERATURE, batch.denominator)
        got = worst((p.main_grad, grads[name]) for name, p in mine(model.chunks))
        errors[packing] = {"loss": abs(result.loss - want) / abs(want), "grads": got}
    return errors


def main(rank: int, world_size: int, directory: Path) -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for layout, sizes in LAYOUTS.items():
        run = run_under(sizes, False, clip_grad=0.0)
        if run.trainer.world_size != world_size:
            continue
        join(run.trainer, rank, world_size, directory / f"contract-{layout}")
        reference = build_reference("qwen3")
        config = reference.config.to_dict()
        spec = family_of(config).megatron(config)
        model = MegatronModel(run, spec, device="cpu", load=loader(reference))
        every = partial(measure, reference, model, layout)
        results |= {f"{layout}/{name}": every(name) for name in losses_of(layout)}
        shutdown_megatron()
    (directory / f"{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))

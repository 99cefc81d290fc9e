"""One rank of the GKD tests: steps of a student towards a teacher on real Megatron ranks, against transformers.

python megatron_gkd_worker.py RANK WORLD_SIZE DIRECTORY; test_megatron_gkd.py starts it and judges.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gkd_reference
import torch
import transformers
from megatron_worker import join, loader, mine, run_under, split_rows, weights_of, worst
from megatron_worker_reference import (
    build_reference,
    make_optimizer,
    make_sequences,
    num_loss_tokens,
)

from actors import megatron_cpu
from algorithms.data import MicroBatch
from algorithms.losses import gkd_loss
from bridge.families import family_of
from configs.gkd import GKDConfig

megatron_cpu.install()

from megatron.core import parallel_state  # noqa: E402

from actors.megatron_divergence import vocab_parallel_divergence  # noqa: E402
from actors.megatron_model import FrozenModel, MegatronModel, tensor_parallel_group  # noqa: E402
from actors.megatron_setup import shutdown_megatron  # noqa: E402
from actors.megatron_teacher import MegatronTeacher, ScoringTeacher  # noqa: E402
from actors.megatron_topk import topk_divergence, vocab_parallel_topk  # noqa: E402

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2-sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "tp2": {"tensor_model_parallel_size": 2},
    "dp2": {"data_parallel_size": 2},
    "cp2": {"context_parallel_size": 2},
}
SETTINGS: dict[str, dict[str, Any]] = {
    **{f"beta {beta:g}": {"beta": beta} for beta in gkd_reference.BETAS},
    "temperature": {"beta": 0.5, "temperature": 0.7, "loss_temperature": "same"},
    "topk": {"beta": 0.5, "gkd_logits_topk": 5, "temperature": 0.7, "loss_temperature": "same"},
    "tail": {"beta": 0.9, "gkd_logits_topk": 5, "gkd_topk_tail": True},
    "offload": {"beta": 0.0, "sft_alpha": 0.3},
}
CASES = {
    "tp2-sp": tuple(SETTINGS),
    "pp2": ("beta 0", "beta 0.5", "beta 1", "topk", "offload"),
    "tp2": ("beta 0.5", "offload"),
    "dp2": ("beta 0.5",),
    "cp2": ("beta 0.5", "tail", "offload"),
}
CLIP_GRAD = 0.05
VOCABULARY = 131


def build_teacher() -> transformers.PreTrainedModel:
    """Another size than the student, an output layer of its own, and a vocabulary padded to another size."""
    torch.manual_seed(11)
    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY + 10,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        initializer_range=0.15,
        tie_word_embeddings=True,
    )
    return transformers.Qwen3ForCausalLM(config).eval()


def spec_of(reference: transformers.PreTrainedModel) -> Any:
    return family_of(reference.config.to_dict()).megatron(reference.config.to_dict())


def reference_terms(
    student: Any, teacher: Any, row: MicroBatch, settings: GKDConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over the loss tokens of one unpacked sequence: of the loss, and of the divergence."""
    tokens, mask = torch.tensor(row.tokens_T)[None].long(), torch.tensor(row.loss_mask_T).double()
    student_TV = student(tokens).logits[0][:, :VOCABULARY]
    with torch.no_grad():
        teacher_TV = teacher(tokens).logits[0][:, :VOCABULARY]
    temperature = settings.divergence_temperature
    if settings.gkd_logits_topk is None:
        divergence_T = gkd_reference.of_logits(student_TV, teacher_TV, settings.beta, temperature)
    else:
        ids_TK = teacher_TV.topk(settings.gkd_logits_topk).indices
        divergence_T = gkd_reference.of_topk(
            student_TV, teacher_TV, ids_TK, settings.beta, temperature, tail=settings.gkd_topk_tail
        )
    labels = torch.tensor(row.labels_T).long()
    logprobs_T = torch.log_softmax(student_TV / temperature, -1).gather(1, labels[:, None])[:, 0]
    extra_T = -settings.sft_alpha * torch.tensor(row.advantages_T) * logprobs_T
    return ((divergence_T + extra_T) * mask).sum(), (divergence_T * mask).sum().detach()


def run_step(layout: str, name: str) -> dict[str, Any]:
    """Errors of one optimizer step: loss, divergence, norm of the gradient, weights."""
    settings = GKDConfig.model_validate(SETTINGS[name])
    student, teacher = build_reference("qwen3"), build_teacher()
    run = run_under(LAYOUTS[layout], False, clip_grad=CLIP_GRAD)
    model = MegatronModel(run, spec_of(student), device="cpu", load=loader(student))
    frozen = FrozenModel(run.trainer, torch.float32, spec_of(teacher), device="cpu", load=loader(teacher))
    against = MegatronTeacher(frozen, settings, VOCABULARY, offload=name == "offload")
    rows = make_sequences(VOCABULARY)
    batches, _ = split_rows(rows, 2 if parallel_state.get_data_parallel_world_size() == 1 else 1)

    against.look_at(batches)
    count = num_loss_tokens(rows)
    temperature = settings.divergence_temperature
    got = model.step(
        batches, count, gkd_loss(settings), temperature, float(count), divergence=against.divergence
    )

    optimizer = make_optimizer(student)
    sums = [reference_terms(student, teacher, row, settings) for row in rows]
    loss = torch.stack([each[0] for each in sums]).sum() / count
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP_GRAD)
    optimizer.step()
    want = {
        "loss": float(loss),
        "divergence": float(sum(each[1] for each in sums)) / count,
        "grad_norm": float(norm),
    }
    found = {"loss": got.loss, "divergence": got.metrics["divergence"], "grad_norm": got.grad_norm}
    weights = weights_of(student)
    return {key: abs(found[key] / want[key] - 1) for key in want} | {
        "weights": worst((parameter.detach(), weights[key]) for key, parameter in mine(model.chunks)),
    }


def run_scoring(layout: str) -> dict[str, float]:
    """Error of the log-probabilities of labels under a teacher that is offloaded, asked twice."""
    teacher, trainer = build_teacher(), run_under(LAYOUTS[layout], False).trainer
    frozen = FrozenModel(trainer, torch.float32, spec_of(teacher), device="cpu", load=loader(teacher))
    scoring = ScoringTeacher(frozen, offload=True)
    batches, groups = split_rows(make_sequences(VOCABULARY), 2)
    scoring.logprobs(batches, 0.7)
    errors = [0.0]
    for group, got in zip(groups, scoring.logprobs(batches, 0.7) or (), strict=False):
        wanted: list[torch.Tensor] = []
        for row in group:
            with torch.no_grad():
                logits = teacher(torch.tensor(row.tokens_T)[None].long()).logits[0]
            labels = torch.tensor(row.labels_T).long()[:, None]
            wanted.append(torch.log_softmax(logits / 0.7, -1).gather(1, labels)[:, 0])
        want = torch.cat(wanted)
        errors.append(float((torch.tensor(got[: len(want)]) - want).abs().max()))
    return {
        "logprobs": max(errors),
        "rows": float(parallel_state.is_pipeline_last_stage() != (len(errors) > 1)),
    }


def run_split_vocabulary(beta: float) -> dict[str, float]:
    """Errors of both divergences, and their gradients, with a vocabulary of which rank 1 has padding."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 40, generator=generator) * 2 for _ in range(2))
    weights = torch.randn(6, generator=generator)
    rank, errors = parallel_state.get_tensor_model_parallel_rank(), {}
    share = slice(rank * 20, rank * 20 + 20)
    options = {"beta": beta, "vocab_size": 37, "group": tensor_parallel_group(), "temperature": 0.9}
    whole = student[:, :37].clone().requires_grad_()
    ids, logprobs = vocab_parallel_topk(teacher[:, share], 25, vocab_size=37, group=tensor_parallel_group())
    cases = {
        "whole": (
            lambda logits: vocab_parallel_divergence(logits, teacher[:, share], **options),
            gkd_reference.of_logits(whole, teacher[:, :37], beta, 0.9),
        ),
        "topk": (
            lambda logits: topk_divergence(logits, ids, logprobs, **options),
            gkd_reference.of_topk(whole, teacher[:, :37], ids, beta, 0.9, tail=False),
        ),
    }
    for name, (compute, want) in cases.items():
        logits = student[:, share].clone().requires_grad_()
        got = compute(logits)
        (got_grad,) = torch.autograd.grad((got * weights).sum(), logits)
        (want_grad,) = torch.autograd.grad((want * weights).sum(), whole)
        padded = torch.nn.functional.pad(want_grad, (0, 3))[:, share]
        errors[name] = float((got - want).abs().max())
        errors[f"{name} gradient"] = float((got_grad - padded).abs().max())
    return errors


def cases_of(layout: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in CASES[layout]:
        yield f"{layout}/{name}", run_step(layout, name)
    if layout in ("tp2-sp", "pp2"):
        yield f"{layout}/scoring", run_scoring(layout)
    if layout == "tp2":
        for beta in gkd_reference.BETAS:
            yield f"split/{beta:g}", run_split_vocabulary(beta)


def main(rank: int, world_size: int, directory: Path) -> None:
    torch.set_num_threads(1)
    results: dict[str, dict[str, Any]] = {}
    for layout, sizes in LAYOUTS.items():
        join(run_under(sizes, False).trainer, rank, world_size, directory / layout)
        results |= cases_of(layout)
        shutdown_megatron()
    (directory / f"{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))

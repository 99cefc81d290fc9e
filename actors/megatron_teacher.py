"""A teacher in the trainer ranks: its distribution at every token of a step, one micro-batch at a time.

On a machine without CUDA, actors.megatron_cpu.install() must have run before this module is imported.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from actors.megatron_context import ContextShare
from actors.megatron_divergence import aligned, vocab_parallel_divergence
from actors.megatron_model import FrozenModel, MegatronModel, tensor_parallel_group
from actors.megatron_topk import topk_divergence, vocab_parallel_topk
from algorithms.data import FloatRow, MicroBatch
from configs.gkd import GKDConfig

Kept = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""What the last stage remembers of a micro-batch: hidden states, or ids and log-probabilities of k tokens."""


class MegatronTeacher:
    """A frozen model in the student's layout, and the divergence of the student from it.

    Before a step it runs its own forward pass over all micro-batches and keeps the last hidden states, in the
    model's type: T x hidden / TP with sequence parallelism, T x hidden without. The student's step turns those
    of one micro-batch at a time into logits. With `gkd_logits_topk` the logits are made at once and only k
    tokens of them are kept. So the teacher's layers are needed before a step only, and pipeline stages work as
    in any forward pass; the logits of a whole step exist nowhere.
    """

    def __init__(self, model: FrozenModel, settings: GKDConfig, vocab_size: int, *, offload: bool) -> None:
        """`vocab_size` is the student's; where the teacher has fewer or more, those that both have count. With
        `offload` its weights are in host memory but for its own forward pass."""
        self._model = model
        self._settings = settings
        self._vocab_size = min(vocab_size, model.spec.vocab_size)
        self._kept: dict[int, Kept] = {}
        self._head = model.chunks[-1] if model.chunks[-1].post_process else None
        if self._head is not None:
            # Megatron then returns the hidden states that it would have put into the output layer.
            self._head.post_process = False
        self._host = _host_copies(model.chunks, self._head) if offload else []

    def look_at(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Run the teacher over the micro-batches of a step. Every rank must call it."""

        def finish(share: ContextShare, output: torch.Tensor) -> tuple[torch.Tensor, Kept]:
            return output.new_zeros(()), self._topk(output) if self._settings.gkd_logits_topk else output

        with _on_device(self._host, self._model.device):
            results = self._model.evaluate(micro_batches, finish)
        self._kept = {
            id(batch): kept for batch, kept in zip(micro_batches, results or (), strict=results is not None)
        }

    def divergence(self, share: ContextShare, student_TV: torch.Tensor) -> torch.Tensor:
        """Float32 [L] for a micro-batch that the teacher has looked at, once, on the last stage.

        `student_TV` is this tensor- and context-parallel rank's part of the student's logits.
        """
        kept = self._kept.pop(id(share.batch))
        settings, group = self._settings, tensor_parallel_group()
        if isinstance(kept, tuple):
            return topk_divergence(
                student_TV,
                *kept,
                beta=settings.beta,
                temperature=settings.divergence_temperature,
                vocab_size=self._vocab_size,
                group=group,
                tail=settings.gkd_topk_tail,
            )
        return vocab_parallel_divergence(
            student_TV,
            aligned(self._logits(kept), student_TV.shape[1], self._vocab_size, group),
            beta=settings.beta,
            temperature=settings.divergence_temperature,
            vocab_size=self._vocab_size,
            group=group,
        )

    def _topk(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k = self._settings.gkd_logits_topk
        assert k is not None, "only asked for with it"
        return vocab_parallel_topk(
            self._logits(hidden), k, vocab_size=self._vocab_size, group=tensor_parallel_group()
        )

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """This rank's share [T, V / TP] of the logits for hidden states [T, 1, hidden] (T / TP if split)."""
        chunk = self._head
        assert chunk is not None, "only the last stage has hidden states"
        tied = chunk.share_embeddings_and_output_weights
        weight = chunk.shared_embedding_or_output_weight() if tied else None
        with torch.no_grad():
            logits, _ = chunk.output_layer(hidden, weight=weight)
        return logits[:, 0]


class GivenTeacher:
    """A teacher that was asked elsewhere: its likeliest tokens come with the micro-batches."""

    def __init__(self, settings: GKDConfig, vocab_size: int) -> None:
        """`vocab_size` is the student's."""
        self._settings = settings
        self._vocab_size = vocab_size

    def look_at(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Nothing is left to do."""

    def divergence(self, share: ContextShare, student_TV: torch.Tensor) -> torch.Tensor:
        """As MegatronTeacher.divergence."""
        ids_TK, logprobs_TK = share.batch.teacher_ids_TK, share.batch.teacher_logprobs_TK
        assert ids_TK is not None, "the batch has what the teacher said"
        assert logprobs_TK is not None, "and how likely"
        return topk_divergence(
            student_TV,
            torch.tensor(share.mine(ids_TK), dtype=torch.int64, device=student_TV.device),
            torch.tensor(share.mine(logprobs_TK), device=student_TV.device),
            beta=self._settings.beta,
            temperature=self._settings.divergence_temperature,
            vocab_size=self._vocab_size,
            group=tensor_parallel_group(),
            tail=self._settings.gkd_topk_tail,
        )


class ScoringTeacher:
    """A frozen model in the policy's layout that is asked about the tokens that are there alone."""

    def __init__(self, model: FrozenModel, *, offload: bool) -> None:
        """With `offload` its weights are in host memory but for its own forward pass."""
        self._model = model
        self._host = _host_copies(model.chunks, None) if offload else []

    def logprobs(self, micro_batches: Sequence[MicroBatch], temperature: float) -> list[FloatRow] | None:
        """Of the labels, float32 [T] each; None off the last stage. Every rank must call it."""
        with _on_device(self._host, self._model.device):
            return self._model.logprobs(micro_batches, temperature)


Teacher = MegatronTeacher | GivenTeacher


def divergences(
    teacher: Teacher, student: MegatronModel, micro_batches: Sequence[MicroBatch]
) -> list[FloatRow] | None:
    """Divergence of the student as it is at each token, float32 [T] each; None off the last stage."""
    teacher.look_at(micro_batches)
    return student.rows(micro_batches, lambda share, output: teacher.divergence(share, output[0]))


def _host_copies(
    chunks: Sequence[GPTModel], head: GPTModel | None
) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Parameters and what they hold between uses: host memory. The head is needed in between and stays."""
    kept = set()
    if head is not None:
        modules: list[Any] = [head.output_layer]
        if head.pre_process and head.share_embeddings_and_output_weights:
            modules.append(head.embedding.word_embeddings)
        kept = {parameter for module in modules for parameter in module.parameters()}
    pairs = [
        (parameter, _host_copy(parameter))
        for chunk in chunks
        for parameter in chunk.parameters()
        if parameter not in kept
    ]
    for parameter, host in pairs:
        parameter.data = host
    return pairs


def _host_copy(parameter: torch.nn.Parameter) -> torch.Tensor:
    copy = parameter.detach().cpu()
    # Pinned memory makes the way back several times faster; a model on a CPU is there already.
    return copy.pin_memory() if parameter.is_cuda else copy


@contextmanager
def _on_device(
    pairs: Sequence[tuple[torch.nn.Parameter, torch.Tensor]], device: torch.device
) -> Generator[None]:
    for parameter, host in pairs:
        parameter.data = host.to(device, non_blocking=True)
    try:
        yield
    finally:
        for parameter, host in pairs:
            parameter.data = host

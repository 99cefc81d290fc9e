"""The model of one trainer rank: optimizer step and log-probabilities. No Ray here.

On a machine without CUDA, actors.megatron_cpu.install() must have run before this module is imported.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

from actors.megatron_logprobs import vocab_parallel_logprobs
from actors.megatron_lora import adapters_off, sum_expert_gradients
from actors.megatron_setup import Device, build_chunks, optimizer_config, scheduler, transformer_config
from algorithms.data import FloatRow, MicroBatch, StepResult, float_row
from algorithms.roles import Predictions, TokenLoss
from bridge.fit import check_layout
from bridge.plan import TORCH_DTYPES
from bridge.rules import MegatronSpec
from configs.errors import BasculeError
from configs.schema import LayoutConfig, RunConfig

Load = Callable[[list[torch.nn.Module]], None]
Adapt = Callable[[list[torch.nn.Module]], None]
Finish = Callable[[MicroBatch, torch.Tensor], tuple[torch.Tensor, Any]]
Row = Callable[[MicroBatch, torch.Tensor], torch.Tensor]
"""(micro-batch, the last stage's output [1, T, V / TP]) -> float32 [T]."""
Divergence = Callable[[MicroBatch, torch.Tensor], torch.Tensor]
"""(micro-batch, this rank's share [T, V / TP] of its logits) -> divergence [T] from a teacher."""


class StepFailedError(BasculeError):
    """An optimizer step was not applied: loss or gradient not finite. The weights are as before the step."""


class FrozenModel:
    """This rank's part of a model, for log-probabilities only: a reference, or the inside of MegatronModel.

    Parameters are of `dtype`. `load` gets the chunks, one for each virtual pipeline stage of this rank, and
    has to fill every parameter; then `adapt` gets them, to attach and fill adapters. With `mtp` the
    multi-token-prediction layers are there too, to be converted. Raises ConfigError when the model does not
    fit the parallel layout.
    """

    def __init__(
        self,
        layout: LayoutConfig,
        dtype: torch.dtype,
        spec: MegatronSpec,
        *,
        device: Device,
        load: Load,
        adapt: Adapt | None = None,
        mtp: bool = False,
    ) -> None:
        check_layout(spec, layout, training=False)
        self.spec = spec
        self.device = torch.device(device)
        self.config = transformer_config(layout, dtype, spec, device)
        self.chunks = build_chunks(self.config, spec, mtp)
        load(list(self.chunks))
        if adapt is not None:
            adapt(list(self.chunks))

    def logprobs(self, micro_batches: Sequence[MicroBatch], temperature: float) -> list[FloatRow] | None:
        """Log-probability of `labels_T` for every micro-batch, float32 [T] each; None off the last stage.

        Every rank must call it, with as many micro-batches as its pipeline neighbours.
        """
        return self.rows(
            micro_batches, lambda batch, output: self.predictions(batch, output, temperature).logprobs_T
        )

    def entropies(self, micro_batches: Sequence[MicroBatch], temperature: float) -> list[FloatRow] | None:
        """As `logprobs`, the entropy over the vocabulary at each token in nats."""
        return self.rows(
            micro_batches, lambda batch, output: self.predictions(batch, output, temperature).entropy_T
        )

    def rows(self, micro_batches: Sequence[MicroBatch], of: Row) -> list[FloatRow] | None:
        """As `logprobs`, what `of` says of each micro-batch and the last stage's output for it."""

        def finish(batch: MicroBatch, output: torch.Tensor) -> tuple[torch.Tensor, FloatRow]:
            return output.new_zeros(()), float_row(of(batch, output).cpu().numpy())

        return self.evaluate(micro_batches, finish)

    def logits(self, micro_batches: Sequence[MicroBatch]) -> list[torch.Tensor] | None:
        """Logits [T, V] of every micro-batch in the model's own type; None off the last stage.

        Every tensor-parallel rank gets all of them: meant for small inputs.
        """

        def finish(batch: MicroBatch, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            group = tensor_parallel_group()
            parts = [torch.empty_like(output[0]) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, output[0].contiguous(), group=group)
            return output.new_zeros(()), torch.cat(parts, dim=1)[:, : self.spec.vocab_size]

        return self.evaluate(micro_batches, finish)

    def move_towards(self, chunks: Sequence[torch.nn.Module], share: float) -> None:
        """Let each parameter be `share` of the one in `chunks`, of the same layout, and the rest as before."""
        with torch.no_grad():
            for mine, theirs in zip(self.chunks, chunks, strict=True):
                for old, new in zip(mine.parameters(), theirs.parameters(), strict=True):
                    # In float32: bfloat16 would lose small differences.
                    old.copy_(old.float().lerp_(new.float(), share))

    def evaluate(self, micro_batches: Sequence[MicroBatch], finish: Finish) -> list[Any] | None:
        """What `finish` gave per micro-batch, without gradients; None off the last stage."""
        for chunk in self.chunks:
            chunk.eval()
        with torch.no_grad():
            results = self.run_schedule(self.chunks, micro_batches, finish, forward_only=True)
        return results if parallel_state.is_pipeline_last_stage() else None

    def predictions(self, batch: MicroBatch, output: torch.Tensor, temperature: float) -> Predictions:
        """What the last stage's `output` [1, T, V / TP] says of the labels."""
        logprobs_T, entropy_T = vocab_parallel_logprobs(
            output[0],
            self._tensor(batch.labels_T),
            temperature=temperature,
            vocab_size=self.spec.vocab_size,
            group=tensor_parallel_group(),
        )
        return Predictions(logprobs_T=logprobs_T, entropy_T=entropy_T)

    def run_schedule(
        self,
        models: Sequence[torch.nn.Module],
        micro_batches: Sequence[MicroBatch],
        finish: Finish,
        *,
        forward_only: bool,
    ) -> list[Any]:
        """Run Megatron's pipeline schedule. Returns what `finish` gave per micro-batch, on the last stage.

        `finish` turns a micro-batch and its logits into a loss and a result; it is called on the last stage.
        """
        # The interleaved schedule wants a multiple of the pipeline size. Whatever fills it up has no loss.
        interleaved = self.config.virtual_pipeline_model_parallel_size is not None
        missing = -len(micro_batches) % self.config.pipeline_model_parallel_size if interleaved else 0
        batches = [(batch, finish) for batch in micro_batches]
        batches += [(micro_batches[-1], _no_loss)] * missing

        def forward_step(rest: Iterator[tuple[MicroBatch, Finish]], model: torch.nn.Module) -> Any:
            batch, last = next(rest)
            return self._forward(batch, model), partial(_finish_without_tokens, last, batch)

        iterators = [iter(batches) for _ in models]
        results = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if interleaved else iterators[0],
            model=list(models),
            num_microbatches=len(batches),
            seq_length=_row_length(micro_batches, self.config),
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return results[: len(micro_batches)]

    def _forward(self, batch: MicroBatch, model: torch.nn.Module) -> torch.Tensor:
        starts = self._tensor(batch.starts_S).int()
        longest = int(np.diff(batch.starts_S).max())
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=starts,
            cu_seqlens_kv=starts,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        tokens, positions = self._tensor(batch.tokens_T)[None], self._tensor(batch.positions_T)[None]
        return model(tokens, positions, None, packed_seq_params=packed)

    def _tensor(self, row: np.ndarray) -> torch.Tensor:
        return torch.tensor(row, dtype=torch.int64, device=self.device)


class MegatronModel:
    """This rank's part of the policy, with its gradients, optimizer and learning-rate schedule.

    `load` gets the bare chunks and has to fill every parameter, then `adapt` may attach adapters; both run
    before the optimizer takes its float32 copies. Only parameters that require a gradient have one, and
    optimizer state. Raises ConfigError when the model does not fit the parallel layout.
    """

    def __init__(
        self,
        run: RunConfig,
        spec: MegatronSpec,
        *,
        device: Device,
        load: Load,
        adapt: Adapt | None = None,
    ) -> None:
        check_layout(spec, run.trainer)
        dtype = TORCH_DTYPES[run.model.torch_dtype]
        self._model = FrozenModel(run.trainer, dtype, spec, device=device, load=load, adapt=adapt)
        config = self._model.config
        config.finalize_model_grads_func = _finalize_gradients
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=run.trainer.use_distributed_optimizer,
            overlap_grad_reduce=False,
        )
        _let_gradients_begin(self.chunks, config)
        self._wrapped = [DistributedDataParallel(config, ddp_config, chunk) for chunk in self.chunks]
        # Declared as its base class; it is a ChainedOptimizer.
        self.optimizer: Any = get_megatron_optimizer(optimizer_config(run), list(self._wrapped))
        self.scheduler = scheduler(self.optimizer, run)
        self._clip_grad = run.trainer.clip_grad

    @property
    def chunks(self) -> list[GPTModel]:
        """The bare Megatron modules of this rank, which hold the live weights."""
        return self._model.chunks

    def logprobs(self, micro_batches: Sequence[MicroBatch], temperature: float) -> list[FloatRow] | None:
        """As FrozenModel.logprobs, under the current weights."""
        return self._model.logprobs(micro_batches, temperature)

    def base_logprobs(self, micro_batches: Sequence[MicroBatch], temperature: float) -> list[FloatRow] | None:
        """As FrozenModel.logprobs, of the base model: as if no adapters were attached."""
        with adapters_off(self.chunks):
            return self._model.logprobs(micro_batches, temperature)

    def entropies(self, micro_batches: Sequence[MicroBatch], temperature: float) -> list[FloatRow] | None:
        """As FrozenModel.entropies, under the current weights."""
        return self._model.entropies(micro_batches, temperature)

    def rows(self, micro_batches: Sequence[MicroBatch], of: Row) -> list[FloatRow] | None:
        """As FrozenModel.rows, under the current weights."""
        return self._model.rows(micro_batches, of)

    def step(
        self,
        micro_batches: Sequence[MicroBatch],
        num_loss_tokens: int,
        loss: TokenLoss,
        temperature: float,
        denominator: float | None = None,
        divergence: Divergence | None = None,
    ) -> StepResult:
        """One optimizer step on this data-parallel rank's `micro_batches`; the same result on every rank.

        The loss is the sum of `loss` over the micro-batches of all data-parallel ranks, over `denominator`
        (by default `num_loss_tokens`); metrics, which must have the same names for every micro-batch, are
        sums over `num_loss_tokens`. The gradient is of exactly that loss, whatever the layout. `grad_norm` is
        its norm before clipping, `learning_rate` the one that was applied. `divergence` is asked once for each
        micro-batch, on the last stage. Raises StepFailedError, on every rank and before any weight changes,
        when loss or gradient is not finite.
        """
        denominator = float(num_loss_tokens) if denominator is None else denominator
        number = self.scheduler.num_steps
        if num_loss_tokens < 1:
            raise BasculeError(
                f"optimizer step {number}: num_loss_tokens is {num_loss_tokens}, nothing to learn"
            )
        for chunk in self._wrapped:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        finish = partial(self._token_loss, loss, denominator, temperature, divergence)
        parts = self._model.run_schedule(self._wrapped, micro_batches, finish, forward_only=False)
        means = _reduce_sums(parts, self._model.device, num_loss_tokens, denominator)
        _check_finite(number, "loss", means["loss"])
        grad_norm = self._apply_gradients(number)
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        self.scheduler.step(increment=1)
        return StepResult(
            loss=means.pop("loss"), grad_norm=grad_norm, learning_rate=learning_rate, metrics=means
        )

    def _token_loss(
        self,
        loss: TokenLoss,
        denominator: float,
        temperature: float,
        divergence: Divergence | None,
        batch: MicroBatch,
        output: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        predictions = self._model.predictions(batch, output, temperature)
        if divergence is not None:
            predictions = replace(predictions, divergence_T=divergence(batch, output[0]))
        total, metrics = loss(predictions, batch)
        # Divided before the backward pass, so that gradients are summed at their final size.
        return total / denominator, {"loss": total.detach(), **metrics}

    def _apply_gradients(self, number: int) -> float:
        # Megatron's optimizer.step() is these calls; between them is the only chance to stop in time.
        self.optimizer.prepare_grads()
        grad_norm = self.optimizer.get_grad_norm()
        _check_finite(number, "gradient norm", grad_norm)
        if self._clip_grad > 0:
            for optimizer in self.optimizer.chained_optimizers:
                clip_grad_by_total_norm_fp32(optimizer.get_parameters(), self._clip_grad, grad_norm)
        if not self.optimizer.step_with_ready_grads():
            raise StepFailedError(f"optimizer step {number}: Megatron's optimizer refused the gradients")
        return grad_norm


def _let_gradients_begin(chunks: Sequence[GPTModel], config: TransformerConfig) -> None:
    """Ask for a gradient of frozen embeddings: a recomputed layer has one only where its input does."""
    if config.recompute_granularity != "full":
        return
    for chunk in chunks:
        if chunk.pre_process and not any(p.requires_grad for p in chunk.embedding.parameters()):
            chunk.embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())


def _finalize_gradients(model: list[torch.nn.Module], num_tokens: torch.Tensor, **groups: Any) -> None:
    sum_expert_gradients(model)
    # Without the number of tokens Megatron reduces gradients but does not divide them a second time.
    finalize_model_grads(model, None, **groups)


def _no_loss(batch: MicroBatch, output: torch.Tensor) -> tuple[torch.Tensor, None]:
    return output.sum() * 0.0, None


def _finish_without_tokens(
    finish: Finish, batch: MicroBatch, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    loss, result = finish(batch, output)
    # Only a triple keeps the schedule from dividing by the number of micro-batches; its count is not used.
    return loss, torch.zeros((), dtype=torch.int, device=output.device), result


def _row_length(micro_batches: Sequence[MicroBatch], config: TransformerConfig) -> int:
    lengths = {len(batch.tokens_T) for batch in micro_batches}
    if len(lengths) != 1:
        raise BasculeError(f"micro-batches have rows of {sorted(lengths)} tokens; pack them to one length")
    (length,) = lengths
    parts = config.tensor_model_parallel_size if config.sequence_parallel else 1
    if length % parts:
        raise BasculeError(
            f"rows of {length} tokens do not split over {parts} sequence-parallel ranks; "
            f"pack them to a multiple of tensor_model_parallel_size"
        )
    return length


def _reduce_sums(
    parts: Sequence[Mapping[str, torch.Tensor]],
    device: torch.device,
    num_loss_tokens: int,
    denominator: float,
) -> dict[str, float]:
    means: dict[str, float] = {}
    if parallel_state.is_pipeline_last_stage():
        names = sorted(parts[0])
        values = [sum(float(part[name]) for part in parts) for name in names]
        sums = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        means = dict(zip(names, (sums / num_loss_tokens).tolist(), strict=True))
        means["loss"] *= num_loss_tokens / denominator
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        box = [means]
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast_object_list(box, src=last, group=_pipeline_parallel_group())
        means = box[0]
    return means


def tensor_parallel_group() -> Any:
    """The process group over which this rank's vocabulary is split."""
    # Declared as if a group might be an int.
    return parallel_state.get_tensor_model_parallel_group()


def _pipeline_parallel_group() -> Any:
    return parallel_state.get_pipeline_model_parallel_group()


def _check_finite(number: int, what: str, value: float) -> None:
    if not math.isfinite(value):
        raise StepFailedError(
            f"optimizer step {number}: the {what} is {value}; the step was not applied. Look at the rewards "
            "and log-probabilities of this step, and consider a lower trainer.lr"
        )

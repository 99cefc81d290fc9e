"""The model of one trainer rank: optimizer step and log-probabilities. No Ray here.

On a machine without CUDA, actors.megatron_cpu.install() must have run before this module is imported.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

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
from megatron.core.transformer.transformer_config import TransformerConfig

from actors.megatron_balance import ExpertBalance
from actors.megatron_context import ContextShare
from actors.megatron_logprobs import vocab_parallel_logprobs
from actors.megatron_lora import adapters_off, sum_expert_gradients
from actors.megatron_schedule import Finish, run_schedule
from actors.megatron_setup import (
    Device,
    build_chunks,
    learning_rates,
    optimizer_config,
    scheduler,
    transformer_config,
)
from actors.megatron_vision import Look, VisionLanguageModel
from algorithms.data import FloatRow, MicroBatch, StepResult, float_row
from algorithms.roles import Predictions, TokenLoss
from bridge.fit import check_layout
from bridge.plan import TORCH_DTYPES
from bridge.rules import MegatronSpec
from configs.errors import BasculeError
from configs.schema import LayoutConfig, RunConfig

Load = Callable[[list[torch.nn.Module]], None]
Adapt = Callable[[list[torch.nn.Module]], None]
Row = Callable[[ContextShare, torch.Tensor], torch.Tensor]
"""(this rank's part of a micro-batch, the last stage's output [1, L, V / TP] for it) -> float32 [L]."""
Divergence = Callable[[ContextShare, torch.Tensor], torch.Tensor]
"""(this rank's part of a micro-batch, its logits [L, V / TP]) -> divergence [L] from a teacher."""


class StepFailedError(BasculeError):
    """An optimizer step was not applied: loss or gradient not finite. The weights are as before the step."""


class FrozenModel:
    """This rank's part of a model, for log-probabilities only: a reference, or the inside of MegatronModel.

    Parameters are of `dtype`. `load` gets the chunks, one for each virtual pipeline stage of this rank, and
    has to fill every parameter; then `adapt` gets them, to attach and fill adapters. With `mtp` the
    multi-token-prediction layers are there too, to be converted. `look` gives the patches of pictures to a model
    that sees. Raises ConfigError when the model does not fit the parallel layout.
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
        look: Look | None = None,
    ) -> None:
        check_layout(spec, layout, training=False)
        self.look = look
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
            micro_batches, lambda share, output: self.predictions(share, output, temperature).logprobs_T
        )

    def entropies(self, micro_batches: Sequence[MicroBatch], temperature: float) -> list[FloatRow] | None:
        """As `logprobs`, the entropy over the vocabulary at each token in nats."""
        return self.rows(
            micro_batches, lambda share, output: self.predictions(share, output, temperature).entropy_T
        )

    def rows(self, micro_batches: Sequence[MicroBatch], of: Row) -> list[FloatRow] | None:
        """As `logprobs`, what `of` says of each micro-batch and the last stage's output for it."""

        def finish(share: ContextShare, output: torch.Tensor) -> tuple[torch.Tensor, FloatRow]:
            return output.new_zeros(()), float_row(share.whole(of(share, output)).cpu().numpy())

        return self.evaluate(micro_batches, finish)

    def logits(self, micro_batches: Sequence[MicroBatch]) -> list[torch.Tensor] | None:
        """Logits [T, V] of every micro-batch in the model's own type; None off the last stage.

        Every tensor- and context-parallel rank gets all of them: meant for small inputs.
        """

        def finish(share: ContextShare, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            group = tensor_parallel_group()
            parts = [torch.empty_like(output[0]) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, output[0].contiguous(), group=group)
            return output.new_zeros(()), share.whole(torch.cat(parts, dim=1)[:, : self.spec.vocab_size])

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
            results = run_schedule(
                self.chunks, micro_batches, finish, self.config, forward_only=True, look=self.look
            )
        return results if parallel_state.is_pipeline_last_stage() else None

    def pass_over(self, micro_batches: Sequence[MicroBatch]) -> None:
        """A forward pass for what happens in it: nothing comes back, and no logits are made."""
        # Megatron then returns the hidden states that it would have put into the output layer.
        head = self.chunks[-1]
        has_output, head.post_process = head.post_process, False
        try:
            self.evaluate(micro_batches, lambda share, output: (output.new_zeros(()), None))
        finally:
            head.post_process = has_output

    def predictions(self, share: ContextShare, output: torch.Tensor, temperature: float) -> Predictions:
        """What the last stage's `output` [1, L, V / TP] says of the labels of this rank's tokens."""
        logprobs_T, entropy_T = vocab_parallel_logprobs(
            output[0],
            torch.tensor(share.mine(share.batch.labels_T), dtype=torch.int64, device=self.device),
            temperature=temperature,
            vocab_size=self.spec.vocab_size,
            group=tensor_parallel_group(),
        )
        return Predictions(logprobs_T=logprobs_T, entropy_T=entropy_T)


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
        look: Look | None = None,
    ) -> None:
        check_layout(spec, run.trainer)
        dtype = TORCH_DTYPES[run.model.torch_dtype]
        self._model = FrozenModel(run.trainer, dtype, spec, device=device, load=load, adapt=adapt, look=look)
        config = self._model.config
        config.finalize_model_grads_func = _finalize_gradients
        self._balance = ExpertBalance(self.chunks, config, run.trainer)
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=run.trainer.use_distributed_optimizer,
            overlap_grad_reduce=False,
        )
        _let_gradients_begin(self.chunks, config)
        self._wrapped = [DistributedDataParallel(config, ddp_config, chunk) for chunk in self.chunks]
        # Declared as its base class; it is a ChainedOptimizer.
        self.optimizer: Any = get_megatron_optimizer(
            optimizer_config(run), list(self._wrapped), learning_rates(run, spec)
        )
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
        self.optimizer.zero_grad()
        finish = partial(self._token_loss, loss, denominator, temperature, divergence)
        config = self._model.config
        with self._balance.of_step(partial(self._model.pass_over, micro_batches)) as load:
            for chunk in self._wrapped:
                chunk.train()
                chunk.zero_grad_buffer()
            parts = run_schedule(
                self._wrapped, micro_batches, finish, config, forward_only=False, look=self._model.look
            )
        means = _reduce_sums(parts, self._model.device, num_loss_tokens, denominator)
        _check_finite(number, "loss", means["loss"])
        grad_norm = self._apply_gradients(number)
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        self.scheduler.step(increment=1)
        return StepResult(
            loss=means.pop("loss"), grad_norm=grad_norm, learning_rate=learning_rate, metrics=means | load
        )

    def _token_loss(
        self,
        loss: TokenLoss,
        denominator: float,
        temperature: float,
        divergence: Divergence | None,
        share: ContextShare,
        output: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        mine = self._model.predictions(share, output, temperature)
        # All context-parallel ranks compute the loss of whole sequences, each for the gradient of its tokens.
        predictions = Predictions(
            logprobs_T=share.whole(mine.logprobs_T),
            entropy_T=share.whole(mine.entropy_T),
            divergence_T=None if divergence is None else share.whole(divergence(share, output[0])),
        )
        total, metrics = loss(predictions, share.batch)
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
    """Ask for a gradient of frozen embeddings: a recomputed layer has one only where its input does, and a model
    whose tower alone is trained only where a row has pictures."""
    for chunk in chunks:
        if config.recompute_granularity != "full" and not isinstance(chunk, VisionLanguageModel):
            continue
        if chunk.pre_process and not any(p.requires_grad for p in chunk.embedding.parameters()):
            chunk.embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())


def _finalize_gradients(model: list[torch.nn.Module], num_tokens: torch.Tensor, **groups: Any) -> None:
    sum_expert_gradients(model)
    # Without the number of tokens Megatron reduces gradients but does not divide them a second time.
    finalize_model_grads(model, None, **groups)


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

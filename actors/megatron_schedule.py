"""Micro-batches through Megatron's pipeline schedules.

On a machine without CUDA, actors.megatron_cpu.install() must have run before this module is imported.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_attr_wrapped_model
from numpy.typing import NDArray

from actors.megatron_context import ContextShare, shares_of
from actors.megatron_vision import Look, seen_by
from algorithms.data import MicroBatch
from configs.errors import BasculeError

Finish = Callable[[ContextShare, torch.Tensor], tuple[torch.Tensor, Any]]
"""(this rank's part of a micro-batch, the last stage's output for it) -> a loss and a result."""


def run_schedule(
    models: Sequence[torch.nn.Module],
    micro_batches: Sequence[MicroBatch],
    finish: Finish,
    config: TransformerConfig,
    *,
    forward_only: bool,
    look: Look | None = None,
) -> list[Any]:
    """Run Megatron's pipeline schedule. Returns what `finish` gave per micro-batch, on the last stage.

    `finish` is called on the last stage, `look` on the first, for rows with pictures. The device is that of the
    parameters.
    """
    shares = shares_of(micro_batches, config)
    # The interleaved schedule wants a multiple of the pipeline size. Whatever fills it up has no loss.
    interleaved = config.virtual_pipeline_model_parallel_size is not None
    missing = -len(shares) % config.pipeline_model_parallel_size if interleaved else 0
    steps = [(share, finish) for share in shares]
    steps += [(shares[-1], _no_loss)] * missing

    def forward_step(rest: Iterator[tuple[ContextShare, Finish]], model: torch.nn.Module) -> Any:
        share, last = next(rest)
        return _forward(share, model, config, look), partial(_finish_without_tokens, last, share)

    iterators = [iter(steps) for _ in models]
    results = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if interleaved else iterators[0],
        model=list(models),
        num_microbatches=len(steps),
        seq_length=int(shares[0].starts_S[-1]),
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return results[: len(shares)]


def _forward(
    share: ContextShare, model: torch.nn.Module, config: TransformerConfig, look: Look | None
) -> torch.Tensor:
    device = next(model.parameters()).device
    starts = torch.tensor(share.starts_S, dtype=torch.int32, device=device)
    longest = int(np.diff(share.starts_S).max())
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=starts,
        cu_seqlens_kv=starts,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    tokens = torch.tensor(share.mine(share.batch.tokens_T), dtype=torch.int64, device=device)[None]
    positions = torch.tensor(_positions(share, config), dtype=torch.int64, device=device)
    options: dict[str, Any] = {"packed_seq_params": packed}
    if config.num_moe_experts is not None:
        options["padding_mask"] = _padding(share, model, config, device)
    if share.batch.vision is not None and get_attr_wrapped_model(model, "pre_process"):
        if look is None:
            raise BasculeError("a row has pictures, and the model is one that sees none")
        options["seen"] = seen_by(share, look, device)
    return model(tokens, positions, None, **options)


def _positions(share: ContextShare, config: TransformerConfig) -> NDArray[Any]:
    """[1, L], or where tokens have three positions [3, 1, L'] of the whole row of L' tokens."""
    batch = share.batch
    if config.mrope_section is None:
        return share.mine(batch.positions_T)[None]
    rows = np.tile(batch.positions_T, (3, 1)) if batch.vision is None else batch.vision.positions_3T
    return share.filled(rows)[:, None]


def _padding(
    share: ContextShare, model: torch.nn.Module, config: TransformerConfig, device: torch.device
) -> torch.Tensor:
    """True [1, L] where a token belongs to no sample: routers do not count it."""
    mask = torch.tensor(~share.mine(share.batch.in_sample), device=device)
    # The first stage shares it out itself.
    if config.sequence_parallel and not get_attr_wrapped_model(model, "pre_process"):
        rank = parallel_state.get_tensor_model_parallel_rank()
        mask = mask.chunk(config.tensor_model_parallel_size)[rank]
    return mask[None]


def _no_loss(share: ContextShare, output: torch.Tensor) -> tuple[torch.Tensor, None]:
    return output.sum() * 0.0, None


def _finish_without_tokens(
    finish: Finish, share: ContextShare, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    loss, result = finish(share, output)
    # Only a triple keeps the schedule from dividing by the number of micro-batches; its count is not used.
    return loss, torch.zeros((), dtype=torch.int, device=output.device), result

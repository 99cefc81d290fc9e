"""The attention core of every model: scaled-dot-product attention on packed rows.

Megatron's own core without Transformer Engine knows neither packed sequences nor the two head sizes of
multi-latent attention. This one runs on CPU and on CUDA.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint

from configs.errors import BasculeError


class PackedAttention(torch.nn.Module):
    """Causal attention inside each sequence of a packed row.

    With the configuration's `window_size` (left, 0) a token of a windowed layer sees `left` tokens before
    itself. With `softmax_type` "learnable" each head has a sink: a logit without a value in its softmax.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        if attention_type != "self" or attn_mask_type != AttnMaskType.causal:
            raise BasculeError(f"layer {layer_number}: only causal self-attention is supported")
        self.softmax_scale = softmax_scale
        # Declared without the None that it takes.
        every: Any = config.window_attn_skip_freq
        windowed = is_layer_window_attention(config.window_size, every, layer_number)
        self.tokens_before = config.window_size[0] if windowed and config.window_size else None
        self.softmax_offset = _sinks(config) if config.softmax_type == "learnable" else None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attention output [T, heads * Dv] of query [T, heads, D], key [T, groups, D], value [T, groups, Dv].

        One kernel call per sequence: faster than a block-diagonal mask, whose cost is T squared. Under context
        parallelism the tensors are this rank's part of the row (megatron_context), and so is what comes back.
        """
        assert packed_seq_params is not None, "rows are always packed"
        starts = packed_seq_params.cu_seqlens_q.tolist()
        # Declared as if there might be no groups.
        group: Any = parallel_state.get_context_parallel_group()
        if group.size() > 1:
            return self._attend_across(query, key, value, starts, group)
        outputs = [
            self._attend(query[start:end], key[start:end], value[start:end])
            for start, end in pairwise(starts)
            if end > start
        ]
        return torch.cat(outputs).flatten(1)

    def _attend_across(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: list[int], group: Any
    ) -> torch.Tensor:
        """The same where each rank has two chunks of every sequence: keys and values of all are gathered once.

        They are few where heads share them, and each chunk of queries then needs one kernel call, on no more
        keys than it may see. In the backward pass each rank gets the sum of what all found for its tokens.
        """
        ranks, rank = group.size(), group.rank()
        widths = key[0].numel(), value[0].numel()
        both = torch.cat([key.flatten(1), value.flatten(1)], dim=1)
        parts = gather_from_sequence_parallel_region(both, group=group).unflatten(0, (ranks, -1))
        outputs: list[torch.Tensor] = []
        for start, end in pairwise(starts):
            first, size = start // ranks, (end - start) // (2 * ranks)
            halves = parts[:, first : first + size], parts[:, first + size : first + 2 * size].flip(0)
            keys, values = torch.cat([half.flatten(0, 1) for half in halves]).split(widths, dim=1)
            keys, values = keys.unflatten(1, key.shape[1:]), values.unflatten(1, value.shape[1:])
            for half, chunk in enumerate((rank, 2 * ranks - 1 - rank)):
                queries = query[first + half * size : first + (half + 1) * size]
                seen = (chunk + 1) * size
                outputs.append(self._attend(queries, keys[:seen], values[:seen]))
        return torch.cat(outputs).flatten(1)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention of the last tokens of a sequence, or of all, over the whole of it up to there."""
        query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
        if self.softmax_offset is not None:
            output = self._attend_with_sinks(query, key, value, self.softmax_offset)
        else:
            tokens, seen = query.shape[2], key.shape[2]
            masked = tokens < seen or (self.tokens_before is not None and self.tokens_before < tokens - 1)
            output = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=self._visible(tokens, seen, query.device) if masked else None,
                is_causal=not masked,
                scale=self.softmax_scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        return output[0].transpose(0, 1)

    def _attend_with_sinks(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor
    ) -> torch.Tensor:
        # No kernel of torch has sinks; the softmax is float32, as in the other path's kernels.
        heads, tokens, size = query.shape[1:]
        key, value = (tensor.repeat_interleave(heads // tensor.shape[1], dim=1) for tensor in (key, value))
        scores = (query @ key.transpose(-1, -2)).float() * (self.softmax_scale or size**-0.5)
        scores = scores.masked_fill(~self._visible(tokens, key.shape[2], query.device), float("-inf"))
        column = sinks.float().view(1, heads, 1, 1).expand(1, heads, tokens, 1)
        weights = torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1]
        return weights.to(value.dtype) @ value

    def _visible(self, tokens: int, seen: int, device: torch.device) -> torch.Tensor:
        """Mask [tokens, seen], true where the row's token, one of the last, sees the column's."""
        before = seen - tokens
        mask = torch.ones(tokens, seen, dtype=torch.bool, device=device).tril_(before)
        return mask if self.tokens_before is None else mask.triu_(before - self.tokens_before)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The sinks for a distributed checkpoint, split by head; empty without them."""
        return sharded_parameters(self, {"softmax_offset": 0}, prefix, sharded_offsets, metadata)


def sharded_parameters(
    module: torch.nn.Module,
    split_dims: dict[str, int],
    prefix: str,
    sharded_offsets: tuple[Any, ...],
    metadata: dict[str, Any] | None,
) -> dict[str, Any]:
    """A module's own parameters for a distributed checkpoint; those not in `split_dims` are whole on all ranks."""
    assert metadata is not None, "Megatron's models pass their metadata on"
    return make_sharded_tensors_for_checkpoint(
        module.state_dict(prefix="", keep_vars=True),
        prefix,
        split_dims,
        sharded_offsets,
        tp_group=parallel_state.get_tensor_model_parallel_group(),  # pyright: ignore[reportArgumentType]
        dp_cp_group=metadata["dp_cp_group"],
    )


def _sinks(config: TransformerConfig) -> torch.nn.Parameter:
    heads = config.num_attention_heads // config.tensor_model_parallel_size
    device = "cpu" if config.use_cpu_initialization else "cuda"
    sinks = torch.nn.Parameter(torch.empty(heads, dtype=config.params_dtype, device=device))
    set_tensor_model_parallel_attributes(sinks, is_parallel=True, dim=0, stride=1)
    return sinks

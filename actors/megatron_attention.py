"""The layer specification of dense decoders: Megatron's layers with a norm and an attention core of our own.

Megatron's core attention without Transformer Engine knows no packed sequences, and its torch norm refuses
sequence parallelism. Both modules here run on CPU and on CUDA.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from configs.errors import BasculeError


class Norm(torch.nn.RMSNorm):
    """Root-mean-square norm, built from a TransformerConfig.

    Under sequence parallelism every rank sees a part of the tokens; the mark on the weight tells Megatron to
    add up its gradient over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        if config.normalization != "RMSNorm":
            raise BasculeError(f"normalization {config.normalization} is not supported; RMSNorm is")
        device = "cpu" if config.use_cpu_initialization else "cuda"
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=device)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]


class PackedAttention(torch.nn.Module):
    """Causal scaled-dot-product attention inside each sequence of a packed row."""

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
        """Attention output [T, heads * D] of query [T, heads, D], key and value [T, groups, D].

        One kernel call per sequence: faster than a block-diagonal mask, whose cost is T squared.
        """
        assert packed_seq_params is not None, "rows are always packed"
        starts = packed_seq_params.cu_seqlens_q.tolist()
        outputs = [
            self._attend(query[start:end], key[start:end], value[start:end])
            for start, end in pairwise(starts)
            if end > start
        ]
        return torch.cat(outputs).flatten(1)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return output[0].transpose(0, 1)


def decoder_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """Submodules of this pipeline stage's decoder: its layers and the final norm."""
    layers = get_num_layers_to_build(config)
    return TransformerBlockSubmodules(
        layer_specs=[_layer_spec(config)] * layers,
        # Declared as a spec or a module; a class is what the block builds from.
        layer_norm=Norm,  # pyright: ignore[reportArgumentType]
    )


def _layer_spec(config: TransformerConfig) -> ModuleSpec:
    qk_norm = Norm if config.qk_layernorm else IdentityOp
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=PackedAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    mlp = ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    )
    # Declared as a spec or a type; Megatron's own layer specs pass this function too.
    add: Any = get_bias_dropout_add
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=attention,
            self_attn_bda=add,
            pre_mlp_layernorm=Norm,
            mlp=mlp,
            mlp_bda=add,
        ),
    )

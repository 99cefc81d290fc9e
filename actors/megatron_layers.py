"""What the layers of a model are made of: Megatron's modules, with a norm and an attention core of our own.

Megatron's torch norm refuses sequence parallelism, so the norm is ours too.
"""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType, LayerType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from actors.megatron_attention import PackedAttention, sharded_parameters
from bridge.fit import moe_pattern
from bridge.rules import MegatronSpec
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

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The weight for a distributed checkpoint; Megatron's MLP asks all that is in it."""
        return sharded_parameters(self, {}, prefix, sharded_offsets, metadata)


class PostNormAttention(SelfAttention):
    """Self-attention with a norm on its output, before it is added to the residual (GLM-4)."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.post_layernorm = Norm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The normed output [T / SP, 1, H], and no bias."""
        output, bias = super().forward(*args, **kwargs)
        assert bias is None, "a bias would have to be added before the norm"
        return self.post_layernorm(output), None


class PostNormMLP(MLP):
    """A dense MLP with a norm on its output, before it is added to the residual (GLM-4)."""

    # Megatron's layer passes a process group to specs of its own classes only, and warns about others; a
    # plain class that brings its submodules is built in silence.
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config, _MLP, ffn_hidden_size=config.ffn_hidden_size)
        self.post_layernorm = Norm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The normed output [T / SP, 1, H], and no bias."""
        output, bias = super().forward(*args, **kwargs)
        assert bias is None, "a bias would have to be added before the norm"
        return self.post_layernorm(output), None


_MLP = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


def decoder_spec(
    config: TransformerConfig, spec: MegatronSpec, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """Submodules of a virtual pipeline stage's decoder: its layers and the final norm."""
    pattern = moe_pattern(spec)
    return TransformerBlockSubmodules(
        layer_specs=[_layer_spec(config, spec, moe=pattern[layer]) for layer in _layers(config, vp_stage)],
        # Declared as a spec or a module; a class is what the block builds from.
        layer_norm=Norm,  # pyright: ignore[reportArgumentType]
    )


def mtp_spec(config: TransformerConfig, spec: MegatronSpec) -> MultiTokenPredictionBlockSubmodules:
    """Submodules of the multi-token-prediction layers, whose inside is like the last decoder layer."""
    submodules = MultiTokenPredictionLayerSubmodules(
        enorm=Norm,
        hnorm=Norm,
        eh_proj=ColumnParallelLinear,
        transformer_layer=_layer_spec(config, spec, moe=moe_pattern(spec)[-1]),
        # Declared as a spec or a module; a class is what the layer builds from.
        layer_norm=Norm,  # pyright: ignore[reportArgumentType]
    )
    layer = ModuleSpec(module=MultiTokenPredictionLayer, submodules=submodules)
    return MultiTokenPredictionBlockSubmodules(layer_specs=[layer] * spec.mtp_layers)


def _layers(config: TransformerConfig, vp_stage: int | None) -> range | list[int]:
    """Global numbers, from zero, of the stage's decoder layers."""
    # A parsed object once TransformerConfig has seen the string.
    layout: Any = config.pipeline_model_parallel_layout
    if layout is not None:
        return layout.get_layer_id_list(layer_type=LayerType.decoder, vp_stage=vp_stage)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    return range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage))


def _layer_spec(config: TransformerConfig, spec: MegatronSpec, *, moe: bool) -> ModuleSpec:
    # Declared as a spec or a type; Megatron's own layer specs pass this function too.
    add: Any = get_bias_dropout_add
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=_mla_spec() if config.multi_latent_attention else _attention_spec(config, spec),
            self_attn_bda=add,
            pre_mlp_layernorm=Norm,
            mlp=_moe_spec() if moe else _mlp_spec(spec),
            mlp_bda=add,
            sharded_state_dict_keys_map=dict(_checkpoint_names(config, moe=moe)),
        ),
    )


def _attention_spec(config: TransformerConfig, spec: MegatronSpec) -> ModuleSpec:
    qk_norm = Norm if config.qk_layernorm else IdentityOp
    return ModuleSpec(
        module=PostNormAttention if spec.post_norms else SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=PackedAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )


def _mla_spec() -> ModuleSpec:
    return ModuleSpec(
        module=MLASelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=ColumnParallelLinear,
            # Megatron's local spec splits the down-projections, and then loses gradient: the part of the key
            # that all heads share gets only this rank's heads' share. Whole on every rank it is right under
            # sequence parallelism. These are what Transformer Engine's "duplicated" linears are.
            linear_q_down_proj=Linear,
            linear_q_up_proj=ColumnParallelLinear,
            linear_kv_down_proj=Linear,
            linear_kv_up_proj=ColumnParallelLinear,
            core_attention=PackedAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=Norm,
            kv_layernorm=Norm,
        ),
    )


def _mlp_spec(spec: MegatronSpec) -> Any:
    return PostNormMLP if spec.post_norms else ModuleSpec(module=MLP, submodules=_MLP)


def _moe_spec() -> ModuleSpec:
    return ModuleSpec(
        module=MoELayer,
        submodules=MoESubmodules(
            experts=ModuleSpec(module=SequentialMLP, submodules=_MLP),
            shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=_MLP),
        ),
    )


def _checkpoint_names(config: TransformerConfig, *, moe: bool) -> Mapping[str, str]:
    """Where Transformer Engine's layers keep a norm inside the next linear, its name in checkpoints is that."""
    names = {} if moe else {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    if config.multi_latent_attention:
        parts = ("q", "kv")
        return names | {
            f"self_attention.{part}_layernorm.": f"self_attention.linear_{part}_up_proj.layer_norm_"
            for part in parts
        }
    return names | {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}

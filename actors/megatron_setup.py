"""What a trainer rank sets up once: process groups, Megatron's configurations, the empty model, the schedule.

On a machine without CUDA, actors.megatron_cpu.install() must have run before this module is imported.
"""

import copy
from datetime import timedelta
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, ParamKey, get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from actors.megatron_layers import decoder_spec, mtp_spec
from actors.megatron_vision import VisionLanguageModel
from bridge.fit import moe_pattern, pipeline_stages, virtual_stages
from bridge.layouts import padded_vocabulary
from bridge.plan import TORCH_DTYPES
from bridge.rules import MegatronSpec, VisionSpec
from bridge.vision import part_of
from configs.errors import BasculeError
from configs.schema import LayoutConfig, RunConfig, TrainerConfig

Device = Literal["cpu", "cuda"]

_ACTIVATIONS = {"silu": F.silu, "quick_gelu": quick_gelu}
_EXPERT_OPTIONS = {
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_dtype": "fp32",
    # No auxiliary loss, and the router's expert bias stays as it was loaded: the loss is the algorithm's.
    "moe_router_load_balancing_type": "none",
    "moe_aux_loss_coeff": 0.0,
    "moe_router_bias_update_rate": 0.0,
}


def initialize_megatron(
    layout: LayoutConfig,
    *,
    rank: int,
    world_size: int,
    init_method: str,
    timeout_s: float,
    seed: int,
    device: Device,
) -> None:
    """Join the trainer group and build Megatron's process groups; every rank must call it.

    `init_method` is torch's (`tcp://host:port` or `file:///path`). No collective of this group waits longer
    than `timeout_s`. Raises BasculeError when `world_size` is not what the parallel sizes multiply to, or
    when a rank does not come.
    """
    if world_size != layout.world_size:
        raise BasculeError(
            f"{world_size} trainer ranks were started, but the parallel sizes need {layout.world_size}"
        )
    try:
        dist.init_process_group(
            backend="nccl" if device == "cuda" else "gloo",
            init_method=init_method,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
            device_id=torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else None,
        )
    except dist.DistError as error:
        raise BasculeError(
            f"trainer rank {rank}: the {world_size} ranks did not all join at {init_method} within "
            f"{timeout_s:.0f} s; look for a rank that died, or raise cluster.collective_timeout_s ({error})"
        ) from error
    torch.use_deterministic_algorithms(_is_deterministic(layout))
    parallel_state.initialize_model_parallel(
        **model_parallel_options(layout),
        # Declared as whole minutes, used only to make a timedelta.
        distributed_timeout_minutes=timeout_s / 60,  # pyright: ignore[reportArgumentType]
    )
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def model_parallel_options(layout: LayoutConfig) -> dict[str, Any]:
    """The sizes of Megatron's process groups, as initialize_model_parallel takes them."""
    return {
        "tensor_model_parallel_size": layout.tensor_model_parallel_size,
        "pipeline_model_parallel_size": layout.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": virtual_stages(layout),
        "context_parallel_size": layout.context_parallel_size,
        "expert_model_parallel_size": layout.expert_model_parallel_size,
        "expert_tensor_parallel_size": layout.expert_tensor_size,
    }


def shutdown_megatron() -> None:
    """Leave the trainer group; initialize_megatron may be called again afterwards."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def transformer_config(
    layout: LayoutConfig, dtype: torch.dtype, spec: MegatronSpec, device: Device
) -> TransformerConfig:
    """Megatron's configuration of `spec` under a parallel layout; parameters are of `dtype`.

    An MLATransformerConfig for a model with latent attention.
    """
    shape = dict(spec.transformer)
    if spec.num_experts and all(moe_pattern(spec)):
        # With a list Megatron gives every layer names of its own in distributed checkpoints.
        shape["moe_layer_freq"] = 1
    activation = _ACTIVATIONS[shape.pop("activation")]
    kind = MLATransformerConfig if shape.get("multi_latent_attention") else TransformerConfig
    config = kind(
        **shape,
        **_parallel_options(layout),
        **(_EXPERT_OPTIONS if spec.num_experts else {}),
        activation_func=activation,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # With it Megatron leaves the division to us; without it, DDP divides by its size and the schedule
        # by the number of micro-batches.
        calculate_per_token_loss=True,
        # These two need CUDA extensions that are not part of the wheel.
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=device == "cpu",
        perform_initialization=False,
        deterministic_mode=_is_deterministic(layout),
        **_recompute_options(layout),
    )
    # Megatron has no fields for these; its attention and GPTModel read them from the configuration.
    for name, value in (spec.yarn or {}).items():
        setattr(config, f"yarn_{name}", value)
    if spec.vision is not None and spec.vision.mrope_section is not None:
        config.mrope_section = list(spec.vision.mrope_section)
    return config


def _is_deterministic(layout: LayoutConfig) -> bool:
    return isinstance(layout, TrainerConfig) and layout.deterministic_mode


def _parallel_options(layout: LayoutConfig) -> dict[str, Any]:
    chunks = virtual_stages(layout)
    stages = layout.pipeline_model_parallel_layout
    return {
        "tensor_model_parallel_size": layout.tensor_model_parallel_size,
        "pipeline_model_parallel_size": layout.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": chunks,
        "num_layers_in_first_pipeline_stage": layout.num_layers_in_first_pipeline_stage,
        "num_layers_in_last_pipeline_stage": layout.num_layers_in_last_pipeline_stage,
        # Multi-token-prediction layers come back in build_chunks, where they are asked for.
        "pipeline_model_parallel_layout": stages and "|".join(pipeline_stages(stages)).replace("m", ""),
        "context_parallel_size": layout.context_parallel_size,
        "expert_model_parallel_size": layout.expert_model_parallel_size,
        "expert_tensor_parallel_size": layout.expert_tensor_size,
        "sequence_parallel": layout.sequence_parallel,
        # The interleaved schedule computes wrong numbers over gloo with the defaults (False, True).
        "overlap_p2p_comm": chunks is not None,
        "batch_p2p_comm": chunks is None,
    }


def _recompute_options(layout: LayoutConfig) -> dict[str, Any]:
    """What a trained model computes again; one that is only evaluated keeps nothing."""
    if not isinstance(layout, TrainerConfig) or layout.recompute_granularity is None:
        return {}
    if layout.recompute_granularity == "selective":
        return {"recompute_granularity": "selective"}
    return {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": layout.recompute_num_layers,
    }


def build_chunks(config: TransformerConfig, spec: MegatronSpec, mtp: bool) -> list[GPTModel]:
    """This pipeline rank's part of the model, a module for each virtual stage, in order.

    Parameters hold whatever the memory held, expert biases zeros. With `mtp` the last stage also has the
    model's multi-token-prediction layers; they are there to be converted, and no output depends on them.
    """
    if mtp and spec.mtp_layers:
        config = _with_mtp(config, spec.mtp_layers)
    chunks = config.virtual_pipeline_model_parallel_size
    return [_build_chunk(config, spec, stage) for stage in (range(chunks) if chunks else [None])]


def _with_mtp(config: TransformerConfig, layers: int) -> TransformerConfig:
    config = copy.copy(config)
    config.mtp_num_layers = layers
    # A parsed object once TransformerConfig has seen the string.
    stages: Any = config.pipeline_model_parallel_layout
    if stages is not None:
        config.pipeline_model_parallel_layout = PipelineParallelLayerLayout(
            stages.input_data.replace("L", "m" * layers + "L"), config.pipeline_model_parallel_size
        )
    return config


def _build_chunk(config: TransformerConfig, spec: MegatronSpec, stage: int | None) -> GPTModel:
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage)
    kind = _ModelWithMtp if config.mtp_num_layers else GPTModel
    if spec.vision is not None:
        kind = partial(VisionLanguageModel, vision=spec.vision)
    # Types are declared narrower than what Megatron accepts, and uses itself.
    chunk = kind(
        config,
        decoder_spec(config, spec, stage),  # pyright: ignore[reportArgumentType]
        vocab_size=padded_vocabulary(spec.vocab_size, config.tensor_model_parallel_size),
        max_sequence_length=spec.max_sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        post_process=last,
        share_embeddings_and_output_weights=spec.tie_word_embeddings,
        position_embedding_type="rope" if spec.yarn is None else "yarn",
        rotary_percent=spec.rotary_percent,
        rotary_base=spec.rotary_base,  # pyright: ignore[reportArgumentType]
        rope_scaling=spec.rope_scaling_factor is not None,
        rope_scaling_factor=spec.rope_scaling_factor or 1.0,
        mtp_block_spec=mtp_spec(config, spec) if config.mtp_num_layers and last else None,  # pyright: ignore[reportArgumentType]
        vp_stage=stage,
    )
    # Some of Megatron's modules (routers, the gate of shared experts) make their parameters on the CPU.
    # On the meta device (a plan on paper) nothing can be moved, or needs to be.
    if not any(parameter.is_meta for parameter in chunk.parameters()):
        chunk.to("cpu" if config.use_cpu_initialization else "cuda")
    _mark_split_weights(chunk)
    _mark_experts(chunk, config)
    return chunk


class _ModelWithMtp(GPTModel):
    """A model whose output leaves its multi-token-prediction layers out: Megatron's own needs labels."""

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self.post_process:
            return hidden_states
        shared = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if shared else None
        logits, _ = self.output_layer(hidden_states, weight=weight)
        return logits.transpose(0, 1).contiguous()


def _mark_split_weights(chunk: GPTModel) -> None:
    # Megatron sets these marks while it initializes weights, which is left out here. Without them the norm of
    # the gradient counts only one tensor-parallel rank.
    for module in chunk.modules():
        match module:
            case VocabParallelEmbedding() | ColumnParallelLinear():
                dim = 0
            case RowParallelLinear():
                dim = 1
            case _:
                continue
        if module.weight is not None:
            set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=dim, stride=1)


def _mark_experts(chunk: GPTModel, config: TransformerConfig) -> None:
    # Megatron 0.16.1 sums gradients of experts over their own data-parallel group only where there is expert
    # parallelism; they also need it where just their tensor-parallel size is another one. And it sums the
    # bias of an expert's second linear over the tensor-parallel ranks, where other experts are.
    own = config.expert_model_parallel_size > 1
    own = own or config.expert_tensor_parallel_size != config.tensor_model_parallel_size
    for module in chunk.modules():
        if not isinstance(module, SequentialMLP):
            continue
        for name, parameter in module.named_parameters():
            marks: Any = parameter
            marks.allreduce = not own
            if own and name.endswith("linear_fc2.bias"):
                marks.sequence_parallel = False
                # Every rank's is another expert's, so that the gradient's norm has to count them all.
                marks.tensor_model_parallel = True


def optimizer_config(run: RunConfig) -> OptimizerConfig:
    """Megatron's optimizer settings of the run."""
    trainer = run.trainer
    dtype = TORCH_DTYPES[run.model.torch_dtype]
    return OptimizerConfig(
        optimizer="adam",
        lr=trainer.lr,
        min_lr=trainer.min_lr,
        weight_decay=trainer.weight_decay,
        adam_beta1=trainer.adam_beta1,
        adam_beta2=trainer.adam_beta2,
        adam_eps=trainer.adam_eps,
        clip_grad=trainer.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=trainer.use_distributed_optimizer,
    )


def learning_rates(run: RunConfig, spec: MegatronSpec) -> dict[ParamKey, ParamGroupOverride]:
    """What Megatron's optimizer does otherwise with some parameters: no decay, a learning rate of their own."""
    overrides = get_standard_config_overrides(optimizer_config(run))
    if spec.vision is None:
        return overrides
    for part, lr in (("vit", run.vision.vit_lr), ("aligner", run.vision.aligner_lr)):
        if lr is not None:
            belongs = ParamWithNamePredicate(name=part, fn=partial(_is_of, spec.vision, part))
            own = {"max_lr": lr, "min_lr": min(run.trainer.min_lr, lr)}
            # Declared as if all of its fields had to be given, which Megatron itself does not do.
            overrides[ParamKey(with_name_predicate=belongs)] = cast(ParamGroupOverride, own)
    return overrides


def _is_of(vision: VisionSpec, part: str, parameter: torch.nn.Parameter, name: str) -> bool:
    return part_of(vision, name.removeprefix("module.")) == part


def scheduler(optimizer: Any, run: RunConfig) -> OptimizerParamScheduler:
    """Learning rate over the optimizer steps of the run: warm-up from zero, then the chosen decay."""
    trainer = run.trainer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=trainer.lr,
        min_lr=trainer.min_lr,
        lr_warmup_steps=run.lr_warmup_steps,
        lr_decay_steps=run.optimizer_steps,
        lr_decay_style=trainer.lr_decay_style,
        start_wd=trainer.weight_decay,
        end_wd=trainer.weight_decay,
        wd_incr_steps=run.optimizer_steps,
        wd_incr_style="constant",
    )

"""What a trainer rank sets up once: process groups, Megatron's configurations, the empty model, the schedule.

On a machine without CUDA, actors.megatron_cpu.install() must have run before this module is imported.
"""

from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

from actors.megatron_attention import decoder_spec
from bridge.layouts import padded_vocabulary
from bridge.rules import MegatronSpec
from configs.errors import BasculeError
from configs.schema import RunConfig, TrainerConfig

Device = Literal["cpu", "cuda"]

_ACTIVATIONS = {"silu": F.silu}


def initialize_megatron(
    trainer: TrainerConfig,
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
    if world_size != trainer.world_size:
        raise BasculeError(
            f"{world_size} trainer ranks were started, but the parallel sizes under `trainer` need "
            f"{trainer.world_size}"
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
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=trainer.tensor_model_parallel_size,
        pipeline_model_parallel_size=trainer.pipeline_model_parallel_size,
        # Declared as whole minutes, used only to make a timedelta.
        distributed_timeout_minutes=timeout_s / 60,  # pyright: ignore[reportArgumentType]
    )
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def shutdown_megatron() -> None:
    """Leave the trainer group; initialize_megatron may be called again afterwards."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def transformer_config(run: RunConfig, spec: MegatronSpec, device: Device) -> TransformerConfig:
    """Megatron's configuration of `spec` under the run's parallel layout and type."""
    trainer = run.trainer
    dtype = torch.bfloat16 if run.model.torch_dtype == "bfloat16" else torch.float32
    shape = dict(spec.transformer)
    activation = _ACTIVATIONS[shape.pop("activation")]
    return TransformerConfig(
        **shape,
        activation_func=activation,
        tensor_model_parallel_size=trainer.tensor_model_parallel_size,
        pipeline_model_parallel_size=trainer.pipeline_model_parallel_size,
        sequence_parallel=trainer.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
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
    )


def build_chunk(config: TransformerConfig, spec: MegatronSpec) -> GPTModel:
    """This pipeline stage of the model; its parameters hold whatever the memory held."""
    chunk = GPTModel(
        config,
        decoder_spec(config),  # pyright: ignore[reportArgumentType]
        vocab_size=padded_vocabulary(spec.vocab_size, config.tensor_model_parallel_size),
        max_sequence_length=spec.max_sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=spec.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=spec.rotary_base,  # pyright: ignore[reportArgumentType]
        rope_scaling=spec.rope_scaling_factor is not None,
        rope_scaling_factor=spec.rope_scaling_factor or 1.0,
    )
    _mark_split_weights(chunk)
    return chunk


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


def optimizer_config(run: RunConfig) -> OptimizerConfig:
    """Megatron's optimizer settings of the run."""
    trainer = run.trainer
    bf16 = run.model.torch_dtype == "bfloat16"
    return OptimizerConfig(
        optimizer="adam",
        lr=trainer.lr,
        min_lr=trainer.min_lr,
        weight_decay=trainer.weight_decay,
        adam_beta1=trainer.adam_beta1,
        adam_beta2=trainer.adam_beta2,
        adam_eps=trainer.adam_eps,
        clip_grad=trainer.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=trainer.use_distributed_optimizer,
    )


def scheduler(optimizer: Any, run: RunConfig) -> OptimizerParamScheduler:
    """Learning rate over the optimizer steps of the run: warm-up from zero, then the chosen decay."""
    trainer = run.trainer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=trainer.lr,
        min_lr=trainer.min_lr,
        lr_warmup_steps=trainer.lr_warmup_iters,
        lr_decay_steps=run.optimizer_steps,
        lr_decay_style=trainer.lr_decay_style,
        start_wd=trainer.weight_decay,
        end_wd=trainer.weight_decay,
        wd_incr_steps=run.optimizer_steps,
        wd_incr_style="constant",
    )

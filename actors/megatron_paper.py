"""The plan of a model on any number of ranks, from its config alone: no weights, no other processes.

Each pipeline stage is built once by Megatron itself, on torch's meta device and in process groups that only
count; its other ranks hold the same parameters at other places.

On a machine without CUDA, actors.megatron_cpu.install() must have run before this module is imported.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer

# torch keeps its counting process group among its test helpers, and uses it so itself (torch.distributed
# tutorials on memory estimation). Needed until it has a public home.
from torch.testing._internal.distributed.fake_pg import FakeStore

from actors.megatron_setup import build_chunks, model_parallel_options, transformer_config
from bridge.claims import config_dtype, implied_tensors, plan_of
from bridge.families import spec_of
from bridge.fit import check_layout
from bridge.megatron import Claims, Place, claim_pieces, named_parameters
from bridge.plan import Plan
from bridge.rules import Family, MegatronSpec
from configs.schema import LayoutConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class PaperPlan:
    """A plan and what each rank holds."""

    plan: Plan
    claims: tuple[Claims, ...]


def plan_on_paper(directory: Path, layout: LayoutConfig, torch_dtype: torch.dtype | None) -> PaperPlan:
    """The plan of the model in `directory` (config.json is enough) on layout.world_size ranks.

    Must not be called in a process that has a process group. Raises ConfigError when the model does not fit.
    """
    family, spec = spec_of(directory)
    check_layout(spec, layout, training=False)
    dtype = torch_dtype or config_dtype(directory)
    claims: list[Claims] = []
    per_stage = layout.world_size // layout.pipeline_model_parallel_size
    for stage in range(layout.pipeline_model_parallel_size):
        with counting_group(layout, stage * per_stage):
            config = transformer_config(layout, dtype, spec, "cpu")
            with torch.device("meta"):
                chunks = build_chunks(config, spec, mtp=True)
            claims += [
                _claims(family, spec, chunks, layout, stage * per_stage + position)
                for position in range(per_stage)
            ]
    tensors = implied_tensors(family, spec, claims, dtype)
    return PaperPlan(plan=plan_of(family, spec, tensors, claims, None), claims=tuple(claims))


@contextmanager
def counting_group(layout: LayoutConfig, rank: int) -> Iterator[None]:
    """Megatron's process groups as `rank` has them, in a process that is alone. They only count."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    try:
        parallel_state.initialize_model_parallel(
            **model_parallel_options(layout), create_gloo_process_groups=False
        )
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def place_of(layout: LayoutConfig, rank: int) -> Place:
    """Where Megatron puts a rank: tensor-parallel positions change fastest, for experts their own."""
    return Place(
        rank=rank,
        tensor_rank=rank % layout.tensor_model_parallel_size,
        tensor_size=layout.tensor_model_parallel_size,
        expert_tensor_rank=rank % layout.expert_tensor_size,
        expert_tensor_size=layout.expert_tensor_size,
    )


def expert_rank_of(layout: LayoutConfig, rank: int) -> int:
    """Which part of each layer's experts the rank has: the ranks of an expert are next to each other."""
    return rank // layout.expert_tensor_size % layout.expert_model_parallel_size


def _claims(
    family: Family, spec: MegatronSpec, chunks: list[GPTModel], layout: LayoutConfig, rank: int
) -> Claims:
    expert_rank = expert_rank_of(layout, rank)
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, MoELayer):
                count = module.num_local_experts
                module.local_expert_indices = list(range(expert_rank * count, (expert_rank + 1) * count))
    return claim_pieces(family, spec, named_parameters(chunks), None, place_of(layout, rank))

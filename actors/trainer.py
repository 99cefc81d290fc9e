"""Trainer ranks: Ray actors that each host one Megatron rank, and the group that drives them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from actors import deadline
from actors.adapter_source import AdapterSource, fill_adapter, write_adapter_beside
from actors.model_source import ModelSource, tensors_of, write_beside
from actors.placement import Reservation
from actors.ranks import free_address, join, start_ranks
from actors.sync_rank import SyncRank
from algorithms.data import Batch, FloatRow, MicroBatch, StepResult, TrainSample, float_row, int_row
from algorithms.packing import pack
from bridge.plan import TORCH_DTYPES, Plan
from configs.schema import RunConfig
from configs.sizes import parse_size

if TYPE_CHECKING:
    from actors.megatron_model import FrozenModel, MegatronModel
    from actors.megatron_setup import Device
    from bridge.adapter_bridge import AdapterBridge
    from bridge.model_bridge import ModelBridge


MERGED = "-merged"
"""Ending of a checkpoint's name beside the adapter's, with the adapter merged into the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """What trainer ranks load."""

    model: ModelSource
    adapter: AdapterSource | None = None
    """What is trained; all of the model without one."""
    reference: ModelSource | None = None
    """Of a model of its own; without one the reference of a run with an adapter is the model without it."""
    reference_adapter: AdapterSource | None = None
    frozen: frozenset[str] = frozenset()
    """Global names of parameters that are not trained (bridge.frozen)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """What a rank has to say once it holds the weights. Only rank 0 tells the plan, which all have."""

    plan: Plan | None
    warnings: tuple[str, ...]


class TrainerRank:
    """One Megatron rank. Heavy imports happen in `start`, after the CPU fixes are in place."""

    def __init__(self, config: RunConfig, device: str, rank: int) -> None:
        """Remembers only what it will be."""
        self._config = config
        self._rank = rank
        self._device = device
        self._model: MegatronModel
        self._reference: FrozenModel | None = None
        self._weights: ModelBridge
        self._adapters: AdapterBridge | None = None
        self._sources: Sources
        self._parameters: Mapping[str, torch.Tensor]
        self._plan: Plan
        self._sync: SyncRank

    def address(self) -> str:
        """A `tcp://` rendezvous that was free on this rank's node a moment ago."""
        return free_address()

    def start(self, address: str, sources: Sources) -> Started:
        """Join the group, build and load the model; returns the plan of its weights, the same on every rank."""
        config, device = self._config, cast("Device", self._device)
        join(
            config.trainer,
            config.cluster,
            rank=self._rank,
            address=address,
            device=device,
            seed=config.seed,
        )
        from actors.megatron_model import MegatronModel
        from bridge.model_bridge import ModelBridge

        source = sources.model
        self._sources = sources
        self._weights = ModelBridge(source.directory, tensors_of(source))
        warnings: list[str] = []
        adapt = partial(freeze, sources.frozen) if sources.frozen else None
        if sources.adapter is not None:
            self._adapters = sources.adapter.bridge(self._weights)
            adapt = partial(_adapt, self._adapters, sources.adapter, config.seed, warnings)
        load = partial(_load, self._weights, source, warnings)
        self._model = MegatronModel(config, self._weights.spec, device=device, load=load, adapt=adapt)
        if sources.reference is not None:
            self._reference = self._load_reference(sources, warnings)
        self._parameters, self._plan = self._what_is_synced()
        return Started(plan=self._plan if self._rank == 0 else None, warnings=tuple(warnings))

    def _load_reference(self, sources: Sources, warnings: list[str]) -> "FrozenModel":
        from actors.megatron_model import FrozenModel
        from bridge.model_bridge import ModelBridge

        source, adapter = sources.reference, sources.reference_adapter
        assert source is not None, "a run without a reference loads none"
        bridge = ModelBridge(source.directory, tensors_of(source))
        return FrozenModel(
            self._config.trainer,
            self._dtype,
            bridge.spec,
            device=cast("Device", self._device),
            load=partial(_load, bridge, source, warnings),
            adapt=None
            if adapter is None
            else partial(_adapt, adapter.bridge(bridge), adapter, self._config.seed, warnings),
        )

    def _what_is_synced(self) -> tuple[Mapping[str, torch.Tensor], Plan]:
        """What engines are sent, and how: the whole model, with adapters in it, or these alone."""
        from bridge.megatron import all_parameters, named_parameters

        chunks = self._model.chunks
        if self._adapters is not None and self._config.rollout.vllm_enable_lora:
            return all_parameters(chunks), self._adapters.plan(chunks, self._dtype)
        plan = self._weights.plan(chunks, self._dtype, copies=False)
        return named_parameters(chunks) if self._adapters is None else self._adapters.merged(chunks), plan

    @property
    def _dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self._config.model.torch_dtype]

    def step(self, micro_batches: Sequence[MicroBatch], num_loss_tokens: int) -> StepResult:
        """One optimizer step; the same result on every rank."""
        from algorithms.losses import loss_of

        return self._model.step(
            micro_batches, num_loss_tokens, loss_of(self._config), self._config.loss_temperature
        )

    def logprobs(
        self, micro_batches: Sequence[MicroBatch], reference: bool, temperature: float | None = None
    ) -> list[FloatRow] | None:
        """Log-probabilities of the labels on the last pipeline stage, else None; by default at the loss's
        temperature."""
        temperature = temperature or self._config.loss_temperature
        if not reference:
            return self._model.logprobs(micro_batches, temperature)
        if self._reference is None:
            return self._model.base_logprobs(micro_batches, temperature)
        return self._reference.logprobs(micro_batches, temperature)

    def follow(self, bucket_bytes: int) -> None:
        """Cut the plan into buckets; from now on sending needs no more words."""
        transport = self._config.bridge.transport
        self._sync = SyncRank(self._parameters, self._plan, bucket_bytes, self._rank, transport)

    def sync(self, method: str, *arguments: Any) -> Any:
        """Call this rank's part in weight syncs (actors.sync_rank)."""
        return getattr(self._sync, method)(*arguments)

    def save(self, directory: Path, iteration: int) -> None:
        """Write a checkpoint as the config says; every rank does it together."""
        if self._adapters is not None:
            self._save_adapter(self._adapters, directory, iteration)
            if self._config.tuner.merge_lora:
                merged = directory.with_name(directory.name + MERGED)
                self._save_model(merged, self._adapters.merged(self._model.chunks))
        elif self._config.checkpoint.save_safetensors:
            self._save_model(directory)
        else:
            from actors.megatron_checkpoint import save_torch_dist

            save_torch_dist(
                self._model.chunks,
                directory,
                **self._state_to_save(iteration),
                write_beside=partial(
                    write_beside, directory, self._weights, torch_dtype=self._dtype, mtp=False
                ),
            )

    def _save_model(self, directory: Path, parameters: Mapping[str, torch.Tensor] | None = None) -> None:
        self._weights.save(
            self._model.chunks,
            directory,
            torch_dtype=self._dtype,
            max_shard_size=parse_size(self._config.checkpoint.max_shard_size),
            parameters=parameters,
        )

    def _save_adapter(self, adapters: "AdapterBridge", directory: Path, iteration: int) -> None:
        if self._config.checkpoint.save_safetensors:
            adapters.save(self._model.chunks, directory)
            return
        from actors.megatron_adapter_checkpoint import save_adapter

        source, chunks = self._sources.adapter, self._model.chunks
        assert source is not None, "there are adapters"
        plan, base = adapters.plan(chunks), self._weights.directory
        save_adapter(
            chunks,
            directory,
            **self._state_to_save(iteration),
            write_beside=partial(write_adapter_beside, directory, source, base, plan),
        )

    def _state_to_save(self, iteration: int) -> dict[str, Any]:
        whole = not self._config.checkpoint.no_save_optim
        return {
            "optimizer": self._model.optimizer if whole else None,
            "scheduler": self._model.scheduler if whole else None,
            "iteration": iteration,
        }


def _load(bridge: "ModelBridge", source: ModelSource, warnings: list[str], chunks: list[Any]) -> None:
    if source.mcore is None:
        found = bridge.load(chunks).not_finite
    else:
        from actors.megatron_checkpoint import load_torch_dist

        # Layers for multi-token prediction are not trained, so the model is built without them.
        load_torch_dist(chunks, source.mcore, ignored=("mtp.",))
        found = bridge.not_finite(chunks)
    if found:
        warnings.append(f"{source.mcore or source.directory}: NaN or infinities in {', '.join(found)}")


def freeze(frozen: Collection[str], chunks: list[Any]) -> None:
    """Take these parameters (global names) of the bare chunks out of training: no gradient, no optimizer state."""
    from bridge.megatron import named_parameters

    for name, parameter in named_parameters(chunks).items():
        if name in frozen:
            parameter.requires_grad_(False)


def _adapt(
    bridge: "AdapterBridge", source: AdapterSource, seed: int, warnings: list[str], chunks: list[Any]
) -> None:
    found = fill_adapter(bridge, source, seed, chunks)
    if found:
        warnings.append(f"{source.directory}: NaN or infinities in {', '.join(found)}")


class TrainerGroup:
    """All trainer ranks; implements the Trainer protocol of the loops."""

    def __init__(
        self,
        config: RunConfig,
        reservation: Reservation,
        device: str,
        sources: Sources,
        directory: Path,
    ) -> None:
        """Start the ranks and load the weights, within cluster.start_timeout_s. Saves go under `directory`."""
        self._config = config
        self._directory = directory
        self.size = config.trainer.world_size
        self._names = [f"trainer rank {rank}" for rank in range(self.size)]
        self.ranks = start_ranks(TrainerRank, reservation, "trainer", self.size, (config, device))
        timeout_s = config.cluster.start_timeout_s
        address = deadline.get(
            self.ranks[0].address.remote(), self._names[0], timeout_s=timeout_s, phase="start of the trainer"
        )
        started: list[Started] = self._all(
            [rank.start.remote(address, sources) for rank in self.ranks], "load", timeout_s
        )
        assert started[0].plan is not None, "rank 0 tells the plan"
        self.plan = started[0].plan
        self.warnings = started[0].warnings

    def step(self, batch: Batch) -> StepResult:
        """One optimizer step on every rank."""
        refs = [
            rank.step.remote(batch.ranks[self._replica(number)], batch.num_loss_tokens)
            for number, rank in enumerate(self.ranks)
        ]
        return self._all(refs, "train step")[0]

    def logprobs(self, batch: Batch) -> tuple[tuple[FloatRow, ...], ...]:
        """Policy log-probabilities of the labels, by data-parallel rank and micro-batch."""
        return self._logprobs(batch, reference=False)

    def reference_logprobs(self, batch: Batch) -> tuple[tuple[FloatRow, ...], ...]:
        """The same under the reference."""
        return self._logprobs(batch, reference=True)

    def score(self, tokens: Sequence[int]) -> list[float]:
        """Log-probability of each token but the first under the policy, at temperature 1."""
        layout = self._config.trainer
        row, zeros = int_row(tokens), float_row([0.0] * len(tokens))
        ones = int_row([1] * len(tokens))
        sample = TrainSample(tokens=row, loss_mask=ones, advantages=zeros, logprobs=zeros, version=0)
        replicas = layout.data_parallel_size
        batch = pack(
            [sample] * replicas,
            num_ranks=replicas,
            micro_batch_size=1,
            multiple=layout.tensor_model_parallel_size,
        )
        return self._logprobs(batch, reference=False, temperature=1.0)[0][0][: len(tokens) - 1].tolist()

    def follow(self, bucket_bytes: int) -> None:
        """Let every rank cut the plan into buckets of this size."""
        self._all([rank.follow.remote(bucket_bytes) for rank in self.ranks], "plan")

    def sync(self, method: str, arguments: Sequence[Sequence[Any]], first: int = 0) -> list[Any]:
        """Refs of a method of actors.sync_rank on the ranks from `first` on, each with its own arguments."""
        return [
            rank.sync.remote(method, *given)
            for rank, given in zip(self.ranks[first:], arguments, strict=True)
        ]

    def check(self, timeout_s: float) -> None:
        """Raises ActorLostError when a rank is gone, DeadlineExceededError when one does not answer."""
        self._all([rank.address.remote() for rank in self.ranks], "check of the trainers", timeout_s)

    @property
    def names(self) -> list[str]:
        """What to call the ranks in messages."""
        return self._names

    def save(self, step: int) -> None:
        """Write `checkpoint-STEP` into the run directory."""
        self._save(self._directory / f"checkpoint-{step}", step)

    def save_last(self) -> Path:
        """Write `checkpoint`, the end of the run; returns its path."""
        directory = self._directory / "checkpoint"
        self._save(directory, self._config.optimizer_steps)
        return directory

    def _save(self, directory: Path, iteration: int) -> None:
        self._all([rank.save.remote(directory, iteration) for rank in self.ranks], f"save of {directory}")

    def _replica(self, rank: int) -> int:
        """Data-parallel position: between the tensor-parallel one and the pipeline stage."""
        layout = self._config.trainer
        return rank // layout.tensor_model_parallel_size % layout.data_parallel_size

    def _logprobs(
        self, batch: Batch, *, reference: bool, temperature: float | None = None
    ) -> tuple[tuple[FloatRow, ...], ...]:
        refs = [
            rank.logprobs.remote(batch.ranks[self._replica(number)], reference, temperature)
            for number, rank in enumerate(self.ranks)
        ]
        rows = self._all(refs, "log-probabilities")
        found = {self._replica(number): tuple(row) for number, row in enumerate(rows) if row is not None}
        return tuple(found[replica] for replica in range(self._config.trainer.data_parallel_size))

    def _all(self, refs: Sequence[Any], phase: str, timeout_s: float | None = None) -> list[Any]:
        return deadline.get_all(
            refs,
            self._names[: len(refs)],
            timeout_s=timeout_s or self._config.cluster.step_timeout_s,
            phase=phase,
        )

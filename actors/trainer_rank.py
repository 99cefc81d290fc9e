"""Trainer ranks: Ray actors that each host one Megatron rank."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from actors.adapter_source import AdapterSource, fill_adapter, write_adapter_beside
from actors.model_source import ModelSource, tensors_of, write_beside
from actors.pictures import PictureReader
from actors.ranks import free_address, join
from actors.spans import SpanLog, Taken, traced
from actors.sync_rank import SyncRank
from algorithms.data import FloatRow, MicroBatch, StepResult
from bridge.merged import fixed_parameters
from bridge.plan import TORCH_DTYPES, Plan
from bridge.rules import MegatronSpec
from bridge.sync_plan import changing_units
from configs.schema import RunConfig
from configs.sizes import parse_size

if TYPE_CHECKING:
    from actors.megatron_background import BackgroundSave
    from actors.megatron_model import FrozenModel, MegatronModel
    from actors.megatron_setup import Device
    from actors.megatron_teacher import ScoringTeacher, Teacher
    from actors.megatron_vision import Look
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
    teacher: ModelSource | None = None
    frozen: frozenset[str] = frozenset()
    """Global names of parameters that are not trained (bridge.frozen)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """What a rank has to say once it holds the weights. Only rank 0 tells the plan, which all have."""

    plan: Plan | None
    warnings: tuple[str, ...]
    changing: frozenset[str]
    """Units of a sync that have a part here which is trained."""


class TrainerRank:
    """One Megatron rank. Heavy imports happen in `start`, after the CPU fixes are in place."""

    def __init__(self, config: RunConfig, device: str, rank: int) -> None:
        """Remembers only what it will be."""
        self.spans = SpanLog()
        self._config = config
        self._rank = rank
        self._device = device
        self._model: MegatronModel
        self._reference: FrozenModel | None = None
        self._teacher: Teacher | None = None
        self._scoring_teacher: ScoringTeacher | None = None
        self._weights: ModelBridge
        self._adapters: AdapterBridge | None = None
        self._sources: Sources
        self._parameters: Mapping[str, torch.Tensor]
        self._plan: Plan
        self._sync: SyncRank
        self._saving: BackgroundSave

    def address(self) -> str:
        """A `tcp://` rendezvous that was free on this rank's node a moment ago."""
        return free_address()

    def take_spans(self) -> Taken:
        """What it has done since the last call."""
        return self.spans.take()

    @traced("start")
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
        spec, look = self._weights.spec, self._look(source, self._weights.spec)
        self._model = MegatronModel(config, spec, device=device, load=load, adapt=adapt, look=look)
        if sources.reference is not None:
            self._reference = self._load_frozen(sources.reference, sources.reference_adapter, warnings)
        if config.algorithm == "gkd":
            self._teacher = self._load_teacher(sources.teacher, warnings)
        elif sources.teacher is not None:
            from actors.megatron_teacher import ScoringTeacher

            frozen = self._load_frozen(sources.teacher, None, warnings)
            self._scoring_teacher = ScoringTeacher(frozen, offload=config.teacher.offload_teacher)
        self._parameters, self._plan = self._what_is_synced()
        return Started(
            plan=self._plan if self._rank == 0 else None,
            warnings=tuple(warnings),
            changing=changing_units(self._plan, self._rank, fixed_parameters(self._parameters)),
        )

    def _load_frozen(
        self, source: ModelSource, adapter: AdapterSource | None, warnings: list[str]
    ) -> "FrozenModel":
        from actors.megatron_model import FrozenModel
        from bridge.model_bridge import ModelBridge

        bridge = ModelBridge(source.directory, tensors_of(source))
        return FrozenModel(
            self._config.trainer,
            self._dtype,
            bridge.spec,
            device=cast("Device", self._device),
            load=partial(_load, bridge, source, warnings),
            look=self._look(source, bridge.spec),
            adapt=None
            if adapter is None
            else partial(_adapt, adapter.bridge(bridge), adapter, self._config.seed, warnings),
        )

    def _look(self, source: ModelSource, spec: MegatronSpec) -> "Look | None":
        """How a model gets to see pictures: with its own processor, if it sees at all."""
        if spec.vision is None:
            return None
        return PictureReader(source.directory, spec.vision, self._config.vision).patches

    def _load_teacher(self, source: ModelSource | None, warnings: list[str]) -> "Teacher":
        from actors.megatron_teacher import GivenTeacher, MegatronTeacher

        if source is None:
            return GivenTeacher(self._config.gkd, self._weights.spec.vocab_size)
        frozen = self._load_frozen(source, None, warnings)
        offload = self._config.teacher.offload_teacher
        return MegatronTeacher(frozen, self._config.gkd, self._weights.spec.vocab_size, offload=offload)

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

    @traced("train")
    def step(
        self, micro_batches: Sequence[MicroBatch], num_loss_tokens: int, denominator: float
    ) -> StepResult:
        """One optimizer step; the same result on every rank."""
        from algorithms.losses import loss_of

        loss, temperature = loss_of(self._config), self._config.loss_temperature
        divergence = None
        if self._teacher is not None:
            self._teacher.look_at(micro_batches)
            divergence = self._teacher.divergence
        return self._model.step(micro_batches, num_loss_tokens, loss, temperature, denominator, divergence)

    @traced("divergences")
    def divergences(self, micro_batches: Sequence[MicroBatch]) -> list[FloatRow] | None:
        """Divergence from the teacher at each token on the last pipeline stage, else None."""
        from actors.megatron_teacher import divergences

        assert self._teacher is not None, "a run of gkd has a teacher"
        return divergences(self._teacher, self._model, micro_batches)

    @traced("teacher logprobs")
    def teacher_logprobs(self, micro_batches: Sequence[MicroBatch]) -> list[FloatRow] | None:
        """Log-probabilities of the labels under the teacher, at the loss's temperature, on the last pipeline
        stage, else None."""
        assert self._scoring_teacher is not None, "a run with a teacher in the trainer ranks"
        return self._scoring_teacher.logprobs(micro_batches, self._config.loss_temperature)

    @traced("entropies")
    def entropies(self, micro_batches: Sequence[MicroBatch]) -> list[FloatRow] | None:
        """Entropies at the loss's temperature on the last pipeline stage, else None."""
        return self._model.entropies(micro_batches, self._config.loss_temperature)

    def move_reference(self, share: float) -> None:
        """Let this rank's part of the reference be `share` of the policy and the rest of what it was."""
        assert self._reference is not None, "checked with the config"
        self._reference.move_towards(self._model.chunks, share)

    @traced("logprobs", reference=lambda _, reference, *rest: reference)
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

    def follow(self, bucket_bytes: int, fixed: frozenset[str], by_content: bool) -> None:
        """Cut the plan into buckets; from now on sending needs no more words. Of the units `fixed` no rank trains
        anything."""
        ours = self._parameters, self._plan, bucket_bytes, self._rank, self._config.bridge.transport
        self._sync = SyncRank(*ours, self.spans, fixed=fixed, by_content=by_content)

    def sync(self, method: str, *arguments: Any) -> Any:
        """Call this rank's part in weight syncs (actors.sync_rank)."""
        with self.spans(f"sync: {method.replace('_', ' ')}"):
            return getattr(self._sync, method)(*arguments)

    @traced("save")
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

    @traced("copy state")
    def begin_state(self, directory: Path, step: int) -> None:
        """Copy this rank's part of a state to resume from; every rank does it together. A thread writes it."""
        from actors.megatron_resume import save_rank

        self._saving = save_rank(
            *(self._model, directory),
            step=step,
            rank=self._rank,
            with_adapters=self._adapters is not None,
            moved_reference=self._moved_reference,
        )

    def written_state(self) -> tuple[bytes, float] | None:
        """What the thread has written, and the seconds, None while it is at it. Raises WriteError."""
        return self._saving.written()

    def finish_state(self, directory: Path, step: int, written: Sequence[bytes]) -> None:
        """On rank 0: make a whole of what all ranks wrote."""
        from actors.megatron_resume import finish_state

        finish_state(self._saving, directory, step, written)

    @traced("load state")
    def load_state(self, directory: Path, same_layout: bool) -> None:
        """Put this rank into the state that save_state wrote."""
        from actors.megatron_resume import load_rank

        load_rank(
            *(self._model, directory),
            rank=self._rank,
            with_adapters=self._adapters is not None,
            moved_reference=self._moved_reference,
            same_layout=same_layout,
        )

    @property
    def _moved_reference(self) -> "FrozenModel | None":
        return self._reference if self._config.grpo.sync_ref_model else None

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

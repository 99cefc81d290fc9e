"""The receiving end of a sync inside a vLLM worker, on any transport."""

import queue
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.lora.lora_model import LoRAModel
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from bridge.adapter_config import AdapterConfig, parse_adapter_config
from bridge.assembler import Assembler
from bridge.progress import ProgressNote, Stage
from bridge.sync_plan import SyncPlan, from_wire, unit_of
from bridge.sync_protocol import WorkerReport, decode_header, empty_header, encode_report
from bridge.transport.base import Group, naming
from bridge.transport.errors import TransportError
from bridge.transport.lora_loading import build_adapter, manager_of
from bridge.transport.vllm_fixes import (
    LoadCounts,
    abort_layerwise_reload,
    prepack_experts_on_update,
    repack_tied_lm_head,
    require_written_for,
    unloaded_layers,
    waiting_layers,
)

# Received and not yet loaded; one more is being received.
_AHEAD = 1


@dataclass(kw_only=True)
class SyncInitInfo(WeightTransferInitInfo):
    """All that is known before the first update. The sender is rank 0 and listens at `host:port`."""

    host: str
    port: int
    rank_offset: int
    """Rank in the group of this engine's first worker."""
    world_size: int
    timeout_s: float
    plan: dict[str, Any] = field(repr=False)
    """From `bridge.sync_plan.to_wire`; every update follows it."""
    peers: list[str]
    """What to call the ranks in messages."""
    partial: bool = False
    """Updates may leave out units that did not change."""
    adapter: dict[str, Any] | None = None
    """Content of a PEFT adapter_config.json: the plan has the tensors of that adapter, not those of the model."""
    progress: str | None = None
    """Path of the ProgressBoard on which this engine's workers say how far they are."""


@dataclass(kw_only=True)
class SyncUpdateInfo(WeightTransferUpdateInfo):
    """One update; the version must be the one that the sender names."""

    version: int


class SyncReceiver(WeightTransferEngine[SyncInitInfo, SyncUpdateInfo]):
    """Receives the buckets of an update, checks every part, and loads unit by unit.

    An adapter is kept until it has come whole and fits; WorkerExtension.activate_adapter takes it from here.

    A failed update leaves no open reload behind and closes the group, so that the sender fails at once
    instead of at its timeout; the weights are then a mixture until a full update has succeeded.
    """

    init_info_cls = SyncInitInfo
    update_info_cls = SyncUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any) -> None:
        require_written_for()
        super().__init__(*args)
        self._group: Group | None = None
        self._plan: SyncPlan
        self._partial = False
        self._layers_of: dict[str, set[str]] = {}
        self._config: AdapterConfig | None = None
        self._adapter_tensors: Mapping[str, torch.Tensor] = {}
        self._adapter: LoRAModel | None = None
        self._mixed = False
        self._counts = LoadCounts()
        self._note = ProgressNote(None, 0)

    @abstractmethod
    def _connect(self, info: SyncInitInfo, rank: int) -> Group:
        """Join the group of the sender. Raises TransportError."""

    def init_transfer_engine(self, init_info: SyncInitInfo) -> None:
        """Join the group, leaving an earlier one.

        Raises TransportError, also for an adapter's tensor without a place in the model, SyncPlanError naming a
        tensor, or ConfigError naming a key of the adapter's config.
        """
        self.shutdown()
        self._plan = from_wire(init_info.plan)
        adapter = init_info.adapter
        self._config = None if adapter is None else parse_adapter_config(adapter)
        self._partial = init_info.partial
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._note.close()
        self._note = ProgressNote(init_info.progress, parallel.rank)
        self._note.at(Stage.JOINING)
        self._group = self._connect(init_info, rank)
        self._note.at(Stage.JOINED)
        if self._config is not None:
            self._check_places(self._config)

    def start_weight_update(self) -> None:
        """Open a layerwise reload of the model; an adapter needs none."""
        self._adapter = None
        if self._config is not None:
            if self._mixed:
                # So that the sender fails at once.
                self.shutdown()
                raise TransportError(
                    "the model's own weights are those of a failed update; an adapter is no help"
                )
            return
        self._mixed = True
        if current_platform.is_cpu():
            prepack_experts_on_update(self.model)
        try:
            initialize_layerwise_reload(self.model)
        except BaseException:
            abort_layerwise_reload(self.model)
            raise

    def receive_weights(self, update_info: SyncUpdateInfo) -> None:
        """Receive, check and load all buckets, and tell the sender what came.

        Raises ContentError or TransportError naming tensors, and layers that are not complete. Completeness is
        checked here and not in finish_weight_update, because vLLM 0.32 can start another update only if this
        method, not that one, is where the last one failed.
        """
        try:
            self._receive(update_info.version)
        except BaseException:
            abort_layerwise_reload(self.model)
            self.shutdown()
            raise

    def finish_weight_update(self) -> None:
        """Process what waited for the end: attention, padding, shared matrices."""
        if self._config is not None:
            return
        finalize_layerwise_reload(self.model, self.model_config)
        if current_platform.is_cpu():
            repack_tied_lm_head(self.model)
        self._mixed = False

    def shutdown(self) -> None:
        """Leave the group."""
        if self._group is not None:
            self._group.close()
            self._group = None

    def take_adapter(self) -> LoRAModel | None:
        """The adapter of the last update, once; None where that was the model, or there was none."""
        adapter, self._adapter = self._adapter, None
        return adapter

    def _receive(self, version: int) -> None:
        where = f"weights of version {version}"
        if self._group is None:
            raise TransportError(f"{where}: no group; init_weights comes first")
        header = empty_header(len(self._plan.units))
        self._note.at(Stage.WAITING, version)
        self._group.broadcast(header, 0)
        order, units = decode_header(header, self._plan.units)
        if order.version != version:
            raise TransportError(f"{where}: the sender is at version {order.version}")
        if not order.full and not self._partial:
            raise TransportError(
                f"{where}: {len(units)} of {len(self._plan.units)} units came; all were agreed"
            )
        assembler = Assembler(self._plan, units)
        loaded = 0
        of_adapter: dict[str, torch.Tensor] = {}
        group, plan = self._group, self._plan
        numbers = plan.buckets_of(units)
        receive = (partial(self._receive_bucket, group, plan.buckets[number].nbytes) for number in numbers)
        for number, buffer in self._noted(version, numbers, _ahead(receive)):
            place = f"{where}, bucket {number} of {len(self._plan.buckets)}"
            with naming(place):
                whole = list(assembler.add(number, buffer, with_hashes=order.hashes(number)))
                loaded += sum(len(weights) for weights in whole)
                if self._config is None:
                    self._load_units(whole)
                else:
                    of_adapter.update(pair for weights in whole for pair in weights)
        self._note.at(Stage.REPORTING, version)
        if assembler.missing:
            raise TransportError(f"{where}: these did not come whole: {', '.join(assembler.missing[:8])}")
        if self._config is None:
            self._check_complete(where, None if order.full else units)
        else:
            with naming(where):
                self._keep_adapter(of_adapter, self._config)
        report = WorkerReport(version=version, tensors=loaded, digest=assembler.digest)
        self._group.send(encode_report(report), 0)
        self._note.at(Stage.DONE, version)

    def _noted(
        self, version: int, numbers: Sequence[int], buffers: Iterator[torch.Tensor]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Each bucket with its number; says what is waited for and what is worked on."""
        following = [*numbers[1:], numbers[-1]] if numbers else []
        for number, buffer, after in zip(numbers, buffers, following, strict=True):
            self._note.at(Stage.LOADING, version, number)
            yield number, buffer
            self._note.at(Stage.WAITING, version, after)

    def _check_places(self, config: AdapterConfig) -> None:
        """Make the plan's adapter of zeros: what vLLM would refuse it refuses before anything is trained."""
        zeros = {
            info.name: torch.zeros((), dtype=info.dtype).expand(info.shape) for info in self._plan.tensors
        }
        try:
            build_adapter(manager_of(self.model), zeros, config)
        except BaseException:
            # Not before the group was joined: its other members would wait for this one.
            self.shutdown()
            raise

    def _keep_adapter(self, tensors: Mapping[str, torch.Tensor], config: AdapterConfig) -> None:
        """Make vLLM's adapter of these tensors, and of those of the last update where they are only some."""
        if self._partial:
            # Not views of a bucket, which would live as long as any of its tensors is not sent again.
            tensors = {**self._adapter_tensors, **{name: tensor.clone() for name, tensor in tensors.items()}}
            tensors = {info.name: tensors[info.name] for info in self._plan.tensors}
        self._adapter = build_adapter(manager_of(self.model), tensors, config)
        self._adapter_tensors = tensors if self._partial else {}

    def _receive_bucket(self, group: Group, nbytes: int) -> torch.Tensor:
        """A bucket in new memory: until its layer is complete, vLLM keeps views of what it was given."""
        buffer = torch.empty(nbytes, dtype=torch.uint8)
        group.broadcast(buffer, 0)
        self._note.arrived()
        return buffer

    def _check_complete(self, where: str, units: Sequence[str] | None) -> None:
        """Every layer of these units must have all its weights; of all layers without `units`."""
        expected = None
        if units is not None:
            expected = set[str]().union(*(self._layers_of[unit] for unit in units))
        missing = unloaded_layers(self.model, expected)
        if missing:
            raise TransportError(
                f"{where}: {len(missing)} layers are not complete: {', '.join(missing[:8])}; the plan must have "
                "all tensors of the model"
            )

    def _load_units(self, units: Sequence[list[tuple[str, torch.Tensor]]]) -> None:
        """All in one call, because each walks through all modules of the model a few times."""
        known: list[tuple[str, torch.Tensor]] = []
        for weights in units:
            if self._partial and unit_of(weights[0][0]) not in self._layers_of:
                self._load_first(weights)
            else:
                known += weights
        if known:
            self._load(known)

    def _load_first(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        """Note which layers the unit fills: an update without it then expects nothing of them."""
        before = waiting_layers(self.model)
        self._load(weights)
        after = waiting_layers(self.model)
        filled = {name for name, numel in before.items() if after.get(name) != numel}
        self._layers_of[unit_of(weights[0][0])] = filled

    def _load(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        taken: list[str] = []

        def watched(pairs: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in pairs:
                taken.append(name)
                yield name, tensor

        try:
            with self._counts.in_use():
                cast(Any, self.model).load_weights(watched(weights))
        # The loader is the model's own code: it raises whatever it likes, mostly without naming the tensor.
        except Exception as error:
            last = taken[-1] if taken else "the first tensor"
            raise TransportError(f"vLLM refused {last}: {error!r}") from error


def _ahead(calls: Iterable[Callable[[], torch.Tensor]]) -> Iterator[torch.Tensor]:
    """What each call returns, in order; a thread makes the next one while the last result is worked on.

    A reader that stops early stops the thread, at the latest when the call that it is in returns.
    """
    full: queue.Queue[torch.Tensor | Exception | None] = queue.Queue(_AHEAD)
    stopped = threading.Event()

    def work() -> None:
        try:
            for call in calls:
                full.put(call())
                if stopped.is_set():
                    return
            full.put(None)
        # Raised again by the reader.
        except Exception as error:  # noqa: BLE001
            full.put(error)

    thread = threading.Thread(target=work, name="receive-weights", daemon=True)
    thread.start()
    try:
        while (got := full.get()) is not None:
            if isinstance(got, Exception):
                raise got
            yield got
    finally:
        stopped.set()
        while thread.is_alive():
            # It may wait for room.
            if not full.empty():
                full.get()
            thread.join(0.05)

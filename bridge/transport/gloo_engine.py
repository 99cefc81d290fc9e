"""The receiving end of the gloo transport, inside a vLLM worker."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from bridge.plan import Bucket
from bridge.transport.gloo import GlooGroup, TransportError, bucket_views, buckets_from_wire, connect
from bridge.transport.vllm_fixes import (
    abort_layerwise_reload,
    prepack_experts_on_update,
    repack_tied_lm_head,
    require_written_for,
    unloaded_layers,
)


@dataclass(kw_only=True)
class GlooInitInfo(WeightTransferInitInfo):
    """All that is known before the first update. The sender is rank 0 and listens at `host:port`."""

    host: str
    port: int
    rank_offset: int
    """Rank in the group of this engine's first worker."""
    world_size: int
    timeout_s: float
    buckets: list[dict[str, Any]]
    """From `buckets_to_wire`; every update sends exactly these, in order."""


@dataclass(kw_only=True)
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """One update; the version is there to be named in errors."""

    version: int


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """Receives all buckets of an update and loads them layer by layer.

    A failed update leaves no open reload behind and closes the group, so that the sender fails at once
    instead of at its timeout; the weights are then a mixture until a full update has succeeded.
    """

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any) -> None:
        require_written_for()
        super().__init__(*args)
        self._group: GlooGroup | None = None
        self._buckets: tuple[Bucket, ...] = ()

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Join the group, leaving an earlier one. Raises TransportError."""
        self.shutdown()
        self._buckets = buckets_from_wire(init_info.buckets)
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._group = connect(init_info.host, init_info.port, rank, init_info.world_size, init_info.timeout_s)

    def start_weight_update(self) -> None:
        """Open a layerwise reload of the model."""
        if current_platform.is_cpu():
            prepack_experts_on_update(self.model)
        try:
            initialize_layerwise_reload(self.model)
        except BaseException:
            abort_layerwise_reload(self.model)
            raise

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Receive and load all buckets. Raises TransportError naming layers that are not complete then.

        Completeness is checked here and not in finish_weight_update, because vLLM 0.32 can start another
        update only if this method, not that one, is where the last one failed.
        """
        try:
            self._receive(update_info.version)
            missing = unloaded_layers(self.model)
            if missing:
                raise TransportError(
                    f"weights of version {update_info.version}: {len(missing)} layers are not complete: "
                    f"{', '.join(missing[:8])}; the plan must have all tensors of the model"
                )
        except BaseException:
            abort_layerwise_reload(self.model)
            self.shutdown()
            raise

    def finish_weight_update(self) -> None:
        """Process what waited for the end: attention, padding, shared matrices."""
        finalize_layerwise_reload(self.model, self.model_config)
        if current_platform.is_cpu():
            repack_tied_lm_head(self.model)

    def shutdown(self) -> None:
        """Leave the group."""
        if self._group is not None:
            self._group.close()
            self._group = None

    def _receive(self, version: int) -> None:
        if self._group is None:
            raise TransportError(f"weights of version {version}: no group; init_weights comes first")
        for number, bucket in enumerate(self._buckets):
            # Never reused: until its layer is complete, vLLM keeps views of what it was given.
            buffer = torch.empty(bucket.nbytes, dtype=torch.uint8)
            self._group.broadcast(buffer, 0)
            self._load(bucket_views(buffer, bucket), f"weights of version {version}, bucket {number}")

    def _load(self, weights: list[tuple[str, torch.Tensor]], where: str) -> None:
        taken: list[str] = []

        def watched(pairs: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in pairs:
                taken.append(name)
                yield name, tensor

        try:
            cast(Any, self.model).load_weights(watched(weights))
        # The loader is the model's own code: it raises whatever it likes, mostly without naming the tensor.
        except Exception as error:
            last = taken[-1] if taken else "the first tensor"
            raise TransportError(f"{where}: vLLM refused {last}: {error!r}") from error

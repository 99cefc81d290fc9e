"""Trainer ranks: Ray actors that each host one Megatron rank, and the group that drives them."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import torch

from actors import deadline
from actors.env import check_one_source
from actors.placement import Reservation
from algorithms.data import Batch, FloatRow, MicroBatch, StepResult
from bridge.checkpoint import CheckpointReader, CheckpointWriter
from bridge.layouts import slices
from bridge.plan import Bucket, Piece, Plan, TensorInfo, build_plan
from bridge.transport.gloo import GlooGroup, connect, free_port
from configs.schema import RunConfig

if TYPE_CHECKING:
    from actors.megatron_model import FrozenModel, MegatronModel


class TrainerRank:
    """One Megatron rank. Heavy imports happen in `start`, after the CPU fixes are in place."""

    def __init__(self, config: RunConfig, rank: int, device: str) -> None:
        """Remembers only what it will be."""
        self._config = config
        self._rank = rank
        self._device = device
        self._model: MegatronModel
        self._reference: FrozenModel
        self._parameters: Mapping[str, torch.nn.Parameter]
        self._writer: CheckpointWriter
        self._plan: Plan
        self._bridge: GlooGroup
        self._buckets: tuple[Bucket, ...]

    def address(self) -> str:
        """A `tcp://` rendezvous that was free on this rank's node a moment ago."""
        host = ray.util.get_node_ip_address()
        return f"tcp://{host}:{free_port(host)}"

    def start(self, address: str, model_dir: Path, ref_model_dir: Path | None) -> list[Piece]:
        """Join the group, build and load the model; returns what this rank holds of the HF tensors."""
        check_one_source()
        if self._device == "cpu":
            from actors.megatron_cpu import install

            install()
        from actors.megatron_model import FrozenModel, MegatronModel
        from actors.megatron_setup import initialize_megatron
        from bridge.families import spec_of
        from bridge.megatron import named_parameters

        initialize_megatron(
            self._config.trainer,
            rank=self._rank,
            world_size=self._config.trainer.world_size,
            init_method=address,
            timeout_s=self._config.cluster.collective_timeout_s,
            seed=self._config.seed,
            device=self._device,  # pyright: ignore[reportArgumentType]
        )
        pieces: list[Piece] = []

        def load_from(directory: Path, claims: list[Piece]) -> Callable[[list[torch.nn.Module]], None]:
            return lambda chunks: claims.extend(self._load(chunks, directory))

        _, spec = spec_of(model_dir)
        self._model = MegatronModel(
            self._config,
            spec,
            device=self._device,  # pyright: ignore[reportArgumentType]
            load=load_from(model_dir, pieces),
        )
        if ref_model_dir is not None:
            _, ref_spec = spec_of(ref_model_dir)
            self._reference = FrozenModel(
                self._config,
                ref_spec,
                device=self._device,  # pyright: ignore[reportArgumentType]
                load=load_from(ref_model_dir, []),
            )
        self._parameters = named_parameters(self._model.chunks)
        return pieces

    def _load(self, chunks: list[torch.nn.Module], directory: Path) -> list[Piece]:
        from bridge.families import spec_of
        from bridge.megatron import check_all_read, claim_pieces, load_pieces, named_parameters

        family, spec = spec_of(directory)
        layout = self._config.trainer
        with CheckpointReader(directory) as reader:
            parameters = named_parameters(chunks)
            pieces = claim_pieces(
                family,
                spec,
                parameters,
                reader.tensors,
                rank=self._rank,
                # Megatron numbers ranks with the tensor-parallel position fastest.
                tensor_parallel_rank=self._rank % layout.tensor_model_parallel_size,
                tensor_parallel_size=layout.tensor_model_parallel_size,
            )
            everyone: list[Any] = [None] * layout.world_size
            torch.distributed.all_gather_object(everyone, {piece.tensor for piece in pieces})
            check_all_read(family.to_read(spec, reader.tensors), set().union(*everyone))
            load_pieces(parameters, reader, pieces)
        return pieces

    def step(self, micro_batches: Sequence[MicroBatch], num_loss_tokens: int) -> StepResult:
        """One optimizer step; the same result on every rank."""
        from algorithms.losses import loss_of

        return self._model.step(
            micro_batches, num_loss_tokens, loss_of(self._config), self._config.loss_temperature
        )

    def logprobs(self, micro_batches: Sequence[MicroBatch], reference: bool) -> list[FloatRow] | None:
        """Log-probabilities of the labels on the last pipeline stage, else None."""
        model = self._reference if reference else self._model
        return model.logprobs(micro_batches, self._config.loss_temperature)

    def follow(self, plan: Plan, checkpoint: Path, buckets: Sequence[Bucket]) -> None:
        """Take the plan that all ranks share; from now on saving and sending need no more words."""
        self._plan = plan
        self._buckets = tuple(buckets)
        self._writer = CheckpointWriter(checkpoint, plan.tensors)

    def connect_bridge(self, host: str, port: int) -> None:
        """Join the group of the bridge (rank 0) and all trainer ranks (their rank plus 1)."""
        self._bridge = connect(
            host,
            port,
            self._rank + 1,
            self._config.trainer.world_size + 1,
            self._config.cluster.collective_timeout_s,
        )

    def send(self) -> None:
        """Send this rank's pieces to the bridge: one message for each bucket it owns a piece of."""
        for bucket in self._buckets:
            pieces = self._plan.owned(bucket, self._rank)
            if pieces:
                self._bridge.send(self._message(pieces), 0)

    def _message(self, pieces: Sequence[Piece]) -> torch.Tensor:
        with torch.no_grad():
            parts = [self._value(piece).contiguous().view(-1).view(torch.uint8) for piece in pieces]
            return torch.cat(parts).cpu()

    def _value(self, piece: Piece) -> torch.Tensor:
        return self._parameters[piece.parameter].detach()[slices(piece.local_region)]

    def prepare_save(self) -> None:
        """Create the checkpoint's files. One rank does it."""
        self._writer.prepare()

    def save(self) -> None:
        """Write this rank's pieces. Every rank does it."""
        owned = (
            piece for pieces in self._plan.pieces.values() for piece in pieces if piece.rank == self._rank
        )
        self._writer.write((piece.tensor, piece.region, self._value(piece)) for piece in owned)

    def finish_save(self, source: Path) -> None:
        """Add the files around the weights and rename the checkpoint into place. One rank does it."""
        self._writer.finish(source)


class TrainerGroup:
    """All trainer ranks; implements the Trainer protocol of the loops."""

    def __init__(
        self,
        config: RunConfig,
        reservation: Reservation,
        device: str,
        model_dir: Path,
        ref_model_dir: Path | None,
    ) -> None:
        """Start the ranks and load the weights, within cluster.start_timeout_s."""
        self._config = config
        self._model_dir = model_dir
        self.size = config.trainer.world_size
        self._names = [f"trainer rank {rank}" for rank in range(self.size)]
        rank_class = ray.remote(TrainerRank)
        env = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        self.ranks: list[Any] = [
            rank_class.options(**reservation.options("trainer", rank), runtime_env={"env_vars": env}).remote(
                config, rank, device
            )
            for rank in range(self.size)
        ]
        timeout_s = config.cluster.start_timeout_s
        address = deadline.get(
            self.ranks[0].address.remote(), self._names[0], timeout_s=timeout_s, phase="start of the trainer"
        )
        self.pieces: list[list[Piece]] = self._all(
            [rank.start.remote(address, model_dir, ref_model_dir) for rank in self.ranks], "load", timeout_s
        )

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

    def follow(self, plan: Plan, checkpoint: Path, buckets: Sequence[Bucket]) -> None:
        """Give the plan to every rank."""
        shared = ray.put(plan)
        self._all([rank.follow.remote(shared, checkpoint, buckets) for rank in self.ranks], "plan")

    def connect_bridge(self, host: str, port: int) -> list[Any]:
        """Refs of the ranks joining the bridge's group; it forms when the bridge joins too."""
        return [rank.connect_bridge.remote(host, port) for rank in self.ranks]

    def send(self) -> list[Any]:
        """Refs of the ranks sending their pieces to the bridge."""
        return [rank.send.remote() for rank in self.ranks]

    @property
    def names(self) -> list[str]:
        """What to call the ranks in messages."""
        return self._names

    def save(self) -> None:
        """Write the HF checkpoint that `follow` named: safetensors, config, tokenizer."""
        self._all([self.ranks[0].prepare_save.remote()], "save: create files")
        self._all([rank.save.remote() for rank in self.ranks], "save: write")
        self._all([self.ranks[0].finish_save.remote(self._model_dir)], "save: finish")

    def _replica(self, rank: int) -> int:
        """Data-parallel position: between the tensor-parallel one and the pipeline stage."""
        layout = self._config.trainer
        return rank // layout.tensor_model_parallel_size % layout.data_parallel_size

    def _logprobs(self, batch: Batch, *, reference: bool) -> tuple[tuple[FloatRow, ...], ...]:
        refs = [
            rank.logprobs.remote(batch.ranks[self._replica(number)], reference)
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


def plan_of(group: TrainerGroup, tensors: Mapping[str, TensorInfo], dtype: torch.dtype) -> Plan:
    """The plan of the group's weights as HF tensors of `dtype`, in layer order."""
    from bridge.megatron import hf_order

    claims = [piece for pieces in group.pieces for piece in pieces]
    infos = [TensorInfo(name=name, dtype=dtype, shape=tensors[name].shape) for name in hf_order(claims)]
    return build_plan(infos, claims)

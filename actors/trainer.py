"""The group that drives the trainer ranks (actors.trainer_rank)."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray

from actors import deadline
from actors.checkpoint_links import CheckpointLinks
from actors.events import Event, unheard
from actors.placement import Reservation
from actors.ranks import start_ranks
from actors.stacks import end_processes, own_actors
from actors.trainer_rank import Sources, Started, TrainerRank
from algorithms.data import Batch, FloatRow, StepResult, TrainSample, Vision, float_row, int_row
from algorithms.packing import pack
from bridge.sync_plan import unit_of
from configs.errors import BasculeError
from configs.schema import RunConfig

# An answer takes a rank that waits for nobody milliseconds.
_CHECK_S = 15.0


class TrainerGroup:
    """All trainer ranks; implements the Trainer protocol of the loops."""

    def __init__(
        self,
        config: RunConfig,
        reservation: Reservation,
        device: str,
        sources: Sources,
        directory: Path,
        event: Event = unheard,
    ) -> None:
        """Start the ranks and load the weights, within cluster.start_timeout_s. Saves go under `directory`, and
        `event` is told of them."""
        self._config = config
        self._directory = directory
        self._arguments = reservation, device, sources
        self.links = CheckpointLinks(directory, event)
        self.changes = 0
        """How often the weights were told to change."""
        self.size = config.trainer.world_size
        self._names = [f"trainer rank {rank}" for rank in range(self.size)]
        self._start()

    def _start(self) -> None:
        reservation, device, sources = self._arguments
        self.ranks = start_ranks(
            *(TrainerRank, reservation, "trainer", self.size, (self._config, device)),
            deterministic=self._config.trainer.deterministic_mode,
        )
        timeout_s = self._config.cluster.start_timeout_s
        address = deadline.get(
            self.ranks[0].address.remote(), self._names[0], timeout_s=timeout_s, phase="start of the trainer"
        )
        started: list[Started] = self._all(
            [rank.start.remote(address, sources) for rank in self.ranks], "load", timeout_s
        )
        assert started[0].plan is not None, "rank 0 tells the plan"
        self.plan = started[0].plan
        units = {unit_of(info.name) for info in self.plan.tensors}
        self.fixed_units = frozenset(units.difference(*(each.changing for each in started)))
        """Units of a sync of which nothing is trained."""
        self.warnings = started[0].warnings

    def restart(self) -> None:
        """End what is left of the ranks, and start all of them with the weights that the run began with."""
        living = own_actors(TrainerRank.__name__)
        for rank in self.ranks:
            ray.kill(rank)
        # Ray forgets a process that is stopped, which would wake up as a rank of a group that is no more.
        end_processes(living)
        self._start()

    def find_lost(self) -> BasculeError | None:
        """Which rank is gone, or does not answer within seconds; None when all do."""
        refs = [rank.address.remote() for rank in self.ranks]
        end = time.monotonic() + _CHECK_S
        late: BasculeError | None = None
        for ref, name in zip(refs, self._names, strict=True):
            left = max(1.0, end - time.monotonic())
            try:
                deadline.get(ref, name, timeout_s=left, phase="check of the trainers")
            except deadline.ActorLostError as error:
                return error
            except deadline.DeadlineExceededError as error:
                late = late or error
        return late

    def step(self, batch: Batch) -> StepResult:
        """One optimizer step on every rank."""
        self.changes += 1
        return self._ask("step", batch, "train step", batch.num_loss_tokens, batch.denominator)[0]

    def logprobs(self, batch: Batch) -> tuple[tuple[FloatRow, ...], ...]:
        """Policy log-probabilities of the labels, by data-parallel rank and micro-batch."""
        return self._logprobs(batch, reference=False)

    def reference_logprobs(self, batch: Batch) -> tuple[tuple[FloatRow, ...], ...]:
        """The same under the reference."""
        return self._logprobs(batch, reference=True)

    def entropies(self, batch: Batch) -> tuple[tuple[FloatRow, ...], ...]:
        """Entropy of the policy at each token in nats, by data-parallel rank and micro-batch."""
        return self._rows("entropies", batch, "entropies")

    def teacher_logprobs(self, batch: Batch) -> tuple[tuple[FloatRow, ...], ...]:
        """Log-probabilities of the labels under the teacher, by data-parallel rank and micro-batch."""
        return self._rows("teacher_logprobs", batch, "log-probabilities of the teacher")

    def divergences(self, batch: Batch) -> tuple[tuple[FloatRow, ...], ...]:
        """Divergence of the policy from the teacher at each token, by data-parallel rank and micro-batch."""
        return self._rows("divergences", batch, "divergences")

    def move_reference(self, share: float) -> None:
        """Let the reference be `share` of the policy and the rest of what it was."""
        self.changes += 1
        self._all([rank.move_reference.remote(share) for rank in self.ranks], "move of the reference")

    def score(self, tokens: Sequence[int], vision: Vision | None = None) -> list[float]:
        """Log-probability of each token but the first under the policy, at temperature 1."""
        layout = self._config.trainer
        row, zeros = int_row(tokens), float_row([0.0] * len(tokens))
        ones = int_row([1] * len(tokens))
        sample = TrainSample(
            tokens=row, loss_mask=ones, advantages=zeros, logprobs=zeros, version=0, vision=vision
        )
        replicas = layout.data_parallel_size
        batch = pack([sample] * replicas, layout)
        return self._logprobs(batch, reference=False, temperature=1.0)[0][0][: len(tokens) - 1].tolist()

    def follow(self, bucket_bytes: int, *, by_content: bool) -> None:
        """Let every rank cut the plan into buckets of this size; see actors.sync_rank for `by_content`."""
        words = bucket_bytes, self.fixed_units, by_content
        self._all([rank.follow.remote(*words) for rank in self.ranks], "plan")

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

    def tracks(self) -> dict[str, Callable[[], Any]]:
        """How to ask each rank for its spans (actors.trace)."""
        return {name: rank.take_spans.remote for name, rank in zip(self._names, self.ranks, strict=True)}

    def save(self, step: int) -> None:
        """Write `checkpoint-STEP` into the run directory, and link `last` to it."""
        directory = self._directory / f"checkpoint-{step}"
        self._save(directory, step)
        self.links.saved(step, directory)

    def rate(self, step: int, score: float) -> None:
        """Remember how good the weights of this step are; `best` links to the best checkpoint."""
        self.links.rated(step, score)

    def save_last(self) -> Path:
        """Write `checkpoint`, the end of the run; returns its path."""
        directory = self._directory / "checkpoint"
        self._save(directory, self._config.max_steps)
        self.links.saved(self._config.max_steps, directory)
        return directory

    def begin_state(self, directory: Path, step: int) -> None:
        """Let every rank copy its part of a state to resume from, and begin to write it into `directory`, which
        exists."""
        refs = [rank.begin_state.remote(directory, step) for rank in self.ranks]
        self._all(refs, f"copy for {directory}")

    def written_state(self) -> tuple[list[bytes], float] | None:
        """What the ranks wrote, for finish_state, and the longest seconds; None while one is at it. Raises
        WriteError."""
        found = self._all([rank.written_state.remote() for rank in self.ranks], "write of a state")
        if any(each is None for each in found):
            return None
        return [written for written, _ in found], max(seconds for _, seconds in found)

    def finish_state(self, directory: Path, step: int, written: Sequence[bytes]) -> None:
        """Make a whole of what the ranks wrote."""
        self._all([self.ranks[0].finish_state.remote(directory, step, written)], f"end of {directory}")

    def load_state(self, directory: Path, *, same_layout: bool) -> None:
        """Put every rank into the state that save_state wrote; the layout may be another one."""
        refs = [rank.load_state.remote(directory, same_layout) for rank in self.ranks]
        self._all(refs, f"load of {directory}", self._config.cluster.start_timeout_s)

    def _save(self, directory: Path, iteration: int) -> None:
        self._all([rank.save.remote(directory, iteration) for rank in self.ranks], f"save of {directory}")

    def _logprobs(
        self, batch: Batch, *, reference: bool, temperature: float | None = None
    ) -> tuple[tuple[FloatRow, ...], ...]:
        return self._rows("logprobs", batch, "log-probabilities", reference, temperature)

    def _rows(
        self, method: str, batch: Batch, phase: str, *arguments: Any
    ) -> tuple[tuple[FloatRow, ...], ...]:
        """What the last pipeline stages say of their micro-batches, by data-parallel rank."""
        rows = self._ask(method, batch, phase, *arguments)
        layout = self._config.trainer
        found = {layout.replica_of(number): tuple(row) for number, row in enumerate(rows) if row is not None}
        return tuple(found[replica] for replica in range(layout.data_parallel_size))

    def _ask(self, method: str, batch: Batch, phase: str, *arguments: Any) -> list[Any]:
        """Call a method of every rank with its micro-batches and these arguments."""
        refs = [
            getattr(rank, method).remote(batch.ranks[self._config.trainer.replica_of(number)], *arguments)
            for number, rank in enumerate(self.ranks)
        ]
        return self._all(refs, phase)

    def _all(self, refs: Sequence[Any], phase: str, timeout_s: float | None = None) -> list[Any]:
        return deadline.get_all(
            refs,
            self._names[: len(refs)],
            timeout_s=timeout_s or self._config.cluster.step_timeout_s,
            phase=phase,
        )

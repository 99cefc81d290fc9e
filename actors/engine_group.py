"""The engines as one sampler, and what a weight update needs from all of them."""

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import ray

from actors import deadline
from actors.bridge_host import Meeting
from actors.dispatch import Room
from actors.engine import EngineInfo
from actors.engine_pool import EngineLostError, EnginePool, Member
from actors.engine_work import Job, Running, Suspicions, Work, given_up
from actors.events import Event, unheard
from algorithms.data import Group, Prompt, SamplingSettings, Vision
from configs.errors import BasculeError

LOG = logging.getLogger(__name__)

# How often a wait for completions looks after lost and new engines.
_LOOK_S = 1.0
# An engine's death is noticed later than the failure of what it was doing.
_NOTICE_S = 2.5


class EngineGroup:
    """Engines as one sampler (algorithms.roles.Sampler), and what a weight update needs from all of them.

    Calls of `generate` and `perform` may overlap, in one thread: whichever is asked for an answer takes in those
    of all.
    """

    def __init__(
        self,
        pool: EnginePool,
        room: int,
        timeout_s: float,
        workers: int = 1,
        *,
        gets_weights: bool = True,
        event: Event = unheard,
    ) -> None:
        """`room` is how many sequences an engine takes, `workers` of how many processes one consists. Engines that
        never get weights need not be waited for while others start. `event` is told of
        prompts that end engines."""
        self._event = event
        self.pool = pool
        self.workers = workers
        self._gets_weights = gets_weights
        self._room = Room(len(pool), room)
        self._timeout_s = timeout_s
        self._give_weights: Callable[[Member], None] = pool.admit
        self._work: list[Work] = []
        self._suspicions = Suspicions()
        self._version = 0
        self._listener_of: Callable[[Prompt], Any] = lambda _: None
        self._environment_of: Callable[[Prompt], Any] = lambda _: None

    def __len__(self) -> int:
        return len(self.pool)

    def generate(self, requests: Iterable[tuple[Prompt, SamplingSettings]]) -> Iterator[Group]:
        """Groups in the order they finish; otherwise as `perform`."""
        answers = self.perform([self._completion(*request) for request in requests])
        return (group for _, group in answers)

    def perform(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Any]]:
        """Jobs with their answers in the order they finish; engines begin at once, whether or not anyone asks for
        the first.

        A job is drawn from `jobs` when an engine has room for it. What a lost engine was doing is given to others.
        Raises the EngineError of an engine that lives, EngineLostError when no engine is left, or
        DeadlineExceededError when no job at all was done within the time for a step. What is in flight then is
        given up, and also when the caller stops iterating.
        """
        work = Work(jobs)
        self._work.append(work)
        try:
            self._welcome()
            self._submit()
        except BasculeError:
            self._work.remove(work)
            raise
        return self._collect(work)

    def _completion(self, prompt: Prompt, sampling: SamplingSettings) -> Job:
        def begin(actor: Any) -> Any:
            # Asked for only now, for these actors may have been replaced meanwhile.
            return actor.generate.remote(
                prompt, sampling, self._listener_of(prompt), self._environment_of(prompt)
            )

        return Job(
            name=f"prompt {prompt.id}",
            size=sampling.n,
            begin=begin,
            key=(prompt.id, sampling.seed),
            without=lambda: given_up(prompt, sampling, self._version),
        )

    def _collect(self, work: Work) -> Iterator[tuple[Job, Any]]:
        try:
            while not work.is_over:
                if work.done:
                    yield work.done.popleft()
                    continue
                self.pool.wait_for_one(self._timeout_s)
                self._welcome()
                self._submit()
                self._wait_for_an_answer()
            if self._gets_weights:
                self._settle()
        finally:
            self._give_up(work)

    def give_up(self) -> None:
        """Forget all that was asked for: nobody will take it."""
        for work in list(self._work):
            self._give_up(work)

    def _give_up(self, work: Work) -> None:
        if work not in self._work:
            return
        self._work.remove(work)
        for ref, running in work.running.items():
            self._room.give_back(running.member.index, running.job.size)
            # An iterator that an error left behind may be closed only after the run has left Ray; any call would
            # then start a new Ray.
            if ray.is_initialized():
                ray.cancel(ref, recursive=False)
        work.running.clear()

    def load(self) -> dict[str, float]:
        """How many sample, on how many prompts they work, and how many wait for room, as `engines/...`."""
        return {
            "engines/up": float(len(self.members)),
            "engines/running": float(sum(len(work.running) for work in self._work)),
            "engines/waiting": float(sum(work.num_waiting for work in self._work)),
        }

    def tracks(self) -> dict[str, Callable[[], Any]]:
        """How to ask each engine for its spans (actors.trace)."""
        return {member.name: member.actor.take_spans.remote for member in self.members}

    def welcome_with(self, give_weights: Callable[[Member], None]) -> None:
        """Call this for an engine that was started again; it has to give it weights and admit it to the pool."""
        self._give_weights = give_weights

    def heard_by(self, listener_of: Callable[[Prompt], Any]) -> None:
        """Tell the actor that this gives for a prompt of each of its completions as soon as it is there."""
        self._listener_of = listener_of

    def play_with(self, environment_of: Callable[[Prompt], Any]) -> None:
        """Let the actor that this gives for a prompt (EnvironmentWorker) answer the model between its turns."""
        self._environment_of = environment_of

    def meet(
        self,
        members: Sequence[Member],
        meeting: Meeting,
        plan: Mapping[str, Any],
        partial: bool,
        adapter: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        """Let the engines join the group of the sender, which is rank 0 of the meeting.

        `plan` is as bridge.sync_plan.to_wire makes it, of a model's tensors, or of those of the adapter whose
        adapter_config.json has this content. Returns refs at once, for the sender has to join as well.
        """
        common = {
            "host": meeting.host,
            "port": meeting.port,
            "world_size": meeting.world_size,
            "timeout_s": meeting.timeout_s,
            "peers": list(meeting.peers),
            "partial": partial,
            "plan": plan,
            "adapter": None if adapter is None else dict(adapter),
        }
        return [
            member.actor.init_weights.remote({**common, "rank_offset": 1 + place * self.workers})
            for place, member in enumerate(members)
        ]

    def worker_names(self, members: Sequence[Member]) -> list[str]:
        """What to call the workers of the engines, in the order of their ranks."""
        if self.workers == 1:
            return [member.name for member in members]
        return [f"{member.name} worker {worker}" for member in members for worker in range(self.workers)]

    @property
    def members(self) -> tuple[Member, ...]:
        """Engines that sample."""
        return self.pool.members("up")

    def pause(self, members: Sequence[Member] | None = None, mode: str = "keep") -> int:
        """Stop engines, by default all, between two tokens; returns how many completions are in flight."""
        members = self.members if members is None else members
        return sum(self.wait(members, [m.actor.pause.remote(mode) for m in members], "pause of engines"))

    def receive(self, members: Sequence[Member], version: int) -> list[Any]:
        """Let the engines receive a set of weights. Returns refs at once; they hold seconds."""
        self._version = version
        return [member.actor.receive.remote(version) for member in members]

    def resume(self, members: Sequence[Member] | None = None) -> None:
        """Let engines, by default all, go on."""
        members = self.members if members is None else members
        self.wait(members, [member.actor.resume.remote() for member in members], "resume of engines")

    def abort_all(self) -> int:
        """End all completions now; returns how many prompts those were."""
        members = self.members
        return sum(self.wait(members, [m.actor.abort_all.remote() for m in members], "abort of completions"))

    def score(self, tokens: Sequence[int], vision: Vision | None = None) -> list[list[float]]:
        """What every engine that is up says: the log-probability of each token but the first, at temperature 1."""
        members = self.members
        refs = [member.actor.score.remote(list(tokens), vision) for member in members]
        return self.wait(members, refs, "score of a prompt")

    def info(self) -> list[EngineInfo]:
        """State of every engine that is up."""
        members = self.members
        return self.wait(members, [member.actor.info.remote() for member in members], "state of engines")

    def wait(self, members: Sequence[Member], refs: Sequence[Any], phase: str) -> list[Any]:
        """Results of one ref per engine. Raises like deadline.get_all."""
        names = [member.name for member in members]
        return deadline.get_all(refs, names, timeout_s=self._timeout_s, phase=phase)

    def start(self) -> list[ray.ObjectRef]:
        """Let all engines load their models. Returns at once, so that trainers can start meanwhile."""
        return [member.actor.start.remote() for member in self.members]

    def ready(self, refs: Sequence[Any], timeout_s: float) -> None:
        """Wait for what `start` gave, then watch the engines. Raises like `wait`; none is left then."""
        names = [member.name for member in self.members]
        try:
            deadline.get_all(refs, names, timeout_s=timeout_s, phase="start of engines")
        except BasculeError:
            self.kill()
            raise
        self.pool.watch()

    def close(self) -> None:
        """Stop watching the engines."""
        self.pool.close()

    def kill(self) -> None:
        """End all engine processes."""
        self.close()
        for member in self.pool.members("up", "new"):
            ray.kill(member.actor)

    def _welcome(self) -> None:
        for member in self.pool.members("new"):
            self._give_weights(member)

    def _settle(self) -> None:
        """Wait for engines on their way, so that nobody is given weights while the trainer makes new ones."""
        while self.pool.members("starting", "new"):
            time.sleep(0.1)
            self._welcome()

    def _submit(self) -> None:
        """Give engines what they have room for, the earliest call's jobs first."""
        members = {member.index: member for member in self.pool.members("up")}
        for work in self._work:
            while work.suspects and self._give(
                work, work.suspects[0], members, self._without_suspects(members)
            ):
                work.suspects.popleft()
            while work.waiting:
                if not self._give(work, work.waiting.first, members, members):
                    return
                work.waiting.pop()

    def _give(self, work: Work, job: Job, members: Mapping[int, Member], able: Collection[int]) -> bool:
        """Let one of the engines that are `able` do it; False while none has room."""
        engine = self._room.take(job.size, able)
        if engine is None:
            return False
        work.running[job.begin(members[engine].actor)] = Running(member=members[engine], job=job)
        return True

    def _without_suspects(self, members: Collection[int]) -> set[int]:
        """Engines that work on nothing that was with an engine that was lost."""
        running = [each for work in self._work for each in work.running.values()]
        return {*members} - {each.member.index for each in running if self._suspicions.holds(each.job)}

    def _wait_for_an_answer(self) -> None:
        """Return when a job is done, of whatever call, or an engine was lost, or a new one came first.

        Not of the caller's alone: engines may be full with what a later call has asked for.
        """
        end = time.monotonic() + self._timeout_s
        owners = {ref: work for work in self._work for ref in work.running}
        while owners:
            ready, _ = ray.wait(list(owners), num_returns=1, timeout=_LOOK_S)
            if ready:
                self._finished(ready[0], owners[ready[0]])
                return
            if self.pool.members("new"):
                return
            names = [work.running[ref].owner for ref, work in owners.items()]
            deadline.tell("generate", names, self._timeout_s - (end - time.monotonic()))
            if time.monotonic() > end:
                late = ", ".join(names)
                raise deadline.DeadlineExceededError(
                    f"generate: no answer within {self._timeout_s:.0f} s from {late}"
                )

    def _finished(self, ref: Any, work: Work) -> None:
        running = work.running.pop(ref)
        member = running.member
        self._room.give_back(member.index, running.job.size)
        try:
            answer = deadline.get(ref, running.owner, timeout_s=self._timeout_s, phase="generate")
            work.done.append((running.job, answer))
        except BasculeError as error:
            if isinstance(error, deadline.ActorLostError):
                self.pool.lost(member, error)
            elif not self.pool.noticed(member, _NOTICE_S):
                raise
            self._put_back(work, running)
        else:
            self._suspicions.cleared(running.job)

    def _put_back(self, work: Work, running: Running) -> None:
        """A job of an engine that was lost: tried once more, or, after a second loss, given up.

        Raises EngineLostError for a job that cannot be left out.
        """
        job = running.job
        if self._suspicions.again(job):
            work.suspects.append(job)
            return
        self._suspicions.cleared(job)
        if job.without is None:
            raise EngineLostError(f"{job.name}: two engines were lost while they worked on it")
        text = f"{job.name} is dropped: two engines were lost while they worked on it"
        LOG.warning("%s", text)
        self._event(None, "poison", text, prompt=job.key[0], engine=running.member.index)
        work.done.append((job, job.without()))

"""A teacher as vLLM engines of the same job. They never get weights."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from actors.cluster import device_of
from actors.engine_group import EngineGroup
from actors.engine_settings import teacher_arguments
from actors.engine_start import start_pool
from actors.engine_work import Job
from actors.events import Event, unheard
from actors.placement import Reservation
from algorithms.data import (
    FloatRow,
    Group,
    Prompt,
    SamplingSettings,
    TopTokens,
    TrainSample,
    Vision,
    float_row,
)
from configs.schema import RunConfig


class TeacherEngines:
    """Engines that share the work of one teacher; TopTeacher, TokenTeacher and Sampler of algorithms.roles.

    What a lost one was doing is given to the others, and another is started in its place; with one engine the run
    waits for that.
    """

    def __init__(self, engines: EngineGroup, k: int, starting: Sequence[Any] = ()) -> None:
        """`k` is how many tokens are asked for at each position, `starting` what EngineGroup.start gave."""
        self._engines = engines
        self._k = k
        self._starting = starting

    def ready(self, timeout_s: float) -> None:
        """Wait until all have loaded their model. Raises BasculeError; none is left then."""
        self._engines.ready(self._starting, timeout_s)

    def top_tokens(self, samples: Sequence[TrainSample]) -> list[TopTokens]:
        """For each sample the teacher's k likeliest tokens in place of each of its tokens. Raises like
        EngineGroup.perform."""
        return self._ask(
            samples, lambda actor, tokens, vision: actor.top_tokens.remote(tokens, self._k, vision)
        )

    def token_logprobs(self, samples: Sequence[TrainSample]) -> list[FloatRow]:
        """For each sample the teacher's log-probability of each of its tokens, 0 for the first. Raises like
        EngineGroup.perform."""
        rows = self._ask(samples, lambda actor, tokens, vision: actor.score.remote(tokens, vision))
        return [float_row([0.0, *row]) for row in rows]

    def generate(self, requests: Iterable[tuple[Prompt, SamplingSettings]]) -> Iterator[Group]:
        """Completions of the teacher, as EngineGroup.generate."""
        return self._engines.generate(requests)

    def tracks(self) -> dict[str, Callable[[], Any]]:
        """How to ask each engine for its spans (actors.trace)."""
        return self._engines.tracks()

    def close(self) -> None:
        """Stop watching the engines."""
        self._engines.close()

    def _ask(
        self, samples: Sequence[TrainSample], begin: Callable[[Any, list[int], Vision | None], Any]
    ) -> list[Any]:
        def job(number: int, sample: TrainSample) -> Job:
            name, tokens = f"sample {number} of the step", sample.tokens.tolist()
            return Job(
                name=name,
                size=1,
                begin=lambda actor: begin(actor, tokens, sample.vision),
                key=(name, None),
                number=number,
            )

        jobs = (job(number, sample) for number, sample in enumerate(samples))
        answers = {each.number: answer for each, answer in self._engines.perform(jobs)}
        return [answers[number] for number in range(len(samples))]


def create_teacher_engines(
    config: RunConfig, model_path: str, reservation: Reservation, event: Event = unheard
) -> TeacherEngines:
    """One engine in each bundle of the teacher, which begin to start. `event` is told which are lost."""
    engine = config.teacher.engine
    k = config.gkd.gkd_logits_topk or 0 if config.algorithm == "gkd" else 0
    arguments = teacher_arguments(config, model_path, device_of(config), k)
    pool = start_pool(
        *(config, engine, arguments, reservation.group, reservation.indices("teacher")),
        kind="teacher engine",
        event=event,
    )
    timeout_s = config.cluster.step_timeout_s
    group = EngineGroup(
        *(pool, engine.max_num_seqs, timeout_s, engine.tensor_parallel_size), gets_weights=False, event=event
    )
    return TeacherEngines(group, k, group.start())

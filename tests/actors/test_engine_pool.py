"""Engines that die: who notices, who takes their work, who replaces them. Ray actors without vLLM in them."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from actors import engine_group
from actors.engine_group import EngineGroup
from actors.engine_pool import EngineLostError, EnginePool, Member
from actors.events import Event, unheard
from actors.teacher_engines import TeacherEngines
from algorithms.data import Group
from configs.errors import BasculeError
from tests.actors.engine_helpers import prompt, settings
from tests.actors.engine_teaching import sample_to_judge
from tests.actors.pool_engine import Engine

pytestmark = pytest.mark.engine
pytest_plugins = ("tests.actors.engine_fixtures",)


@pytest.fixture
def made(ray_cluster: str, tmp_path: Path) -> Iterator[Any]:
    actors: list[Any] = []

    def make(index: int) -> Any:
        kind: Any = ray.remote(Engine).options(num_cpus=0, max_concurrency=100)
        actors.append(kind.remote(str(tmp_path)))
        return actors[-1]

    yield make
    for actor in actors:
        ray.kill(actor)


def group_of(
    make: Any,
    count: int = 2,
    recoveries: int = 2,
    *,
    gets_weights: bool = True,
    heartbeat_timeout_s: float = 60,
    event: Event = unheard,
) -> tuple[EngineGroup, list[int]]:
    pool = EnginePool(
        [make(index) for index in range(count)],
        make,
        start_timeout_s=30,
        max_recoveries=recoveries,
        heartbeat_timeout_s=heartbeat_timeout_s,
    )
    group = EngineGroup(pool, room=2, timeout_s=30, gets_weights=gets_weights, event=event)
    refs = group.start()
    group.ready(refs, 30)
    return group, ray.get(refs)


def until(condition: Any, seconds: float = 30.0) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.05)
    return time.monotonic() - began


def test_a_death_while_idle_is_noticed_within_seconds_and_another_is_started(made: Any) -> None:
    group, pids = group_of(made)
    os.kill(pids[1], signal.SIGKILL)
    assert until(lambda: group.pool.members("up") == group.pool.members("up")[:1]) < 5
    assert [member.index for member in group.members] == [0]
    until(lambda: group.pool.members("new"))
    (new,) = group.pool.members("new")
    assert (new.index, new.incarnation) == (1, 1)
    assert Member(index=1, incarnation=0, actor=new.actor) not in group.pool.members("up", "new")
    # It samples once it was given weights.
    given: list[Member] = []

    def give(member: Member) -> None:
        given.append(member)
        group.pool.admit(member)

    group.welcome_with(give)
    answers = list(group.generate((prompt(i), settings(max_tokens=13)) for i in range(4)))
    assert given == [new]
    assert len({answer.rollouts[0] for answer in answers}) == 2
    assert pids[1] not in {answer.rollouts[0] for answer in answers}
    group.close()


def test_an_actor_that_stops_running_is_lost_after_a_while(
    made: Any, caplog: pytest.LogCaptureFixture
) -> None:
    group, pids = group_of(made, heartbeat_timeout_s=2)
    os.kill(pids[0], signal.SIGSTOP)
    requests = [(prompt(index), settings()) for index in range(4)]
    answers = list(group.generate(requests))
    assert sorted(answer.prompt.id for answer in answers) == [f"p{index}" for index in range(4)]
    assert group.pool.recoveries == 1
    assert "engine 0 is lost: engine 0: its process has not answered for 2 s" in caplog.text
    group.close()


@pytest.mark.parametrize("how", ["process", "core"])
def test_what_a_lost_engine_was_doing_is_done_by_others(made: Any, tmp_path: Path, how: str) -> None:
    group, pids = group_of(made)
    requests = [(prompt(index), settings(max_tokens=20)) for index in range(6)]
    answers: list[Group] = []
    for answer in group.generate(iter(requests)):
        if not answers:
            if how == "process":
                os.kill(pids[0], signal.SIGKILL)
            else:
                (tmp_path / f"core-dead-{pids[0]}").touch()
        answers.append(answer)
    assert sorted(answer.prompt.id for answer in answers) == [f"p{index}" for index in range(6)]
    assert group.pool.recoveries == 1
    # Nothing is left over, and all are at work again.
    assert group._room.in_flight == (0, 0)
    assert [member.incarnation for member in group.members] == [1, 0]
    group.close()


def test_a_lost_teacher_is_replaced_and_not_waited_for_while_there_is_another(made: Any) -> None:
    group, pids = group_of(made, gets_weights=False)
    teacher = TeacherEngines(group, k=0)
    samples = [sample_to_judge(number, length=4) for number in range(7)]
    killing = threading.Timer(0.2, os.kill, (pids[0], signal.SIGKILL))
    killing.start()
    want = [[0.0, *sample.tokens[1:]] for sample in samples]
    assert [row.tolist() for row in teacher.token_logprobs(samples)] == want
    killing.join()
    # It may be back before the others have done its part.
    until(lambda: any(member.incarnation for member in group.pool.members("new", "up")))
    # Nobody gives it weights, and it works all the same.
    assert [row.tolist() for row in teacher.token_logprobs(samples)] == want
    assert [member.incarnation for member in group.members] == [1, 0]
    teacher.close()


def test_a_prompt_that_ends_two_engines_is_dropped_and_no_other(made: Any) -> None:
    events: list[tuple[str, Any]] = []
    group, _ = group_of(
        made, event=lambda step, kind, text, **more: events.append((kind, more.get("prompt")))
    )
    # It is with another prompt when it ends the first engine, and alone when it ends the second.
    requests = [(prompt(index), settings(max_tokens=13, n=1)) for index in (14, 15, 16, 17, 18, 19)]
    answers = {answer.prompt.id: answer.rollouts for answer in group.generate(iter(requests))}
    assert answers.keys() == {f"p{index}" for index in range(14, 20)}
    (dropped,) = answers.pop("p14")
    assert (dropped.finish, dropped.tokens.size, dropped.versions) == ("abort", 0, (0, 0))
    assert all(isinstance(rollouts[0], int) for rollouts in answers.values())
    assert [event for event in events if event[0] == "poison"] == [("poison", "p14")]
    assert group.pool.recoveries == 2
    group.close()


def test_an_engine_on_its_way_is_given_up_at_the_end(made: Any, tmp_path: Path) -> None:
    """The thread that waits for it must not outlive the run: Ray ends a process that calls it after leaving it."""
    group, pids = group_of(made)
    (tmp_path / "starts-slowly").touch()
    os.kill(pids[0], signal.SIGKILL)
    until(lambda: group.pool._coming)
    began = time.monotonic()
    group.close()
    assert time.monotonic() - began < 20
    assert not any(thread.name.startswith("replace-") for thread in threading.enumerate())


def test_calls_that_share_engines_do_not_wait_for_each_other(made: Any) -> None:
    """A later call may fill all engines before an earlier one is asked for its groups."""
    group, pids = group_of(made)
    first = group.generate([(prompt(index), settings()) for index in range(6)])
    second = group.generate([(prompt(index), settings(max_tokens=20)) for index in range(20, 26)])
    os.kill(pids[0], signal.SIGKILL)
    third = group.generate([(prompt(index), settings()) for index in range(40, 43)])
    assert sorted(answer.prompt.id for answer in first) == [f"p{index}" for index in range(6)]
    assert sorted(answer.prompt.id for answer in third) == [f"p{index}" for index in range(40, 43)]
    assert sorted(answer.prompt.id for answer in second) == [f"p{index}" for index in range(20, 26)]
    assert group._room.in_flight == (0, 0)
    assert group._work == []
    group.close()


def test_an_error_of_an_engine_that_lives_is_raised(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_group, "_NOTICE_S", 0.5)
    group, _ = group_of(made, count=1)
    with pytest.raises(BasculeError, match="a prompt that no engine takes"):
        list(group.generate([(prompt(13), settings())]))
    assert group.pool.recoveries == 0
    group.close()


def test_without_engines_the_error_says_why_each_was_lost(made: Any, tmp_path: Path) -> None:
    group, pids = group_of(made, count=1)
    (tmp_path / "cannot-start").touch()
    os.kill(pids[0], signal.SIGKILL)
    with pytest.raises(EngineLostError, match=r"no engine is left: engine 0: .*; then .*no weights"):
        list(group.generate([(prompt(0), settings(max_tokens=20))]))
    group.close()


def test_engines_are_not_replaced_more_often_than_allowed(made: Any) -> None:
    group, pids = group_of(made, recoveries=1)
    os.kill(pids[0], signal.SIGKILL)
    until(lambda: group.pool.members("new"))
    os.kill(pids[1], signal.SIGKILL)
    until(lambda: not group.pool.members("up"))
    time.sleep(0.5)
    assert not group.pool.members("starting")
    answers = list(group.generate((prompt(i), settings()) for i in range(2)))
    assert {answer.rollouts[0] for answer in answers}.isdisjoint(pids)
    group.close()

"""The group's own behaviour, with engines that only hand out references."""

from typing import Any

import pytest
import ray

from actors import deadline
from actors.engine_group import EngineGroup
from actors.engine_pool import EnginePool
from tests.actors.engine_helpers import prompt, settings

pytestmark = pytest.mark.engine


class Method:
    def remote(self, *arguments: Any) -> object:
        return object()


class Engine:
    generate = Method()


def test_an_iterator_left_behind_by_an_error_does_not_start_a_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check, closing it after the run's end hung the process: ray.cancel joined a new cluster."""

    def late(*arguments: Any, **options: Any) -> tuple[list[Any], list[Any]]:
        raise deadline.DeadlineExceededError("late")

    def cancel(*arguments: Any, **options: Any) -> None:
        raise AssertionError("ray was called after the run had left it")

    monkeypatch.setattr(ray, "wait", late)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "cancel", cancel)
    group = EngineGroup(EnginePool([Engine()]), room=4, timeout_s=1)
    with pytest.raises(deadline.DeadlineExceededError, match="late"):
        next(group.generate([(prompt(0), settings(n=3))]))
    # The room is free again: four more fit.
    with pytest.raises(deadline.DeadlineExceededError, match="late"):
        next(group.generate([(prompt(0), settings(n=4))]))


def test_the_load_counts_what_engines_have_and_what_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    # Another test of this process may have left Ray running, which cancels no references that are not its own.
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    group = EngineGroup(EnginePool([Engine(), Engine()]), room=4, timeout_s=1)
    assert group.load() == {"engines/up": 2, "engines/running": 0, "engines/waiting": 0}
    # Begins with the call: one of three completions in each engine, the other three wait.
    group.generate((prompt(number), settings(n=3)) for number in range(5))
    assert group.load() == {"engines/up": 2, "engines/running": 2, "engines/waiting": 3}
    group.generate([(prompt(9), settings(n=1))])
    assert group.load() == {"engines/up": 2, "engines/running": 2, "engines/waiting": 4}
    group.give_up()
    assert group.load() == {"engines/up": 2, "engines/running": 0, "engines/waiting": 0}

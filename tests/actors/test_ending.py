"""Signals, time limits and draining nodes end a run with time to save."""

import os
import signal
import time
from typing import Any

import pytest

from actors.draining import reason_of
from actors.ending import EndedEarlyError, Ending, Reason
from configs.schema import RunConfig
from configs.sizes import parse_duration


class Silent:
    def line(self, text: str) -> None:
        pass

    def progress(self, done: int, total: int) -> None:
        pass


def ending(started: float | None = None, **changed: Any) -> Ending:
    needed = {"model": {"model": "m"}, "data": {"dataset": "d"}, "algorithm": "sft"}
    config = RunConfig.model_validate({**needed, **changed})
    return Ending(config, Silent(), time.monotonic() if started is None else started)


def test_sigterm_lets_a_step_go_on_until_there_is_just_time_to_save() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with ending(cluster={"grace_s": 1.0}) as end:
        end.loop_begins()
        start = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)
        assert end.reason is not None
        assert end.reason.exit_code == 143
        # A step that hangs: of the second that is given, 0.3 s are the step's.
        with pytest.raises(KeyboardInterrupt):
            time.sleep(5)
        assert 0.25 < time.monotonic() - start < 0.9
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_save_is_not_interrupted_but_what_comes_after_it() -> None:
    with ending(cluster={"grace_s": 0.2}) as end:
        end.loop_begins()
        os.kill(os.getpid(), signal.SIGTERM)
        with end.shielded():
            time.sleep(0.2)
        with pytest.raises(KeyboardInterrupt):
            time.sleep(5)


def test_nothing_interrupts_the_end_itself() -> None:
    with ending(cluster={"grace_s": 0.2}) as end:
        end.loop_begins()
        os.kill(os.getpid(), signal.SIGTERM)
        end.loop_ends()
        time.sleep(0.2)


def test_an_interrupt_waits_for_the_step_and_a_second_one_does_not() -> None:
    with ending() as end:
        end.loop_begins()
        os.kill(os.getpid(), signal.SIGINT)
        assert (end.reason is not None and end.reason.exit_code, end.at_once) == (130, False)
        time.sleep(0.05)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert end.at_once


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_start_is_given_up_at_once(number: int) -> None:
    with ending() as end:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        assert end.at_once == (number == signal.SIGINT)


def test_the_time_limit_leaves_out_a_step_that_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with ending(started=0.0, time_limit="5m") as end:
        end.loop_begins()
        # Steps of 80 s at most; 1.25 times that, and 1.25 x 4 + 2 s for save and end, fit three times.
        for _ in range(2):
            now += 80
            end.step_done()
        # 260 of 300 s are over.
        assert end.reason is not None
        assert end.reason.exit_code == 0
    now = 100.0
    with ending(started=0.0, time_limit="5m") as end:
        end.loop_begins()
        end.saved(4.0)
        now = 180.0
        end.step_done()
        # 100 s and 7 s are left of 120.
        assert end.reason is None


def test_the_grace_is_the_jobs_under_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[float] = []
    for environment in ({}, {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}, {"RAY_JOB_STOP_WAIT_TIME_S": "60"}):
        monkeypatch.setattr(os, "environ", environment)
        with ending() as end:
            end.loop_begins()
            os.kill(os.getpid(), signal.SIGTERM)
            assert end.reason is not None
            assert end.reason.until is not None
            left.append(end.reason.until - time.monotonic())
    assert left == pytest.approx([30, 3, 60], abs=0.5)


def test_a_draining_node_ends_the_run_if_it_hosts_it() -> None:
    in_a_minute = int((time.time() + 60) * 1000)
    assert reason_of({"other": in_a_minute}, lambda: {"mine"}) is None
    reason = reason_of({"other": 0, "mine": in_a_minute, "also": 0}, lambda: {"mine", "also"})
    assert reason is not None
    assert reason.exit_code == 75
    assert reason.until is not None
    assert reason.until - time.monotonic() == pytest.approx(60, abs=1)


def test_the_message_says_what_a_new_start_does() -> None:
    why = Reason(text="SIGTERM", exit_code=143, until=None)
    assert str(EndedEarlyError(why, 7, 6)) == (
        "SIGTERM: ended after step 7; started again it goes on after step 6"
    )
    assert "there is no state yet" in str(EndedEarlyError(why, 0, None))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("4h", 14400), ("90m", 5400), ("1h30m", 5400), (45, 45), ("1d", 86400), ("2.5m", 150)],
)
def test_durations(text: object, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "4 hours", "-1", "0", "h", "1h-3m"])
def test_no_durations(text: str) -> None:
    with pytest.raises(ValueError, match="is no duration"):
        parse_duration(text)

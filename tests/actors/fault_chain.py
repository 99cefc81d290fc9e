"""Runs of grpo that are hit by one fault after the other, judged by a run that is not. Not a test.

Everything is in one folder, and goes on where it was cut off: `faults.jsonl` and `reference.jsonl` are what the
runs told, step by step; see fault_driver.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.actors.fault_driver import METHODS, PHASES, Cell
from tests.actors.run_helpers import Finished, Running, make_workspace, start

AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
_NAMES = {"trainer": "trainer rank", "engine": "engine", "bridge": "bridge", "reward": "reward worker"}
_CONFIG = (
    *("--max_steps", "100000", "--resume_steps", "1", "--eval_steps", "2", "--lr", "1e-4"),
    *("--grpo.filter_zero_variance", "false", "--reward_workers.num_workers", "1"),
    *("--cluster.step_timeout_s", "90", "--cluster.collective_timeout_s", "15", "--rewards.0.timeout_s", "2"),
    *("--bridge.stall_timeout_s", "10", "--rollout.heartbeat_timeout_s", "15", "--record.token_steps", "0"),
    *("--bridge.max_recoveries", "1000", "--reward_workers.max_recoveries", "1000"),
)
_START_S = 240
# Whoever is stopped at a start is noticed at its deadline.
_SHORT_START_S = 45
_LIMIT_S = 1500.0
# Steps after a fault before a run is told to end.
_AFTER = 2

Line = Mapping[str, Any]


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


def can_be(cell: Cell) -> bool:
    """Whether the cell exists: an actor raises only in a phase in which it does something."""
    return cell.how != "raise" or cell.kind == "driver" or cell.phase in METHODS[cell.kind]


def ends(cell: Cell) -> bool:
    """Whether a run is expected to end there, so that the next fault needs another start."""
    return cell.phase == "start" or cell.how == "raise" or (cell.kind, cell.how) == ("driver", "kill")


def cells_of(kinds: Sequence[str], phases: Sequence[str], hows: Sequence[str]) -> list[Cell]:
    """All cells that can be; those that a run goes on from first, since one run carries them all."""
    order = [phase for phase in PHASES if phase in phases]
    found = [Cell(kind=kind, phase=phase, how=how) for how in hows for kind in kinds for phase in order]
    return sorted(filter(can_be, found), key=ends)


@dataclass(frozen=True, kw_only=True, slots=True)
class Chain:
    """A folder with the runs."""

    folder: Path

    def __post_init__(self) -> None:
        if not (self.folder / "model").is_dir():
            self.folder.mkdir(parents=True, exist_ok=True)
            make_workspace(self.folder)

    def words(self, name: str, more: Sequence[str] = ()) -> list[str]:
        """The command of the run with this name."""
        config = ("grpo", "--config", str(self.folder / "grpo.yaml"))
        return [*config, "--output_dir", str(self.folder / name), *_CONFIG, *more]

    def lines(self, name: str) -> list[Line]:
        """What the runs of this name have told; the last line may be half written."""
        path = self.folder / f"{name}.jsonl"
        text = path.read_text() if path.is_file() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def tell(self, name: str, **line: Any) -> None:
        with (self.folder / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps({"time": time.time(), **line}) + "\n")

    def run(
        self, cells: Sequence[Cell], steps: int = 0, look: Callable[[Running], None] = lambda _: None
    ) -> None:
        """Hit with the cells that were not yet, in as many starts of one run as that takes; `steps` at least."""
        while (left := self._left(cells)) or self._last("faults") < max(steps, self._struck() + _AFTER):
            text = f"{len(cells) - len(left)} of {len(cells)} faults so far, next {left[:1]}"
            say(f"{time.strftime('%H:%M:%S')} start of the run: {text}")
            finished = self._attempt("faults", left, lambda: self._is_over(cells, steps), look)
            if finished.code == 0:
                raise AssertionError("the run has ended before all faults")

    def reference(self, look: Callable[[Running], None] = lambda _: None) -> None:
        """A run that nothing happens to, as far as the other got."""
        last = self._last("faults")

        def is_over() -> bool:
            return self._last("reference") >= last

        if not is_over():
            self._attempt("reference", [], is_over, look)

    def _attempt(
        self, name: str, cells: Sequence[Cell], is_over: Callable[[], bool], look: Callable[[Running], None]
    ) -> Finished:
        for flag in self.folder.glob("raise-*"):
            flag.unlink()
        plan = self.folder / "plan.json"
        log = str(self.folder / f"{name}.jsonl")
        plan.write_text(json.dumps({"cells": [asdict(cell) for cell in cells], "log": log}))
        is_stop = bool(cells) and (cells[0].phase, cells[0].how) == ("start", "stop")
        seconds = _SHORT_START_S if is_stop else _START_S
        words = self.words(name, ("--cluster.start_timeout_s", str(seconds)))
        running = start(*words, program=("-m", "tests.actors.fault_driver", str(plan)))
        began = time.monotonic()
        is_told = False
        try:
            while running.process.poll() is None:
                time.sleep(0.2)
                look(running)
                if time.monotonic() > began + _LIMIT_S:
                    raise TimeoutError(f"a run of {name} goes on for {_LIMIT_S:.0f} s")
                if not is_told and is_over():
                    running.process.send_signal(signal.SIGINT)
                    is_told = True
            finished = running.finish(60)
        finally:
            for pid in running.pids(""):
                os.kill(pid, signal.SIGKILL)
        err = (self.folder / f"{name}.err").read_text()[-3000:]
        self.tell(name, exit=finished.code, told=is_told, left=finished.left, err=err)
        return finished

    def _left(self, cells: Sequence[Cell]) -> list[Cell]:
        struck = [tuple(line["fault"]) for line in self.lines("faults") if "fault" in line]
        left: list[Cell] = []
        for cell in cells:
            key = (cell.kind, cell.phase, cell.how)
            if key in struck:
                struck.remove(key)
            else:
                left.append(cell)
        return left

    def _is_over(self, cells: Sequence[Cell], steps: int) -> bool:
        """Whether nothing more is to come in this start: all is done, or the next fault is one of a start."""
        left, lines = self._left(cells), self.lines("faults")
        if not left:
            return self._last("faults") >= max(steps, self._struck() + _AFTER)
        if left[0].phase != "start":
            return False
        last = max(
            (number for number, line in enumerate(lines) if "fault" in line or "exit" in line), default=0
        )
        struck = lines[last].get("step") or 0 if lines else 0
        return any(line.get("step_done", 0) >= struck + _AFTER for line in lines[last:])

    def _last(self, name: str) -> int:
        """The last step that the runs of this name have done."""
        return max((line["step_done"] for line in self.lines(name) if "step_done" in line), default=0)

    def _struck(self) -> int:
        """The step of the last fault that came in a step."""
        return max((line["step"] or 0 for line in self.lines("faults") if "fault" in line), default=0)

    def rows(self) -> Iterator[tuple[Cell, str, float]]:
        """What came of each cell, and the seconds until its step was done, or the run had ended."""
        lines = self.lines("faults")
        places = [number for number, line in enumerate(lines) if "fault" in line]
        expected = _facts(self.lines("reference"))
        for place, following in zip(places, [*places[1:], len(lines)], strict=False):
            cell = Cell(**dict(zip(("kind", "phase", "how"), lines[place]["fault"], strict=True)))
            mine, later = lines[place + 1 : following], lines[place + 1 :]
            yield cell, *_judge(cell, lines[place], mine, later, expected)


def _facts(lines: Sequence[Line]) -> dict[str, Any]:
    """Hash of the weights by version, and the numbers by step, as the run told them last."""
    found: dict[str, Any] = {}
    for line in lines:
        if "version" in line:
            found[f"weights {line['version']}"] = line["sha256"]
        if "step_done" in line:
            found[f"step {line['step_done']}"] = [line[name] for name in ("reward", "loss", "grad_norm")]
    return found


def _judge(
    cell: Cell, fault: Line, mine: Sequence[Line], later: Sequence[Line], expected: Mapping[str, Any]
) -> tuple[str, float]:
    """What came of a fault, from the lines up to the next one, and from all that follow.

    A fault at the start is over when the run goes on; another, when its step is done. The next fault may
    come before that: one at the start of an engine strikes while the ranks of the last one are replaced.
    """
    if cell.how == "raise" and cell.kind != "driver" and not any("raised" in line for line in mine):
        return "not judged: nothing has raised", 0.0
    done = next((number for number, line in enumerate(later) if _over(cell, fault, line)), None)
    end = next((number for number, line in enumerate(mine) if "exit" in line and not line["told"]), None)
    facts = _facts(mine if done is None else later[: max(done + 2, len(mine))])
    wrong = [name for name, value in facts.items() if name in expected and expected[name] != value]
    if wrong:
        return f"WRONG: other numbers than without faults: {', '.join(wrong[:3])}", 0.0
    if end is not None and (done is None or end < done):
        return _judge_end(cell, mine[end]), mine[end]["time"] - fault["time"]
    compared = {name.partition(" ")[0] for name in facts if name in expected}
    needed = {"weights"} if cell.phase == "start" else {"weights", "step"}
    if done is None or not compared >= needed:
        return "not judged: cut off", 0.0
    missed = any(line.get("inside") is False for line in mine) and cell.phase != "score"
    late = " (just after it)" if missed else ""
    return f"{_what(later[: max(done, len(mine))])}{late}", later[done]["time"] - fault["time"]


def _over(cell: Cell, fault: Line, line: Line) -> bool:
    if cell.phase == "start" and line.get("event") == "resume":
        return True
    return line.get("step_done", -1) >= (fault["step"] or 0)


def _judge_end(cell: Cell, end: Line) -> str:
    # When the driver is killed, Ray's own agents may take half a minute to notice.
    left = [line for line in end["left"] if not line.startswith(AGENTS)]
    if left:
        return f"WRONG: processes are left: {left}"
    if (cell.kind, cell.how) == ("driver", "kill"):
        return "ends"
    if end["exit"] <= 0:
        return f"WRONG: exit code {end['exit']}"
    if _NAMES.get(cell.kind, "injected fault of the driver") not in end["err"]:
        return f"WRONG: not named: {end['err'][-300:]}"
    return "ends, named"


def _what(lines: Sequence[Line]) -> str:
    """What was replaced."""
    texts = [line["text"] for line in lines if line.get("event") == "restart"]
    names = {
        "ranks": "trainer ranks were started again",
        "engine": "engine 0 was started again",
        "worker": "reward worker 0 was started again",
        "sent again": "weights are sent again",
    }
    return (
        " + ".join(name for name, words in names.items() if any(words in text for text in texts)) or "nothing"
    )


def table(chain: Chain) -> bool:
    """Print a table for each kind of fault; whether all that can be was tried and nothing is wrong."""
    found = {(cell.kind, cell.phase, cell.how): (text, seconds) for cell, text, seconds in chain.rows()}
    for how in dict.fromkeys(how for _, _, how in found):
        say(f"\n| {how} | {' | '.join(PHASES)} |\n|---|{'---|' * len(PHASES)}")
        for kind in dict.fromkeys(kind for kind, _, its in found if its == how):
            cells = [Cell(kind=kind, phase=phase, how=how) for phase in PHASES]
            say(f"| {kind} | {' | '.join(_short(cell, found) for cell in cells)} |")
    wrong = {cell: text for cell, (text, _) in found.items() if text.startswith(("WRONG", "not judged"))}
    for cell, text in wrong.items():
        say(f"{' '.join(cell)}: {text}")
    return not wrong


def _short(cell: Cell, found: Mapping[tuple[str, str, str], tuple[str, float]]) -> str:
    if not can_be(cell):
        return "-"
    text, seconds = found.get((cell.kind, cell.phase, cell.how), ("not tried", 0.0))
    return f"{text} {seconds:.0f} s" if seconds else text.partition(":")[0]

"""What a run writes while it goes: metrics, completions, their tokens, events, TensorBoard, one line a step."""

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from actors.console import Console
from actors.ending import EndedEarlyError
from actors.events import EventLog
from actors.resume_state import FOLDER, RESULT, State, forget, truncate_files
from actors.sinks import TRACKERS, Sink, Sinks, TensorBoard
from actors.status_file import StatusFile
from actors.trace import Trace, Tracks
from algorithms.data import FloatRow, Scored, TokenRecord
from algorithms.stored_rollouts import stored_row
from configs.errors import WriteError, naming

_FILES = ("metrics.jsonl", "rollouts.jsonl", "tokens.jsonl", "events.jsonl")
_PHASES = ("generate", "train", "sync")
_CURVES = {"reward": "mean reward", "teacher_kl": "reverse KL to the teacher", "loss": "loss per token"}


def warn(warnings: Sequence[str], console: Console) -> None:
    """Show what trainers noticed while loading."""
    for warning in warnings:
        console.line(f"warning: {warning}")


class RunRecorder:
    """Recorder of a run directory. Lines are complete and on disk after every step. A context manager."""

    def __init__(
        self,
        directory: Path,
        max_steps: int,
        console: Console,
        *,
        algorithm: str = "",
        token_texts: Callable[[Sequence[int]], list[str]] | None = None,
        state: State | None = None,
        sinks: Sequence[Sink] = (),
        trace_steps: int = 0,
    ) -> None:
        """`token_texts` gives the text of each token; without it a token is written as its number. The records
        go on after `state`, when there is one. `sinks` are told besides TensorBoard, and the trace has
        `trace_steps` steps, at least the newest (actors.trace)."""
        self._directory = directory
        self._max_steps = max_steps
        self._console = console
        self._algorithm = algorithm
        self._token_texts = token_texts or (lambda ids: list(map(str, ids)))
        self._log = EventLog(directory / "events.jsonl")
        self.status = StatusFile(directory)
        self._trace = Trace(directory, trace_steps)
        self._sinks = Sinks([*sinks, TensorBoard(directory), self._trace], console.line)
        self._more: list[Callable[[], Mapping[str, float]]] = []
        self._made = time.monotonic()
        self._state = state
        self._last = 0 if state is None else state.step
        self.rows: list[dict[str, float]] = []
        self.evaluations: list[dict[str, float]] = []
        self.swapped = False
        """Whether rewards were replaced, so that evaluations before and after measure different things."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics and one console line."""
        metrics = {**metrics, **{name: value for more in self._more for name, value in more().items()}}
        row = {"step": step, **metrics}
        self._last = step
        self.rows.append(row)
        path = self._directory / _FILES[0]
        if not path.exists():
            raise WriteError(f"{path} is gone, with what else was in the run directory")
        self._write(row)
        self._console.line(self._line(step, metrics))
        self._console.progress(step, self._max_steps)

    def rollouts(self, step: int, scored: Iterable[Scored]) -> None:
        """Write every completion with its reward and parts."""
        self._write_rollouts(step, "train", scored)

    def evaluation(self, step: int, scored: Iterable[Scored], metrics: Mapping[str, float]) -> None:
        """Write completions, metrics and one console line; nothing when nothing was evaluated."""
        if not metrics:
            return
        row = {"step": step, **metrics}
        self.evaluations.append(row)
        self._write(row)
        self._write_rollouts(step, "eval", scored)
        name = headline(metrics)
        self._console.line(f"eval at step {step}: {name} {metrics[f'eval/{name}']:.3f}")

    def tokens(self, step: int, records: Iterable[TokenRecord]) -> None:
        """Write the tokens of completions with what was thought of them, log-probabilities in nats."""
        for each in records:
            row: dict[str, Any] = {
                "step": step,
                "prompt_id": each.prompt_id,
                "index": each.index,
                "advantage": _short(each.advantage),
                "tokens": self._token_texts(each.tokens.tolist()),
                "logprobs": _short_row(each.logprobs),
                "trainer_logprobs": _short_row(each.trainer_logprobs),
                "updated_logprobs": _short_row(each.updated_logprobs),
            }
            self._tokens.write(json.dumps(row) + "\n")
        self._tokens.flush()

    @contextlib.contextmanager
    def phase(self, name: str) -> Generator[None]:
        """The body of a `with` statement is this phase."""
        self._sinks.tell(lambda sink: sink.phase(name, begins=True))
        try:
            with self._trace.spans(name):
                yield
        finally:
            self._sinks.tell(lambda sink: sink.phase(name, begins=False))

    def waiting(self, phase: str, owners: Sequence[str], seconds: float) -> None:
        """A wait goes on (actors.deadline.Observer)."""
        self.status.waiting(phase, owners, seconds)
        self._sinks.tell(lambda sink: sink.waiting(phase, owners, seconds))

    def watch(self, *tracks: Tracks, numbers: Callable[[], Mapping[str, float]] | None = None) -> None:
        """Have the spans of these processes in the trace, and `numbers` in the row of each step."""
        for each in tracks:
            self._trace.watch(each)
        self._more += [] if numbers is None else [numbers]

    def event(self, step: int | None, kind: str, text: str, **details: object) -> None:
        """Write what happened; a step of None is the one under way. Works before and after the `with` as well."""
        if kind == "restart":
            self.status.restarted()
        self.swapped |= kind == "reward" and not details.get("refused", False)
        self._log.write(self._last + 1 if step is None else step, kind, text, **finite_or_none(details))
        self._sinks.tell(lambda sink: sink.event(kind))

    def _write(self, row: Mapping[str, float]) -> None:
        with naming(self._directory / _FILES[0]):
            self._metrics.write(json.dumps(finite_or_none(row)) + "\n")
            self._metrics.flush()
        self._sinks.tell(lambda sink: sink.row(row))

    def _write_rollouts(self, step: int, split: str, scored: Iterable[Scored]) -> None:
        with naming(self._directory / _FILES[1]):
            for each in scored:
                for number in range(len(each.group.rollouts)):
                    row = stored_row(step, split, each, number)
                    self._rollouts.write(json.dumps(row) + "\n")
            self._rollouts.flush()

    def _line(self, step: int, metrics: Mapping[str, float]) -> str:
        width = len(str(self._max_steps))
        parts = [f"step {step:{width}d}/{self._max_steps}"]
        parts += [f"reward {metrics['reward']:.3f}"] if "reward" in metrics else []
        parts.append(f"loss {metrics['loss']:.4f}" if "loss" in metrics else "no signal")
        parts += [f"grad norm {metrics['grad_norm']:.3f}"] if "grad_norm" in metrics else []
        parts.append(f"{metrics['tokens_per_second']:.0f} tokens/s")
        times = [f"{name} {metrics[f'time/{name}']:.2f}s" for name in _PHASES if f"time/{name}" in metrics]
        return "  ".join([*parts, *times])

    def __enter__(self) -> Self:
        """Open the files, replacing those of an earlier run, or cutting off what came after the state. Not sooner:
        a start that fails must cost nothing."""
        self._sinks.tell(lambda sink: sink.open(None if self._state is None else self._last))
        self._open(self._state)
        self._started = time.monotonic()
        seconds = self._started - self._made
        kind, begins = (
            ("start", "begins") if self._state is None else ("resume", f"goes on after step {self._last}")
        )
        text = f"{self._algorithm or 'run'} {begins}, {seconds:.1f} s after its start"
        self.event(self._last, kind, text, algorithm=self._algorithm, seconds=round(seconds, 1))
        return self

    def go_back(self, state: State | None) -> None:
        """Forget what was recorded after `state`, or everything; events since stay, for they did happen."""
        self._close()
        self._last = 0 if state is None else state.step
        self.rows.clear()
        self.evaluations.clear()
        self._open(state, _FILES[:-1])
        self._sinks.tell(lambda sink: sink.go_back(None if state is None else state.step))

    def _open(self, state: State | None, cut: Sequence[str] = _FILES) -> None:
        if state is None:
            self._start_anew(cut)
        else:
            self._go_on(state, cut)
        metrics, rollouts, tokens, _ = (self._directory / name for name in _FILES)
        self._metrics, self._rollouts, self._tokens = metrics.open("a"), rollouts.open("a"), tokens.open("a")

    def _close(self) -> None:
        self._metrics.close()
        self._rollouts.close()
        self._tokens.close()

    def _start_anew(self, cut: Sequence[str]) -> None:
        for name in ("checkpoint", FOLDER):
            shutil.rmtree(self._directory / name, ignore_errors=True)
        for name in (RESULT, "curve.png", "last", "best", TRACKERS):
            (self._directory / name).unlink(missing_ok=True)
        for name in cut:
            (self._directory / name).write_text("")

    def _go_on(self, state: State, cut: Sequence[str]) -> None:
        forget(self._directory, lambda steps: {step for step in steps if step <= state.step})
        for name in (RESULT, "curve.png"):
            (self._directory / name).unlink(missing_ok=True)
        sizes = state.manifest.files
        truncate_files(self._directory, {name: size for name, size in sizes.items() if name in cut})
        self.swapped = state.manifest.swapped
        for line in (self._directory / "metrics.jsonl").read_text().splitlines():
            row = {name: math.nan if value is None else value for name, value in json.loads(line).items()}
            (self.evaluations if any(name.startswith("eval/") for name in row) else self.rows).append(row)

    def line(self, text: str) -> None:
        """Show a line to whoever reads along."""
        self._console.line(text)

    def sizes(self) -> dict[str, int]:
        """Bytes of each file of records; nothing before they are opened."""
        found = [self._directory / name for name in _FILES]
        return {path.name: path.stat().st_size for path in found if path.is_file()}

    def sync(self) -> None:
        """Wait until all records are on disk."""
        for file in (self._metrics, self._rollouts, self._tokens):
            os.fsync(file.fileno())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        seconds = time.monotonic() - self._started
        outcome = "ended" if error is None else "failed" if isinstance(error, Exception) else "interrupted"
        if isinstance(error, EndedEarlyError):
            outcome = "interrupted"
        why = f": {type(error).__name__}: {error}".partition("\n")[0] if outcome == "failed" else ""
        text = f"training {outcome} after {seconds:.1f} s{why}"
        # Where nothing can be written any more, why the run failed says more.
        hidden = (WriteError, OSError) if error is not None else ()
        with contextlib.suppress(*hidden):
            self.event(self._last, "end", text, seconds=round(seconds, 1), outcome=outcome)
        with contextlib.suppress(*hidden):
            self._close()
        self._sinks.tell(lambda sink: sink.close(outcome))


def _short(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def _short_row(row: FloatRow) -> list[float | None]:
    return [_short(value) for value in row.tolist()]


def headline(evaluation: Mapping[str, float]) -> str:
    """What an evaluation is about, without `eval/`: an accuracy, a distance to a teacher, or a loss."""
    names = ("accuracy", "divergence", "teacher_kl", "loss")
    return next(name for name in names if f"eval/{name}" in evaluation)


def finite_or_none(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with None for NaN and infinity, which JSON does not have."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


def plot_curve(recorder: RunRecorder, path: Path) -> None:
    """A PNG of the mean reward by step, or what else is learned from, and of what was held out, where measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [finite_or_none(row) for row in recorder.rows]
    # A run that learns from a teacher alone has rewards that are NaN.
    name = next((name for name in _CURVES if any(row.get(name) is not None for row in rows)), "loss")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel=_CURVES[name])
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    axes.plot(*zip(*points, strict=True), linewidth=1.5, label=f"training {name}")
    if recorder.evaluations:
        measure = headline(recorder.evaluations[0])
        points = [(row["step"], row[f"eval/{measure}"]) for row in recorder.evaluations]
        label = "held-out accuracy (greedy)" if measure == "accuracy" else f"held-out {measure}"
        axes.plot(*zip(*points, strict=True), "o--", label=label)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)

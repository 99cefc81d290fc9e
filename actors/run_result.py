"""result.json: what came of a run."""

import json
from pathlib import Path
from typing import Any

from actors.ending import EndedEarlyError
from actors.metrics import RunRecorder, finite_or_none, headline, plot_curve
from actors.resume_state import FOLDER, RESULT, name_of


def write_result(directory: Path, recorder: RunRecorder, *, seconds: float) -> dict[str, Any]:
    """Write and return what a run that came to its last step has to say, and draw its curve."""
    curve = directory / "curve.png"
    plot_curve(recorder, curve)
    result: dict[str, Any] = {
        "checkpoint": str(directory / "checkpoint"),
        "curve": str(curve),
        "seconds_train": round(seconds, 1),
        "finished": True,
    }
    if recorder.evaluations:
        first, last = recorder.evaluations[0], recorder.evaluations[-1]
        name = headline(first)
        measured = {f"{name}_before": first[f"eval/{name}"], f"{name}_after": last[f"eval/{name}"]}
        if name == "loss":
            measured["loss_best"] = last["eval/best_loss"]
        result = finite_or_none(measured | result)
    _write(directory, result)
    return result


def write_early_end(directory: Path, recorder: RunRecorder, why: EndedEarlyError) -> None:
    """Say that the run did not come to its last step, and where it can go on."""
    state = None if why.saved is None else str(directory / FOLDER / name_of(why.saved))
    row = {"finished": False, "step": why.step, "state": state, "why": str(why), "exit_code": why.exit_code}
    _write(directory, row)
    if recorder.rows:
        plot_curve(recorder, directory / "curve.png")


def _write(directory: Path, content: dict[str, Any]) -> None:
    partial = directory / f"{RESULT}.partial"
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(directory / RESULT)

import json
from pathlib import Path

import numpy as np
import pytest

from actors.metrics import RunRecorder, plot_curve
from algorithms.data import Group, Prompt, Rollout, Scored, float_row, int_row
from algorithms.evaluation import reward_metrics

NAN = float("nan")


class Console:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.done: list[tuple[int, int]] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def progress(self, done: int, total: int) -> None:
        self.done.append((done, total))


def scored() -> Scored:
    rollouts = tuple(
        Rollout(
            tokens=int_row([1] * length),
            logprobs=float_row([-1.0] * length),
            text="x" * length,
            finish=finish,
            loss_mask=int_row([1] * length),
            versions=(3, 4),
        )
        for length, finish in ((2, "stop"), (4, "length"), (3, "abort"))
    )
    prompt = Prompt(id="p", tokens=int_row([1]), messages=({"role": "user", "content": "hi"},), columns={})
    group = Group(prompt=prompt, rollouts=rollouts)
    return Scored(
        group=group,
        rewards=float_row([1.0, 0.0, NAN]),
        parts={"good": (1.0, 0.0, None), "rare": (None, None, None)},
    )


def test_reward_metrics_are_means_over_what_is_known() -> None:
    metrics = reward_metrics([scored()])
    assert metrics["reward"] == 0.5
    assert metrics["reward_std"] == 0.5
    assert metrics["completions/mean_length"] == 3
    assert metrics["completions/clipped_ratio"] == pytest.approx(1 / 3)
    assert metrics["completions/aborted_ratio"] == pytest.approx(1 / 3)
    assert metrics["rewards/good/mean"] == 0.5
    assert metrics["rewards/good/none_ratio"] == pytest.approx(1 / 3)
    assert np.isnan(metrics["rewards/rare/mean"])


def test_everything_is_on_disk_after_the_step(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    console = Console()
    metrics = {
        "reward": 0.25,
        "loss": 0.125,
        "grad_norm": 2.0,
        "tokens_per_second": 10.0,
        "time/train": 1.5,
        "x": NAN,
    }
    with RunRecorder(tmp_path, 10, console) as recorder:
        recorder.rollouts(1, [scored()])
        recorder.step(1, metrics)
        recorder.evaluation(1, [scored()], {"eval/accuracy": 0.75})
        recorder.evaluation(1, [], {})
        first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
        rollouts = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
        plot_curve(recorder, tmp_path / "curve.png")
    assert first == {"step": 1, **metrics, "x": None}
    assert second == {"step": 1, "eval/accuracy": 0.75}
    assert [row["split"] for row in rollouts] == ["train"] * 3 + ["eval"] * 3
    assert rollouts[2] == {
        "step": 1,
        "split": "train",
        "prompt_id": "p",
        "messages": [{"role": "user", "content": "hi"}],
        "completion": "xxx",
        "finish": "abort",
        "tokens": 3,
        "reward": None,
        "rewards": {"good": None, "rare": None},
        "weight_versions": [3, 4],
    }
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Scalars("eval/accuracy")[0].value == 0.75
    assert events.Scalars("reward")[0].step == 1
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert console.lines == [
        "step  1/10  reward 0.250  loss 0.1250  grad norm 2.000  10 tokens/s  train 1.50s",
        "eval at step 1: accuracy 0.750",
    ]
    assert console.done == [(1, 10)]

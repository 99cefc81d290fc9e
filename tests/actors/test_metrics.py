import json
from pathlib import Path

import numpy as np
import pytest

from actors.metrics import RunRecorder, plot_curve
from actors.token_texts import token_texts
from algorithms.data import Group, Prompt, Rollout, Scored, TokenRecord, float_row, int_row
from algorithms.evaluation import reward_metrics
from tests.actors.consoles import Console

NAN = float("nan")


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
        "index": 2,
        "messages": [{"role": "user", "content": "hi"}],
        "completion": "xxx",
        "finish": "abort",
        "tokens": 3,
        "reward": None,
        "rewards": {"good": None, "rare": None},
        "token_ids": [1, 1, 1],
        "reward_sources": {},
        "columns": {},
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


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_tokens_are_written_with_their_texts_and_four_digits(tmp_path: Path) -> None:
    record = TokenRecord(
        prompt_id="p",
        index=1,
        advantage=-0.123456,
        tokens=int_row([7, 8]),
        logprobs=float_row([-0.5, -1.00006]),
        trainer_logprobs=float_row([-0.25, NAN]),
        updated_logprobs=float_row([-0.125, -2.0]),
    )
    with RunRecorder(
        tmp_path, 10, Console(), token_texts=lambda ids: [f"<{number}>" for number in ids]
    ) as recorder:
        recorder.tokens(4, [record])
        assert lines(tmp_path / "tokens.jsonl") == [
            {
                "step": 4,
                "prompt_id": "p",
                "index": 1,
                "advantage": -0.1235,
                "tokens": ["<7>", "<8>"],
                "logprobs": [-0.5, -1.0001],
                "trainer_logprobs": [-0.25, None],
                "updated_logprobs": [-0.125, -2.0],
            }
        ]


def test_events_have_their_step_and_frame_the_run(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text("of an earlier run\n")
    recorder = RunRecorder(tmp_path, 10, Console(), algorithm="sft")
    with recorder:
        recorder.step(1, {"loss": 0.5, "tokens_per_second": 1.0})
        recorder.event(None, "restart", "engine 0 is lost", engine=0, seconds=NAN)
    recorder.event(1, "checkpoint", "checkpoint saved")
    start, lost, end, saved = lines(tmp_path / "events.jsonl")
    assert (start["step"], start["kind"], start["algorithm"]) == (0, "start", "sft")
    # The time of a loss is that of the step under way.
    assert lost | {"time": ""} == {
        "time": "", "step": 2, "kind": "restart", "text": "engine 0 is lost", "engine": 0, "seconds": None,
    }  # fmt: skip
    assert (end["step"], end["kind"], end["outcome"]) == (1, "end", "ended")
    assert str(end["text"]).startswith("training ended after ")
    assert saved["kind"] == "checkpoint"
    assert all(str(each["time"]).endswith("+00:00") for each in (start, lost, end, saved))


def test_a_run_that_fails_says_so_in_its_events(tmp_path: Path) -> None:
    with pytest.raises(ValueError), RunRecorder(tmp_path, 10, Console()):
        raise ValueError("no luck\nat all")
    end = lines(tmp_path / "events.jsonl")[-1]
    assert end["outcome"] == "failed"
    assert str(end["text"]).endswith(" s: ValueError: no luck")
    with pytest.raises(KeyboardInterrupt), RunRecorder(tmp_path, 10, Console()):
        raise KeyboardInterrupt
    (_, end) = lines(tmp_path / "events.jsonl")
    assert end["outcome"] == "interrupted"
    assert str(end["text"]).endswith(" s")


def test_characters_that_tokens_share_are_in_the_last_of_them() -> None:
    parts = [b"a", b"\xe2", b"\x82", b"\xac", b" b", b"\xf0\x9f", b"\x98\x80!", b"\xc3"]

    def decode(ids: list[int]) -> str:
        return b"".join(parts[number] for number in ids).decode(errors="replace")

    texts = token_texts(range(len(parts)), decode)
    assert texts == ["a", "", "", "€", " b", "", "😀!", "\ufffd"]
    # A tokenizer that drops the space of the first word.
    assert token_texts([0, 4, 4], lambda ids: decode(ids).removeprefix(" ")) == ["a", " b", " b"]

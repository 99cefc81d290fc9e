"""Run directories for the viewer, written by the recorder of real runs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.metrics import RunRecorder
from actors.viewer.run import ViewedRun
from algorithms.data import Group, Prompt, Rollout, Scored, TokenRecord, float_row, int_row

HOSTILE = "<script>window.pwned=1</script></script><img src=x onerror=window.pwned=1>&amp;\u2028\u2029 'é\""
NAN = float("nan")


class Console:
    def line(self, text: str) -> None: ...

    def progress(self, done: int, total: int) -> None: ...


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, read without the viewer."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def opened(directory: Path) -> ViewedRun:
    """A run whose files have been read."""
    run = ViewedRun(directory)
    run.refresh()
    return run


def scored(
    prompt_id: str,
    question: str,
    completions: Sequence[tuple[str, float, float | None, str]],
    version: int = 0,
) -> Scored:
    """A group of completions, each with its text, reward, value of `good`, and finish; a word is a token."""
    rollouts = tuple(
        Rollout(
            tokens=int_row(range(len(text.split()))),
            logprobs=float_row([-1.0] * len(text.split())),
            text=text,
            finish=finish,  # pyright: ignore[reportArgumentType]
            loss_mask=int_row([1] * len(text.split())),
            versions=(version, version),
        )
        for text, _, _, finish in completions
    )
    prompt = Prompt(
        id=prompt_id, tokens=int_row([1]), messages=({"role": "user", "content": question},), columns={}
    )
    return Scored(
        group=Group(prompt=prompt, rollouts=rollouts),
        rewards=float_row([reward for _, reward, _, _ in completions]),
        parts={"good": tuple(good for _, _, good, _ in completions)},
    )


def write_grpo(directory: Path, steps: int = 6, prompts: int = 3) -> Path:
    """Groups of three; the middle one of a step is hostile; tokens at steps 1 and 5, and events."""
    directory.mkdir(exist_ok=True)
    (directory / "config.yaml").write_text(f"algorithm: grpo\nmax_steps: {steps}\nmodel: {{model: m/tiny}}\n")
    vocabulary = ["alpha", " <b>beta</b>", " gamma\n", " δ"]
    with RunRecorder(
        directory,
        steps,
        Console(),
        algorithm="grpo",
        token_texts=lambda ids: [vocabulary[number % 4] for number in ids],
    ) as recorder:
        recorder.evaluation(0, [group_of(0, 50)], {"eval/accuracy": 0.25, "eval/reward": 0.5})
        for step in range(1, steps + 1):
            groups = [group_of(step, number) for number in range(prompts)]
            recorder.rollouts(step, groups)
            if step in (1, 5):
                recorder.tokens(step, records(groups[0]))
            recorder.step(step, metrics_of(step))
            if step == 3:
                recorder.event(3, "reward", f"rewards: good has weight 2 now; {HOSTILE}")
        recorder.evaluation(steps, [group_of(steps, 51)], {"eval/accuracy": 0.75, "eval/reward": 1.0})
        recorder.event(steps, "checkpoint", "checkpoint saved")
    return directory


def group_of(step: int, number: int) -> Scored:
    """Rewards and lengths that differ between groups; `good` does not apply to the last completion."""
    base = (step * 7 + number * 3) % 10 / 10
    middle = f"{HOSTILE} step {step}" if number == 1 else f"Beta step {step}"
    return scored(
        f"p{number}",
        f"Question {number}: what is {step}?",
        [
            (f"alpha beta {'long ' * number}", base, 1.0, "stop"),
            (middle, base / 2, 0.0, "length"),
            ("none", NAN if number == 2 else 0.0, None, "abort" if number == 2 else "stop"),
        ],
        version=step - 1,
    )


def records(group: Scored) -> list[TokenRecord]:
    """Advantages 1, -0.5 and 0; the mismatch of the first completion's tokens is 0.5 and -0.25."""
    found = []
    for index, (rollout, advantage) in enumerate(zip(group.group.rollouts, (1.0, -0.5, 0.0), strict=True)):
        size = rollout.tokens.size
        mismatch = [0.5, -0.25, *[0.0] * size][:size] if index == 0 else [0.0] * size
        trainer = rollout.logprobs + float_row(mismatch)
        found.append(
            TokenRecord(
                prompt_id=group.group.prompt.id,
                index=index,
                advantage=advantage,
                tokens=rollout.tokens,
                logprobs=rollout.logprobs,
                trainer_logprobs=float_row(trainer),
                updated_logprobs=float_row(trainer + 0.125),
            )
        )
    return found


def metrics_of(step: int) -> dict[str, float]:
    """One step's, with a gap at the second, and names that no list knows."""
    return {
        "reward": step / 8,
        "loss": NAN if step == 2 else 1 / step,
        "kl": 0.001 * step,
        "sampling/mismatch_kl": 0.01,
        "completions/mean_length": 2.0 + step,
        "rewards/<b>odd</b>, name:&x=1/mean": step / 2,
        "time/generate": 1.5,
        "time/train": 0.5 * step,
        "time/step": 3.0,
        "tokens_per_second": 10.0,
    }


def write_sft(directory: Path) -> Path:
    """A run without completions."""
    directory.mkdir(exist_ok=True)
    with RunRecorder(directory, 3, Console(), algorithm="sft") as recorder:
        recorder.evaluation(0, [], {"eval/loss": 3.0, "eval/best_loss": 3.0, "eval/num_tokens": 10.0})
        for step in (1, 2, 3):
            row = {"loss": 3.0 - step, "grad_norm": 1.0, "tokens_per_second": 5.0, "time/train": 1.0}
            recorder.step(step, {**row, "time/step": 1.5})
        recorder.evaluation(3, [], {"eval/loss": 2.0, "eval/best_loss": 2.0, "eval/num_tokens": 10.0})
    return directory


def write_gkd(directory: Path) -> Path:
    """Completions without rewards, on every other step."""
    directory.mkdir(exist_ok=True)
    with RunRecorder(directory, 4, Console(), algorithm="gkd") as recorder:
        for step in (1, 2, 3, 4):
            if step % 2:
                each = scored("p", "Say it.", [(f"words of {step}", NAN, None, "stop")])
                group = Scored(group=each.group, rewards=each.rewards, parts={})
                recorder.rollouts(step, [group])
            row = {"on_policy": float(step % 2), "loss": 0.5, "divergence": 0.5 / step, "cross_entropy": 2.0}
            recorder.step(step, {**row, "tokens_per_second": 5.0, "time/teach": 0.1, "time/step": 0.5})
    return directory


def write_old(directory: Path) -> Path:
    """As runs were written before there were events, tokens and numbers of completions."""
    write_grpo(directory)
    text = (directory / "rollouts.jsonl").read_text()
    for number in range(3):
        text = text.replace(f'"index": {number}, ', "")
    (directory / "rollouts.jsonl").write_text(text)
    for name in ("tokens.jsonl", "events.jsonl", "config.yaml"):
        (directory / name).unlink()
    return directory

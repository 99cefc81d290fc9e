"""Groups of completions to score."""

from typing import Any

from algorithms.data import Group, Prompt, Rollout, float_row, int_row


def rollout(text: str, index: int = 0, finish: Any = "stop") -> Rollout:
    return Rollout(
        tokens=int_row([index, 9]),
        logprobs=float_row([0, 0]),
        text=text,
        finish=finish,
        loss_mask=int_row([1, 1]),
        versions=(0, 0),
    )


def group(*texts: str, name: str = "train-3", **columns: Any) -> Group:
    messages = ({"role": "user", "content": "2+3?"},)
    prompt = Prompt(id=name, tokens=int_row([1]), messages=messages, columns=columns)
    return Group(prompt=prompt, rollouts=tuple(rollout(text, index) for index, text in enumerate(texts)))

"""Rewards tried without a run: on the first rows of a dataset, and on what a run has recorded."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path
from typing import Any

from algorithms.data import Group, Prompt, Rollout, Verdict, float_row, int_row
from algorithms.datasets import read_splits
from algorithms.rewards.child import Loaded
from algorithms.rewards.loading import RewardSource, read_sources
from algorithms.rewards.process import RewardRunner
from algorithms.rewards.signature import check_arguments
from algorithms.rows import Row, prompt_messages
from algorithms.stored_rollouts import StoredGroup, read_rollouts
from configs.errors import ConfigError
from configs.rewards import RewardConfig
from configs.schema import RunConfig

# Columns in which a row's right answer usually is, the likeliest first.
_ANSWERS = ("completion", "answer", "solution", "ground_truth", "target", "response", "output", "label")
_START_S = 600.0


def groups_of_rows(config: RunConfig, count: int) -> list[tuple[Group, str]]:
    """The first rows, each with two completions to try: what the row says is right, and an empty one.

    With each comes the name of the column that was taken for right; a row without one has its prompt's text
    there. Raises ConfigError for a dataset that cannot be read.
    """
    rows, _ = read_splits(config.data, config.seed)
    encode = _encoder(config.model.model)
    return [_group_of(row, config.data.system_prompt, encode) for row in rows[:count]]


def _group_of(row: Row, system_prompt: str | None, encode: Any) -> tuple[Group, str]:
    messages = prompt_messages(row, system_prompt)
    found = next((name for name in _ANSWERS if isinstance(row.columns.get(name), str | int | float)), "")
    text = str(row.columns[found]) if found else messages[-1]["content"]
    rollouts = tuple(
        Rollout(
            tokens=int_row(tokens),
            logprobs=float_row([0.0] * len(tokens)),
            text=each,
            finish="stop",
            loss_mask=int_row([1] * len(tokens)),
            versions=(0, 0),
        )
        for each in (text, "")
        for tokens in [encode(each)]
    )
    prompt = Prompt(id=row.id, tokens=int_row([]), messages=tuple(messages), columns=row.columns)
    return Group(prompt=prompt, rollouts=rollouts), found


def _encoder(model: str | None) -> Any:
    """Token ids of a text by the model's tokenizer where it is at hand, else its bytes."""
    path = Path(model or "") / "tokenizer.json"
    if model is None or not path.is_file():
        return lambda text: list(text.encode())
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def load_in_child(
    sources: Sequence[RewardSource], columns: Sequence[frozenset[str]]
) -> tuple[RewardRunner, tuple[Loaded, ...]]:
    """A runner that has loaded them; the caller closes it.

    Raises ConfigError for one that does not load, or that asks for what no column has.
    """
    runner = RewardRunner(sources, start_timeout_s=_START_S)
    try:
        loaded = runner.start()
        for source, each in zip(sources, loaded, strict=True):
            for names in columns:
                check_arguments(each.signature, source.config.spelled, names)
    except ConfigError:
        runner.close()
        raise
    return runner, loaded


def stored_groups(path: Path, *, split: str | None, first_step: int, limit: int | None) -> list[StoredGroup]:
    """Groups of a rollouts.jsonl, or of the one in a run's directory; the last `limit` of them where given.

    Raises ConfigError where there is none.
    """
    file = path / "rollouts.jsonl" if path.is_dir() else path
    found = [each for each in read_rollouts(file) if split in (None, each.split) and each.step >= first_step]
    if not found:
        kind = f"{split} " if split else ""
        raise ConfigError(f"{file}: has no {kind}rollouts from step {first_step} on")
    return found if limit is None else found[-limit:]


def score_stored(
    reward: RewardConfig, groups: Sequence[StoredGroup], workers: int
) -> tuple[RewardSource, Loaded, list[tuple[Verdict, ...]]]:
    """What a reward says of each completion of the groups, in `workers` processes. Raises ConfigError."""
    sources = read_sources([reward])
    columns = list(dict.fromkeys(frozenset(each.group.prompt.columns) for each in groups))
    with ExitStack() as stack:
        runners: list[RewardRunner] = []
        for _ in range(min(workers, len(groups))):
            runner, _ = load_in_child(sources, columns)
            runners.append(stack.enter_context(closing(runner)))
        (loaded,) = runners[0].loaded

        def judge(worker: int) -> list[tuple[Verdict, ...]]:
            mine = islice(groups, worker, None, len(runners))
            return [runners[worker].judge(each.group)[loaded.name] for each in mine]

        with ThreadPoolExecutor(len(runners)) as pool:
            parts = list(pool.map(judge, range(len(runners))))
    return sources[0], loaded, [parts[n % len(parts)][n // len(parts)] for n in range(len(groups))]

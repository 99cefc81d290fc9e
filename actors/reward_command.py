"""`bascule reward check|score|reload`: rewards before, beside and in a run, without Ray, GPU or model."""

import argparse
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import yaml
from pydantic import ValidationError

from actors.console import Console
from actors.reward_report import comparison_lines, short, write_page
from actors.reward_swap import post_request, read_answer, read_rewards, withdraw_request
from actors.reward_trial import groups_of_rows, load_in_child, score_stored, stored_groups
from algorithms.data import Group, Verdict
from algorithms.rewards.child import Loaded
from algorithms.rewards.comparison import compare
from algorithms.rewards.loading import RewardSource, read_sources
from algorithms.stored_rollouts import StoredGroup
from configs.errors import BasculeError, ConfigError
from configs.load import load_settings
from configs.rewards import RewardConfig
from configs.schema import RunConfig

_LOOK_S = 0.5
# Of a run's last groups, when its rewards are to be replaced: enough to see that a function does not fail at once.
_TRIED = 4


def check(options: argparse.Namespace, rest: Sequence[str], console: Console) -> int:
    """Load every reward of a config, say how it is called, and call it on the first rows of the dataset."""
    config = load_settings(RunConfig, options.config, rest)
    if not config.rewards:
        raise ConfigError(f"{options.config}: has no rewards")
    sources = read_sources(config.rewards)
    tried = groups_of_rows(config, max(1, options.rows))
    columns = list(dict.fromkeys(frozenset(group.prompt.columns) for group, _ in tried))
    runner, loaded = load_in_child(sources, columns)
    failed = 0
    with closing(runner):
        said = [runner.judge(group) for group, _ in tried]
    for source, each in zip(sources, loaded, strict=True):
        console.line(_describe(source, each))
        for (group, column), verdicts in zip(tried, said, strict=True):
            for index, verdict in enumerate(verdicts[each.name]):
                failed += verdict.error is not None
                console.line(f"  {_tried(group, index, column)}: {_shown(verdict)}")
    console.line(f"{failed} calls failed" if failed else "every call gave a reward or None")
    return 1 if failed else 0


def _describe(source: RewardSource, loaded: Loaded) -> str:
    config = source.config
    hashed = f", sha256 {loaded.sha256[:12]}" if loaded.sha256 else ""
    return (
        f"reward {loaded.name}: {config.spelled}{hashed}, weight {config.weight:g}, "
        f"{loaded.signature.describe()}, at most {config.timeout_s:g} s, on_error {config.on_error}"
    )


def _tried(group: Group, index: int, column: str) -> str:
    text = group.rollouts[index].text
    origin = f" (column {column})" if column and index == 0 else " (the prompt)" if index == 0 else ""
    return f"{group.prompt.id}, completion {short(repr(text), 60)}{origin}"


def _shown(verdict: Verdict) -> str:
    if verdict.error is not None:
        return f"FAILED: {verdict.error}"
    more = [f"{name} {value}" for name, value in {**verdict.parts, **verdict.notes}.items()]
    more += [f"{len(verdict.spans)} spans"] if verdict.spans else []
    value = "None" if verdict.value is None else f"{verdict.value:g}"
    return ", ".join([value, *more, f"{verdict.seconds * 1e3:.1f} ms"])


def score(options: argparse.Namespace, rest: Sequence[str], console: Console) -> int:
    """Score recorded completions with a reward, and compare it with another or with what was recorded."""
    _refuse(rest)
    new = parse_reward(options.reward, "--reward")
    groups = stored_groups(
        options.rollouts, split=options.split, first_step=options.first_step, limit=options.limit
    )
    workers = max(1, options.workers)
    old, old_title = None, None
    if options.against is not None and options.against.startswith("recorded:"):
        name = options.against.removeprefix("recorded:")
        old_title = f"recorded {name}"
        groups = _with_recorded(groups, name, console)
        old = [each.parts[name] for each in groups]
    elif options.against is not None:
        source, loaded, said = score_stored(parse_reward(options.against, "--against"), groups, workers)
        old_title, old = _title(source, loaded), [[each.value for each in verdicts] for verdicts in said]
    source, loaded, said = score_stored(new, groups, workers)
    found = compare(groups, said, old)
    title = _title(source, loaded)
    for line in comparison_lines(found, title, old_title, show=options.show):
        console.line(line)
    if options.html is not None:
        write_page(options.html, found, title, old_title, rollouts=options.rollouts)
        console.line(f"page: {options.html}")
    return 1 if found.failed else 0


def _with_recorded(groups: Sequence[StoredGroup], name: str, console: Console) -> list[StoredGroup]:
    """Groups for which a reward of this name was recorded; a run may have had others at times."""
    found = [each for each in groups if name in each.parts]
    if not found:
        known = sorted({part for each in groups for part in each.parts})
        raise ConfigError(
            f"--against: no reward {name} was recorded; recorded are {', '.join(known) or 'none'}"
        )
    if len(found) < len(groups):
        console.line(f"left out: {len(groups) - len(found)} groups that have no recorded {name}")
    return found


def _title(source: RewardSource, loaded: Loaded) -> str:
    hashed = f", sha256 {loaded.sha256[:12]}" if loaded.sha256 else ""
    return f"{loaded.name} ({source.config.spelled}{hashed})"


def parse_reward(spelled: str, option: str) -> RewardConfig:
    """A reward on the command line: its function's name, or a YAML mapping as in a config. Raises ConfigError."""
    values: object = {"function": spelled}
    try:
        if spelled.lstrip().startswith("{"):
            values = yaml.safe_load(spelled)
        return RewardConfig.model_validate(values)
    except yaml.YAMLError as error:
        raise ConfigError(f"{option}: {spelled} is no YAML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{option}: {'.'.join(map(str, first['loc']))} {first['msg']}") from None


def reload(options: argparse.Namespace, rest: Sequence[str], console: Console) -> int:
    """Let a run that goes on use the rewards that its rewards.yaml names, from its next step on."""
    _refuse(rest)
    directory: Path = options.run.resolve()
    sources = read_sources(read_rewards(directory))
    if (directory / "result.json").exists():
        raise ConfigError(f"{directory}: this run has ended")
    for line in _try_on_last_groups(directory, sources):
        console.line(line)
    number = uuid.uuid4().hex
    post_request(directory, sources, number)
    console.line("the run takes them when its current step is over")
    end = time.monotonic() + options.wait_s
    try:
        while time.monotonic() < end:
            step = read_answer(directory, number)
            if step is not None:
                console.line(f"in use from step {step} on")
                return 0
            time.sleep(_LOOK_S)
    except KeyboardInterrupt:
        withdraw_request(directory)
        raise
    if withdraw_request(directory):
        raise BasculeError(
            f"{directory}: no step began within {options.wait_s:g} s; the request was taken back. Does the run "
            "still go on?"
        )
    raise BasculeError(
        f"{directory}: the run has the request, but loading took more than what was left of {options.wait_s:g} s; "
        "its events.jsonl will say what became of it"
    )


def _try_on_last_groups(directory: Path, sources: Sequence[RewardSource]) -> Iterator[str]:
    """How the rewards are called, after they have been on the run's last completions.

    Raises ConfigError when one does not load or fails on one of them.
    """
    groups: list[Group] = []
    if (directory / "rollouts.jsonl").is_file() and (directory / "rollouts.jsonl").stat().st_size:
        stored = stored_groups(directory, split=None, first_step=0, limit=_TRIED)
        groups = [each.group for each in stored]
    columns = list(dict.fromkeys(frozenset(group.prompt.columns) for group in groups))
    runner, loaded = load_in_child(sources, columns)
    with closing(runner):
        said = [runner.judge(group) for group in groups]
    for verdicts in said:
        for verdict in (each for row in verdicts.values() for each in row):
            if verdict.error is not None:
                raise ConfigError(
                    f"on the run's last completions: {verdict.error}; the run keeps the rewards it has"
                )
    for source, each in zip(sources, loaded, strict=True):
        values = [verdict.value for verdicts in said for verdict in verdicts[each.name]]
        known = [value for value in values if value is not None]
        mean = f"; mean on the last {len(values)} completions {sum(known) / len(known):.3f}" if known else ""
        yield _describe(source, each) + mean


def _refuse(rest: Sequence[str]) -> None:
    if rest:
        raise ConfigError(f"command line: unknown arguments: {' '.join(rest)}")

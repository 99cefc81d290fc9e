"""Options of `bascule reward`. What they are for is imported when it is called: most commands need none of it."""

import argparse
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from actors.console import Console


def add_commands(commands: Any, console: Callable[[], Console]) -> None:
    """Add `reward` and its own commands to a parser's; `console` makes what they write to."""
    text = (
        "try rewards without a run, compare them on recorded completions, replace those of a run that goes on"
    )
    reward = commands.add_parser("reward", help=text, description=text, allow_abbrev=False)
    kinds = reward.add_subparsers(title="commands", required=True, metavar="check|score|reload")
    for name, add, about in (
        ("check", _add_check, "load the rewards of a config, and call each on the first rows of the dataset"),
        (
            "score",
            _add_score,
            "score recorded completions, and compare with another reward or what was recorded",
        ),
        ("reload", _add_reload, "let a run that goes on use the rewards that its rewards.yaml names"),
    ):
        parser = kinds.add_parser(name, help=about, description=about, allow_abbrev=False)
        add(parser)
        parser.set_defaults(command_function=_called(name, console))


def _called(name: str, console: Callable[[], Console]) -> Callable[[argparse.Namespace, list[str]], int]:
    def call(options: argparse.Namespace, rest: list[str]) -> int:
        return getattr(import_module("actors.reward_command"), name)(options, rest, console())

    return call


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="the YAML file of a run")
    parser.add_argument("--rows", type=int, default=4, help="rows of the dataset to try (default 4)")


def _add_score(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rollouts", type=Path, help="rollouts.jsonl, or the directory of a run")
    spelled = "`file.py:name`, `module:name`, a built-in, or YAML: '{function: f.py:g, kwargs: {a: 1}}'"
    parser.add_argument("--reward", required=True, metavar="REWARD", help=spelled)
    parser.add_argument(
        "--against", metavar="REWARD", help="another one, or `recorded:NAME` for what the run recorded"
    )
    parser.add_argument("--split", choices=["train", "eval"], help="only these completions")
    parser.add_argument("--first_step", type=int, default=0, metavar="N", help="only from this step on")
    parser.add_argument("--limit", type=int, metavar="N", help="only the last N groups")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes (default 2)")
    parser.add_argument("--show", type=int, default=5, metavar="N", help="cases to show of each kind (5)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page as well")


def _add_reload(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="directory of the run; its rewards.yaml says which rewards")
    parser.add_argument(
        "--wait_s",
        type=float,
        default=1800,
        metavar="S",
        help="longest wait for the next step (default 1800)",
    )

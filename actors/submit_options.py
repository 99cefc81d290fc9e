"""Options of `bascule submit`. Ray is imported when it is called: most commands need none of it."""

import argparse
import sys
from pathlib import Path
from typing import Any

from configs.load import load_settings
from configs.schema import RunConfig

# A job that is stopped saves first; Ray itself would kill it after three seconds.
_STOP_WAIT_S = 600


def add_command(commands: Any) -> None:
    """Add `submit` to a parser's commands."""
    text = (
        "run a config as a job of a Ray cluster, follow its log, exit as the run exits; Ctrl-C stops the job, "
        "which saves first"
    )
    parser = commands.add_parser(
        "submit",
        help=text,
        description=f"{text}. Options of the run follow as for `bascule grpo`.",
        usage="bascule submit --config FILE [--address URL] [--no-wait] [--section.key value ...]",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="the YAML file of a run")
    parser.add_argument(
        "--address",
        metavar="URL",
        help="the cluster's dashboard, http://HOST:8265; else RAY_API_SERVER_ADDRESS or RAY_ADDRESS says it",
    )
    parser.add_argument("--no-wait", action="store_true", help="submit, and do not follow")
    parser.add_argument(
        "--working_dir",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="folder that travels with the job, by default this one; what git ignores stays here",
    )
    parser.add_argument(
        "--no-working_dir", action="store_true", help="nothing travels: the cluster's image has everything"
    )
    parser.add_argument("--python", default="python", help="the cluster's interpreter (default: python)")
    parser.add_argument("--job", metavar="ID", help="what the job is called; by default Ray chooses")
    parser.add_argument(
        "--stop_wait_s",
        type=int,
        default=_STOP_WAIT_S,
        metavar="S",
        help=f"how long a job that is stopped may take to save before it is killed (default {_STOP_WAIT_S})",
    )
    parser.set_defaults(command_function=_submit)


def _submit(options: argparse.Namespace, rest: list[str]) -> int:
    config = load_settings(RunConfig, options.config, rest)
    from actors.submit import make_submission, submit

    submission = make_submission(
        config,
        address=options.address,
        python=options.python,
        working_dir=None if options.no_working_dir else options.working_dir,
        stop_wait_s=options.stop_wait_s,
        job=options.job,
    )
    return submit(submission, wait=not options.no_wait, write=_write)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()

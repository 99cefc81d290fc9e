"""Faults x phases of a grpo run, and runs killed at random: the tables of docs/reliability.md. Not a test.

    python -m tests.actors.fault_table faults [--kind engine ...] [--phase sync ...] [--how kill ...]
    python -m tests.actors.fault_table kills [--times 20] [--of sft|gkd|lag]
    python -m tests.actors.fault_table soak [--steps 200] [--kills 10]

Each is right only if what comes out is bitwise what an undisturbed run gives, or, where a run ends, if it
does so within its deadlines with a message that names the culprit, and leaves no process. With `--folder` what was
done is kept, and the same command goes on after it was cut off; `--report` prints the table of what there is.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.actors.fault_chain import Chain, cells_of, table
from tests.actors.fault_driver import PHASES, TITLES
from tests.actors.fault_random import kills, soak


def faults(options: argparse.Namespace, folder: Path) -> bool:
    chain = Chain(folder=folder)
    cells = cells_of(options.kind, options.phase, options.how)
    if not options.report and not options.reference:
        chain.run(cells)
    if not options.report and not options.no_reference:
        chain.reference()
    return table(chain)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("faults", "kills", "soak"))
    parser.add_argument("--kind", nargs="*", default=[*TITLES, "driver"])
    parser.add_argument("--phase", nargs="*", default=[*PHASES])
    parser.add_argument("--how", nargs="*", default=["kill", "stop", "raise"])
    parser.add_argument("--of", choices=("sft", "gkd", "lag"), default="sft", help="what is killed at random")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument(
        "--reference", action="store_true", help="no more faults, only what they are judged by"
    )
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--no-reference", action="store_true", help="that run is left for later")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        commands = {"faults": faults, "kills": kills, "soak": soak}
        return 0 if commands[options.what](options, (options.folder or Path(folder)).resolve()) else 1


if __name__ == "__main__":
    sys.exit(main())

"""The reward for programs: tests, run in the sandbox."""

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

from algorithms.rewards.builtin.structure import last_block
from algorithms.rewards.sandbox import SandboxLimits, run_sandboxed

_WALL_PER_CPU = 3.0
# Reads its secret and lets go of the input before the program runs; a program that ends early has not said it.
_HARNESS = """
import sys
word = sys.stdin.readline()
sys.stdin.close()
with open("solution.py") as file:
    solution = file.read()
names = {"__name__": "solution"}
exec(compile(solution, "solution.py", "exec"), names)
with open("tests.py") as file:
    tests = file.read()
exec(compile(tests, "tests.py", "exec"), names)
sys.__stdout__.write(chr(10) + word)
sys.__stdout__.flush()
"""


def code_tests(
    completion: str,
    tests: str | Sequence[Mapping[str, str] | str],
    *,
    all_or_nothing: bool = False,
    timeout_s: float = 2.0,
    total_s: float = 8.0,
    memory_mb: int = 512,
    require: Sequence[str] = (),
) -> float | None:
    """Share of tests that the last fenced Python block of the completion passes, or 1 only for all of them.

    A test is {stdin, stdout}, where blanks at the ends of lines and empty lines at the end do not count, or text
    with assert statements, which run where the block has run. The column may hold the list as JSON. Each test
    is a process of its own (algorithms.rewards.sandbox) of at most `timeout_s` of processor time, rounded up to
    whole seconds, and three times as much by the clock; after `total_s` by the clock those that have not run
    have failed. `require` is the sandbox's. None without tests. Raises ValueError for
    tests of another form, SandboxError.
    """
    cases = _cases(tests)
    if not cases:
        return None
    program = last_block(completion, ("python", "python3", "py"))
    if program is None:
        return 0.0
    end, passed = time.monotonic() + total_s, 0
    for case in cases:
        left_s = end - time.monotonic()
        if left_s <= 0:
            break
        # On a busy machine the clock says little about a program; one that sleeps has to end all the same.
        wall_s = min(_WALL_PER_CPU * timeout_s, left_s)
        limits = SandboxLimits(wall_s=wall_s, cpu_s=timeout_s, memory_bytes=memory_mb << 20)
        ok = _passes(program, case, limits, require)
        if all_or_nothing and not ok:
            return 0.0
        passed += ok
    return float(passed == len(cases)) if all_or_nothing else passed / len(cases)


def _cases(tests: object) -> list[Mapping[str, str] | str]:
    cases: Any = json.loads(tests) if isinstance(tests, str) else tests
    if not isinstance(cases, Sequence) or isinstance(cases, str):
        raise ValueError(f"code_tests: the column `tests` is a {type(cases).__name__}, not a list")
    found = [cast(object, case) for case in cast(Sequence[Any], cases)]
    for case in found:
        if not isinstance(case, str) and not (isinstance(case, Mapping) and {"stdin", "stdout"} <= {*case}):
            raise ValueError("code_tests: a test is text with asserts, or a mapping with stdin and stdout")
    return cast(list[Mapping[str, str] | str], found)


def _passes(
    program: str, case: Mapping[str, str] | str, limits: SandboxLimits, require: Sequence[str]
) -> bool:
    if isinstance(case, str):
        word = secrets.token_hex(16)
        files = {"solution.py": program, "tests.py": case}
        result = run_sandboxed(_HARNESS, stdin=f"{word}\n", files=files, limits=limits, require=require)
        return result.exit_code == 0 and result.stdout.endswith(f"\n{word}\n")
    result = run_sandboxed(program, stdin=case["stdin"], limits=limits, require=require)
    return result.exit_code == 0 and _lines(result.stdout) == _lines(case["stdout"])


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]

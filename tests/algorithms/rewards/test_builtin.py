"""Built-in rewards against hand-written cases, formulas computed anew, TRL's, and reasoning-gym's own scores."""

import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym as gym

from algorithms.rewards.builtin import functions, preload
from algorithms.rewards.builtin.matching import exact_match, format_match, regex, think_format
from algorithms.rewards.builtin.mathematics import last_boxed, math_boxed, numeric
from algorithms.rewards.builtin.programs import code_tests
from algorithms.rewards.builtin.structure import json_schema, last_block
from algorithms.rewards.builtin.tasks import last_number, reasoning_gym
from algorithms.rewards.builtin.text import cosine, length, repetition, soft_overlong
from algorithms.rewards.sandbox import SandboxError, sandbox_support


def test_exact_match() -> None:
    assert [exact_match(" 5\n", "5"), exact_match("5.", "5"), exact_match("5", 5)] == [1.0, 0.0, 1.0]


def test_format_match_is_of_the_whole_completion() -> None:
    pattern = r"(?s)<think>.*</think>\d+"
    assert [format_match(text, pattern) for text in ("<think>a\nb</think>5", "<think></think>5 ")] == [
        1.0,
        0.0,
    ]


def test_regex() -> None:
    assert [regex(text, r"\d") for text in ("a1", "a")] == [1.0, 0.0]
    text = "<answer>1</answer> no, <answer> Two </answer>"
    given = {"pattern": r"<answer>(.*?)</answer>", "compare": True}
    assert [regex(text, answer=each, **given) for each in ("Two", "two", "1")] == [1.0, 0.0, 0.0]
    assert regex(text, answer="TWO", ignore_case=True, **given) == 1.0
    assert regex("7 8", r"\d", compare=True, answer=8) == 1.0
    assert regex("none", r"(a)|\d", compare=True, answer="") == 0.0
    with pytest.raises(ValueError, match="needs a column `answer`"):
        regex(text, **given)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>a\nb</think>\n5", 1.0),
        (" \n<think>a</think>5", 1.0),
        ("<think>a</think> \n", 0.0),
        ("<think> </think>5", 0.0),
        ("5 <think>a</think>5", 0.0),
        ("<think>a</think>5</think>", 0.0),
        ("<think>a<think>b</think>5", 0.0),
        ("<think>a", 0.0),
        ("a</think>5", 0.0),
    ],
)
def test_think_format(text: str, value: float) -> None:
    assert think_format(text) == value
    if text.startswith("<think>"):
        assert think_format(text.removeprefix("<think>"), open_in_prompt=True) == value


@pytest.mark.parametrize(
    ("text", "answer", "value"),
    [
        ("It is 5, no: 1,234.5.", "1234.5", 1.0),
        ("3 + 4 = 7", "7", 1.0),
        ("so x=-4", -4, 1.0),
        ("5-3", "3", 1.0),
        ("\u22124", "-4", 1.0),
        ("1 then 2", "1", 0.0),
        ("#### 72 apples of 80", "She sold 1 + 71.\n#### 72", 1.0),
        ("so \\boxed{3} in 7 days", "3", 1.0),
        ("\\boxed{\\frac{3}{4}}", "0.75", 1.0),
        ("-\\dfrac{3}{4}", "-3/4", 1.0),
        ("75%", "0.75", 1.0),
        ("75\\%", "75", 1.0),
        ("75", "75%", 1.0),
        ("$1{,}000", "1000", 1.0),
        ("2e-3", ".002", 1.0),
        ("0.3333333", "1/3", 1.0),
        ("0.333", "1/3", 0.0),
        ("1/0", "1", 0.0),
        ("9" * 400, "1", 0.0),
        ("none", "1", 0.0),
        ("1", "none", None),
    ],
)
def test_numeric(text: str, answer: object, value: float | None) -> None:
    assert numeric(text, answer) == value


def test_numeric_tolerances() -> None:
    assert numeric("0.333", "1/3", rel_tol=2e-3) == 1.0
    assert numeric("0.01", "0", abs_tol=0.02) == 1.0


@pytest.mark.parametrize(
    ("text", "answer", "value"),
    [
        (r"so \boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"\boxed{1} and \boxed{\dfrac12}", "1/2", 1.0),
        (r"\boxed{1} and \boxed{\dfrac12}", "1", 0.0),
        (r"\boxed{2\sqrt{3}}", r"$\sqrt{12}$", 1.0),
        (r"\boxed{sqrt(12)}", r"\boxed{2\sqrt{3}}", 1.0),
        (r"\boxed{(x+1)^2}", "x^2+2x+1", 1.0),
        (r"\boxed{(x+1)^2}", "x^2+2x-1", 0.0),
        (r"\boxed{\{2,1\}}", r"\{1,2\}", 1.0),
        (r"\boxed{(1,2]}", "(1,2]", 1.0),
        (r"\boxed{(1,2]}", "[1,2]", 0.0),
        (r"\boxed{x=5}", "5", 1.0),
        (r"\boxed{1,234}", "1234", 1.0),
        (r"\boxed{50\%}", "0.5", 1.0),
        (r"\boxed{\text{east}}", r"\text{east}", 1.0),
        (r"\boxed{72}", "It is 1 + 71.\n#### 72", 1.0),
        ("5", "5", 0.0),
        (r"\boxed{5", "5", 0.0),
        (r"\boxed{}", "5", 0.0),
        (r"\boxed{5}", "", None),
    ],
)
def test_math_boxed(text: str, answer: str, value: float | None) -> None:
    assert math_boxed(text, answer) == value


def test_last_boxed() -> None:
    assert last_boxed(r"\boxed{a{b}c} then \fbox{d\}e}") == r"d\}e"
    assert last_boxed(r"\boxed{a{b}c} then \boxed{d") == "a{b}c"


def test_length() -> None:
    assert [length("", [0] * n, minimum=2, maximum=4) for n in range(6)] == [0, 0, 1, 1, 1, 0]
    assert [length("", [0] * n, minimum=4, maximum=6, margin=4) for n in (0, 1, 3, 4, 6, 8, 11)] == [
        0,
        0.25,
        0.75,
        1,
        1,
        0.5,
        0,
    ]
    assert [length("", [0] * n, target=4) for n in (0, 2, 4, 5, 8, 99)] == [0, 0.5, 1, 0.75, 0, 0]
    assert [length("a bc", [], target=4, unit=each) for each in ("words", "characters")] == [0.5, 1.0]
    with pytest.raises(ValueError, match="takes `target`, or"):
        length("", [], target=4, maximum=3)
    with pytest.raises(ValueError, match="'lines' is none of tokens, words, characters"):
        length("", [], unit="lines")  # type: ignore[arg-type]


def test_soft_overlong_is_dapos() -> None:
    from trl.rewards import get_soft_overlong_punishment

    rows = [[0] * n for n in (0, 79, 80, 81, 90, 99, 100, 101, 500)]
    assert [soft_overlong(row, max_length=100, cache=20) for row in rows] == pytest.approx(
        get_soft_overlong_punishment(100, 20)(rows)
    )
    assert [soft_overlong(row, max_length=100, cache=0) for row in rows[-3:]] == [0, -1, -1]
    with pytest.raises(ValueError, match="`cache` 200 is not in"):
        soft_overlong([], max_length=100, cache=200)


def test_repetition() -> None:
    from trl.rewards import get_repetition_penalty_reward

    # the-cat-sat, cat-sat-the, sat-the-cat, the-cat-sat: three different of four.
    assert repetition("The cat sat the CAT sat", []) == pytest.approx(-0.25)
    assert repetition("a a a a a", [], n=2, max_penalty=-2.0) == pytest.approx(-1.5)
    assert repetition("a b", []) == 0.0
    rows = [[1, 2, 3, 4], [5, 5, 5, 5, 5], [1], [], [1, 2, 1, 2, 1]]
    assert [repetition("", row, n=2, unit="tokens") for row in rows] == pytest.approx(
        get_repetition_penalty_reward(2, -1.0)(rows)
    )
    with pytest.raises(ValueError, match="at most 0"):
        repetition("", [], max_penalty=1.0)


def test_cosine() -> None:
    for size, progress in ((0, 0.0), (25, 0.25), (50, 0.5), (100, 1.0), (300, 1.0)):
        row = [0] * size
        high = 0.5 + 0.25 * (1 + math.cos(math.pi * progress))
        low = -0.5 - 0.25 * (1 + math.cos(math.pi * progress))
        assert cosine("\\boxed{1/2}", "0.5", row, max_length=100) == pytest.approx(high)
        assert cosine("0.50", "0.5", row, max_length=100, correct="numeric") == pytest.approx(high)
        assert cosine("0.50", "0.5", row, max_length=100, correct="exact") == pytest.approx(low)
    given = {
        "min_value_wrong": -3.0,
        "max_value_wrong": -2.0,
        "min_value_correct": 2.0,
        "max_value_correct": 3.0,
    }
    values = [cosine(text, "1", [], max_length=9, correct="exact", **given) for text in ("1", "2")]
    assert values == [3.0, -3.0]
    assert cosine("1", "none", [], max_length=9, correct="numeric") is None
    with pytest.raises(ValueError, match="'both' is none of math, exact, numeric"):
        cosine("", "", [], max_length=9, correct="both")  # type: ignore[arg-type]


def test_json_schema() -> None:
    import jsonschema

    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
    for text in ('{"a": 1}', '{"a": "1"}', "[]", "{}", '{"a": 1, "b": []}'):
        fits = jsonschema.Draft202012Validator(schema).is_valid(json.loads(text))
        assert json_schema(text, schema) == fits
        assert json_schema(f"It is\n```json\n[1]\n```\nor\n```\n{text}\n```\n", schema) == fits
    assert json_schema('so {"a": 1}', schema) == 0.0
    assert json_schema("[1]", '{"type": "array"}') == 1.0
    assert [json_schema(text, True) for text in ("NaN", "1", "", "[" * 100_000)] == [0.0, 1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="is no schema: 'no' is not valid"):
        json_schema("1", {"type": "no"})


def test_a_schema_elsewhere_is_not_fetched() -> None:
    with pytest.raises(ValueError, match=r"refers to what is not in it: .*127"):
        json_schema("1", {"$ref": "http://127.0.0.1:9/schema"})
    assert json_schema("1", {"$ref": "#/$defs/a", "$defs": {"a": {"type": "integer"}}}) == 1.0


def test_last_block() -> None:
    text = "```py\na\n```\n```python\nb\nc\n```\n```sh\nd\n```\n```python\ne"
    assert last_block(text, ("python", "py")) == "b\nc\n"
    assert last_block(text) == "d\n"
    assert last_block("```\nx\n``` ") == "x\n"
    assert last_block("none") is None


# A start takes seconds when all tests run.
PATIENT: dict[str, Any] = {"timeout_s": 20.0, "total_s": 100.0}
ADD = "```python\ndef add(a, b):\n    return a + b\n```"
ECHO = "Try\n```python\nprint(1 / 0)\n```\nBetter:\n```python\nprint(int(input()) + 1)\n```\n"


def test_code_tests() -> None:
    cases = [
        {"stdin": "1\n", "stdout": "2"},
        {"stdin": "4", "stdout": "5 \n\n"},
        {"stdin": "x", "stdout": ""},
    ]
    assert code_tests(ECHO, cases, **PATIENT) == pytest.approx(2 / 3)
    assert [code_tests(ECHO, cases[:n], all_or_nothing=True, **PATIENT) for n in (2, 3)] == [1.0, 0.0]
    assert code_tests(ADD, ["assert add(1, 2) == 3", "assert add(1, 2) == 4"], **PATIENT) == 0.5
    assert code_tests(ADD, '["x = add(1, 1)\\nassert x == 2"]', **PATIENT) == 1.0
    assert code_tests(ADD, []) is None
    assert code_tests("add = sum", ["assert True"]) == 0.0


@pytest.mark.parametrize(
    "program",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit()",
        "import sys, os; print(os.listdir()); print(sys.stdin)",
        "while True: pass",
        "def add(a, b): print('passed')",
    ],
)
def test_code_that_ends_early_or_never_passes_nothing(program: str) -> None:
    fenced = f"```python\n{program}\n```"
    assert code_tests(fenced, ["assert add(1, 2) == 3"], timeout_s=0.7) == 0.0


def test_code_tests_stop_when_their_time_is_over() -> None:
    start = time.monotonic()
    cases = [{"stdin": "", "stdout": ""}] * 50
    assert code_tests("```python\nwhile True: pass\n```", cases, timeout_s=0.6, total_s=1.0) == 0.0
    assert time.monotonic() - start < 30


def test_code_tests_that_cannot_run() -> None:
    for tests in ("1", "[1]", '[{"stdin": ""}]'):
        with pytest.raises(ValueError, match="code_tests: "):
            code_tests(ADD, tests)
    given = sandbox_support().protections
    assert code_tests(ADD, ["assert add"], require=given, **PATIENT) == 1.0
    lacking = [each for each in ("filesystem", "network", "processes", "syscalls") if each not in given]
    if lacking:
        with pytest.raises(SandboxError, match="cannot give what `require` asks for"):
            code_tests(ADD, ["assert add"], require=lacking)


ENTRY: Any = gym.create_dataset("chain_sum", size=1, seed=1)[0]
ARGUMENTS: dict[str, dict[str, Any]] = {
    "exact_match": {"answer": "5"},
    "numeric": {"answer": "5"},
    "math_boxed": {"answer": "5"},
    "regex": {"pattern": r"\((.*)\)", "compare": True, "answer": "5"},
    "format_match": {"pattern": r".*\d"},
    "think_format": {},
    "length": {"target": 5, "unit": "words"},
    "soft_overlong": {"max_length": 9, "cache": 3},
    "repetition": {},
    "cosine": {"answer": "5", "max_length": 9},
    "json_schema": {"schema": {"type": "object"}},
    "code_tests": {"tests": [{"stdin": "", "stdout": ""}]},
    "reasoning_gym": {**ENTRY, "dataset_kwargs": {}},
}
ODD = [
    "",
    "\x00",
    "a" * 100_000,
    "1" * 100_000,
    "{[(" * 1000,
    "\\boxed{" * 1000,
    "\\boxed{{{{",
    "\\boxed{\\frac{1}{0}}",
    "\\boxed{\\frac{}{}}\\boxed{}}",
    "\\boxed{" + "9" * 100_000 + "}",
    "<think>" * 1000,
    "```python\n(((((\n\x00\n```",
    "```json\n{\n```",
    "\U0001f600 \u200d \ud800",
    "#### \u0663",
    "\u00b2/\u00b2",
]


@pytest.mark.parametrize("name", functions())
def test_odd_completions_have_a_reward(name: str) -> None:
    preload(name)
    function = functions()[name]
    names = function.__code__.co_varnames[
        : function.__code__.co_argcount + function.__code__.co_kwonlyargcount
    ]  # type: ignore[attr-defined]
    for text in ODD:
        given = {"completion": text, "tokens": [0] * (len(text) % 50)} | ARGUMENTS[name]
        value = function(**{key: given[key] for key in names if key in given})
        assert isinstance(value, float), (name, text[:40])
        assert math.isfinite(value)


def test_each_is_in_the_documentation() -> None:
    text = (Path(__file__).parents[3] / "docs" / "builtin-rewards.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert rows == list(functions())
    for name, function in functions().items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
        code = function.__code__  # type: ignore[attr-defined]
        for argument in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
            assert argument in ("completion", "tokens") or f"`{argument}`" in row, f"{name}: {argument}"


def test_importing_them_is_quick() -> None:
    """Libraries that take seconds wait for the reward that needs them."""
    code = (
        "import sys, algorithms.rewards.builtin as b; b.functions(); b.preload('exact_match'); "
        "print([m for m in ('sympy', 'math_verify', 'jsonschema', 'reasoning_gym', 'torch') if m in sys.modules])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout == "[]\n"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1 + 2 = 3.", "3"),
        ("so -4", "-4"),
        ("1,234.5 it is", "1234.5"),
        ("+7", "7"),
        ("none", None),
        ("", None),
    ],
)
def test_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("task", "kwargs"),
    [("chain_sum", {}), ("countdown", {}), ("decimal_arithmetic", {"max_num_decimal_places": 3})],
)
def test_reasoning_gym_scores_as_the_task_does(task: str, kwargs: dict[str, int]) -> None:
    dataset = gym.create_dataset(task, size=3, seed=1, **kwargs)
    for entry in dataset:
        for text in (entry["answer"], "12", f"it is {entry['answer']}", ""):
            mine = reasoning_gym(text, **entry, dataset_kwargs=kwargs)
            assert mine == dataset.score_answer(text, entry)


def test_reasoning_gym_with_the_last_number() -> None:
    (entry,) = gym.create_dataset("chain_sum", size=1, seed=1)
    text = f"First 12, so the answer is {entry['answer']}."
    assert reasoning_gym(text, **entry, dataset_kwargs={}, extract="last_number") == 1.0
    assert reasoning_gym("no idea", **entry, dataset_kwargs={}, extract="last_number") == 0.0
    with pytest.raises(ValueError, match="extract is 'first'"):
        reasoning_gym(text, **entry, dataset_kwargs={}, extract="first")  # type: ignore[arg-type]

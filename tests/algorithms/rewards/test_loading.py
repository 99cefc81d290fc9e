"""Reward functions found by name, and every way in which one cannot be loaded."""

import hashlib
import pickle
from pathlib import Path

import pytest

from algorithms.rewards.loading import (
    build_reward,
    load_reward,
    load_rewards,
    read_source,
)
from algorithms.rewards.signature import check_arguments
from configs.errors import ConfigError
from configs.rewards import RewardConfig

GOOD = """
from __future__ import annotations
from dataclasses import dataclass
from helper import FACTOR

@dataclass
class Settings:
    factor: int = FACTOR

def accuracy(completion: str, answer: str, scale: float = 1.0) -> float:
    return scale * Settings().factor * (completion == answer)

def everything(completion, /): ...

def rest(*, completion, **columns): return 0

number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with rewards.py and a file that it imports beside it in my/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "rewards.py").write_text(GOOD)
    (tmp_path / "my" / "helper.py").write_text("FACTOR = 2")
    return tmp_path


def complaint(function: str, **kwargs: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_reward(RewardConfig(function=function, kwargs={**kwargs}))
    return str(caught.value)


@pytest.mark.usefixtures("folder")
def test_function_of_a_file() -> None:
    reward = load_reward(RewardConfig(function="my/rewards.py:accuracy", weight=0.5))
    assert reward.function("5", "5", scale=3) == 6
    assert (reward.name, reward.weight, reward.path) == ("accuracy", 0.5, "my/rewards.py")
    signature = reward.signature
    assert (signature.style, signature.is_async, signature.takes_all) == ("sample", False, False)
    assert (signature.needs, signature.takes) == (("completion", "answer"), ("scale",))
    assert reward.sha256 == hashlib.sha256(GOOD.encode()).hexdigest()
    rest = load_reward(RewardConfig(function="my/rewards.py:rest", kwargs={"any": 1}))
    assert (rest.signature.needs, rest.signature.takes, rest.signature.takes_all) == (
        ("completion",),
        (),
        True,
    )


def test_a_source_travels_without_its_file(folder: Path) -> None:
    text = "def g(completion):\n    return len(completion)\n"
    (folder / "g.py").write_text(text)
    source = pickle.loads(pickle.dumps(read_source(RewardConfig(function="g.py:g"))))
    (folder / "g.py").unlink()
    reward = build_reward(source)
    assert reward.function("abc") == 3
    assert reward.sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_an_edited_file_is_loaded_anew(folder: Path) -> None:
    config = RewardConfig(function="g.py:g")
    for value in (1, 2):
        (folder / "g.py").write_text(f"def g(): return {value}")
        assert load_reward(config).function() == value


def test_function_of_a_module_and_built_in() -> None:
    reward = load_reward(RewardConfig(function="statistics:fmean", kwargs={"data": 1}))
    signature = reward.signature
    assert (reward.name, signature.needs, signature.takes) == ("fmean", (), ("weights",))
    assert reward.sha256 is not None
    built_in = load_reward(RewardConfig(function="exact_match"))
    assert built_in.function("a", "a") == 1.0
    assert built_in.sha256 is None


@pytest.mark.usefixtures("folder")
def test_two_functions_of_one_name_are_told_apart() -> None:
    names = ["exact_match", "my/rewards.py:accuracy", "exact_match", "exact_match"]
    rewards = load_rewards([RewardConfig(function=name) for name in names])
    assert [reward.name for reward in rewards] == [
        "exact_match",
        "accuracy",
        "exact_match_2",
        "exact_match_3",
    ]


@pytest.mark.usefixtures("folder")
def test_functions_that_are_not_there() -> None:
    assert "none.py cannot be read: No such file or directory" in complaint("none.py:f")
    missing = complaint("my/rewards.py:acuracy")
    assert (
        "no function acuracy; did you mean accuracy? (there is: Settings, accuracy, everything, rest)"
        in missing
    )
    assert "number is not a function but 3" in complaint("my/rewards.py:number")
    assert "Settings is a class whose objects cannot be called" in complaint("my/rewards.py:Settings")
    assert "cannot be made: TypeError" in complaint("my/rewards.py:Settings", other="1")
    assert "exact_mach is not built in; did you mean exact_match?" in complaint("exact_mach")
    assert "write `file.py:name`" in complaint("my/rewards.py")
    assert "ModuleNotFoundError: No module named 'no_such_module'" in complaint("no_such_module:f")


def test_imports_that_fail_name_file_and_line(folder: Path) -> None:
    bad = folder / "bad.py"
    bad.write_text("import math\nx = math.sqrt(-1)\n")
    message = complaint("bad.py:f")
    assert "cannot be imported: ValueError: " in message
    assert message.endswith("(bad.py line 2: x = math.sqrt(-1))")
    bad.write_text("def f(:\n    pass\n")
    assert "SyntaxError" in (message := complaint("bad.py:f"))
    assert "bad.py line 1: def f(:" in message
    bad.write_text("\nimport sys\nsys.exit(2)\n")
    assert complaint("bad.py:f").endswith("SystemExit: 2 (bad.py line 3: sys.exit(2))")


@pytest.mark.usefixtures("folder")
def test_arguments_are_checked_against_columns() -> None:
    reward = load_reward(RewardConfig(function="my/rewards.py:accuracy"))
    check_arguments(reward.signature, "f", ["answer", "level"])
    with pytest.raises(ConfigError) as caught:
        check_arguments(reward.signature, "f", ["answers", "level"])
    message = str(caught.value)
    assert "asks for the argument 'answer' (did you mean answers?)" in message
    assert (
        "completion, turns, prompt, messages, tokens, finish, the dataset's columns (answers, level)"
        in message
    )
    fixed = load_reward(RewardConfig(function="my/rewards.py:accuracy", kwargs={"answer": "5"}))
    check_arguments(fixed.signature, "f", [])
    assert (
        "`kwargs` gives 'anwser', which the function does not take; it takes completion, answer"
        in complaint("my/rewards.py:accuracy", anwser="5")
    )
    assert "'completion' is positional-only" in complaint("my/rewards.py:everything")


def test_the_signature_tells_how_a_function_is_called(folder: Path) -> None:
    (folder / "s.py").write_text(
        "def one(completion, answer=None): ...\n"
        "def many(completions, **columns): ...\n"
        "async def all_of_them(group): ...\n"
        "class Class:\n"
        "    def __init__(self, args=None, factor=1): self.factor = factor\n"
        "    async def __call__(self, completions, solution): return self.factor\n"
    )
    styles = {}
    for name in ("one", "many", "all_of_them", "Class"):
        signature = load_reward(RewardConfig(function=f"s.py:{name}")).signature
        styles[name] = (signature.style, signature.is_async)
    assert styles == {
        "one": ("sample", False),
        "many": ("batch", False),
        "all_of_them": ("group", True),
        "Class": ("batch", True),
    }
    made = load_reward(RewardConfig(function="s.py:Class", kwargs={"factor": 3}))
    assert (made.function.factor, made.kwargs, made.of_class) == (3, {}, True)  # type: ignore[attr-defined]


def test_a_reward_is_one_of_three_kinds() -> None:
    with pytest.raises(ValueError, match="this one has none of them"):
        RewardConfig()
    with pytest.raises(ValueError, match="this one has function and url"):
        RewardConfig(function="f", url="http://here")
    with pytest.raises(ValueError, match="a url takes none"):
        RewardConfig(url="http://here", kwargs={"a": 1})


def test_a_directory_that_is_no_reward_model(tmp_path: Path) -> None:
    def complaint_of(config: str | None) -> str:
        if config is not None:
            (tmp_path / "config.json").write_text(config)
        with pytest.raises(ConfigError) as caught:
            load_reward(RewardConfig(model=str(tmp_path)))
        return str(caught.value)

    assert "config.json cannot be read" in complaint_of(None)
    assert "is LlamaForCausalLM" in complaint_of('{"architectures": ["LlamaForCausalLM"]}')
    two = '{"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "a", "1": "b"}}'
    assert "has 2 labels" in complaint_of(two)

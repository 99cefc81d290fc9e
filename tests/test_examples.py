"""What the repository shows to a user works: its configs, its example rewards, the commands in its README."""

import asyncio
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from actors.reward_command import parse_reward
from actors.tiny_model import build_tiny_model, write_arithmetic
from algorithms.data import Group, Prompt, Rollout, Span, float_row, int_row
from algorithms.environments.loading import load_environment
from algorithms.rewards.calling import calls_of
from algorithms.rewards.child import call_async, call_now
from algorithms.rewards.loading import load_reward, load_rewards
from configs.environment import EnvironmentConfig
from configs.export import ExportConfig, InferConfig
from configs.load import load_config, load_settings
from configs.manifest import ManifestConfig
from configs.plan import PlanConfig
from configs.rewards import RewardConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_valid_and_says_only_what_differs_from_the_defaults(path: Path) -> None:
    given = yaml.safe_load(path.read_text())
    config = load_config(path, [], given["algorithm"])
    minimal = {"model": {"model": "m"}, "data": {"dataset": "d"}, "rewards": [{"function": "f"}]}
    defaults = type(config).model_validate(minimal)
    for section, values in given.items():
        if isinstance(values, dict):
            for key in values:
                here, there = getattr(config, section), getattr(defaults, section)
                assert getattr(here, key) != getattr(there, key), f"{section}.{key} is the default"


def test_commands_of_the_readme_name_real_commands_and_options() -> None:
    commands = re.findall(
        r"^(?:ray job submit .* -- python -m actors\.cli|bascule) (.*?)(?: +#.*)?$", README, re.M
    )
    assert len(commands) >= 9
    schemas = {"export": ExportConfig, "infer": InferConfig, "plan": PlanConfig}
    for command in commands:
        words = shlex.split(command)
        if (
            "--help" in words
            or words[0] in ("make-model", "view", "status")
            or words[:2] == ["reward", "reload"]
        ):
            continue
        if words[:2] == ["reward", "score"]:
            load_reward(parse_reward(words[words.index("--reward") + 1], "--reward"))
            continue
        if words[0] == "reward":
            words = ["plan", *words[2:]]
        if "--config" not in words:
            load_settings(schemas[words[0]], None, words[1:])
            continue
        path = words[words.index("--config") + 1]
        if words[0] == "manifest":
            load_settings(ManifestConfig, ROOT / path, [*words[3:-2]])
            continue
        rest = [word for word in words[1:] if word not in ("--config", path)]
        algorithm = yaml.safe_load((ROOT / path).read_text())["algorithm"]
        config = load_config(ROOT / path, rest, algorithm)
        # What `submit` takes as `--address` is an option of the run as well.
        assert words[0] in (config.algorithm, "plan", "submit")


@pytest.mark.megatron
def test_the_python_lines_of_the_readme_load_export_and_save(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    (code,) = re.findall(r"```python\n(from actors.*?)```", README, re.S)
    source = tmp_path / "runs/tiny/base"
    build_tiny_model(source, seed=42)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "runs/tiny/saved/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    printed = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert printed == {name: str(tuple(tensor.shape)) for name, tensor in before.items()}


def test_the_example_rewards_score_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names = ("accuracy", "brief", "graded", "first_token", "longest", "novelty")
    rewards = load_rewards([RewardConfig(function=f"examples/my_rewards.py:{name}") for name in names])
    rollouts = tuple(
        Rollout(
            tokens=int_row([1] * length),
            logprobs=float_row([0.0] * length),
            text=text,
            finish=finish,
            loss_mask=int_row([1] * length),
            versions=(0, 0),
        )
        for text, length, finish in ((" 12\n", 4, "stop"), ("13", 2, "stop"), ("12", 8, "length"))
    )
    prompt = Prompt(id="p", tokens=int_row([1]), messages=(), columns={"prompt": "5+7=", "answer": "12"})
    group = Group(prompt=prompt, rollouts=rollouts)
    verdicts = {
        reward.name: [
            verdict for call in calls_of(reward, group, range(3)) for verdict in call_now(reward, group, call)
        ]
        for reward in rewards
    }
    values = {name: [verdict.value for verdict in found] for name, found in verdicts.items()}
    assert values == {
        "accuracy": [1.0, 0.0, 1.0],
        "brief": [0.25, 0.5, None],
        "graded": [1.1, 0.1, 1.1],
        "first_token": [None, None, None],
        "longest": [1.0, 0.0, 0.0],
        "novelty": [1.0, 1.0, 1.0],
    }
    assert verdicts["graded"][1].parts == {"right": 0.0, "digits": 1.0}
    assert verdicts["first_token"][0].spans == (Span(start=0, end=1, value=-0.1),)
    judged = load_reward(RewardConfig(function="examples/my_rewards.py:judged"))
    (first, *_) = calls_of(judged, group, range(3))
    assert [each.value for each in asyncio.run(call_async(judged, group, first))] == [1.0]


def test_the_demo_configs_fit_the_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from actors.cli import main

    build_tiny_model(tmp_path / "runs/tiny/base", seed=42)
    write_arithmetic(tmp_path / "runs/tiny/data", seed=42)
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "--config", str(ROOT / "configs/sft-tiny.yaml")]) == 0
    assert main(["plan", "--config", str(ROOT / "configs/grpo-tiny.yaml"), "--model", "runs/tiny/base"]) == 0
    assert "2 ranks = tensor 2" in capsys.readouterr().out


def test_the_example_environment_calculates_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    calculator = load_environment(EnvironmentConfig(function="examples/calculator.py:calculator")).function
    asked = {"12*34": "408", "2+3*-4": "error", "7-9": "-2", "__import__('os')": "error", "9**9**9": "error"}
    assert {text: calculator(completion=f"<calc>{text}</calc>") for text in asked} == asked
    assert calculator(completion="408") is None

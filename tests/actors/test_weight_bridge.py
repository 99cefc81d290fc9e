"""Trainers, bridge and engines as they are in a run: what arrives, and what happens when one of them dies.

Real Megatron ranks (tensor parallel) and real engines in one Ray; transformers says what the engines should say.
"""

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from actors.bridge import WeightBridge
from actors.engine_group import EngineGroup
from actors.engine_start import create_engines
from actors.model_source import ModelSource
from actors.placement import Reservation, bundles_of, reserve
from actors.trainer import TrainerGroup
from actors.trainer_rank import Sources
from algorithms.data import Group, SamplingSettings, TrainSample, float_row, int_row
from algorithms.packing import pack
from configs.schema import RunConfig, TrainerConfig
from tests.actors.engine_helpers import gone, make_model, prompt, save_tokenizer, settings

pytestmark = pytest.mark.e2e
pytest_plugins = ("tests.actors.engine_fixtures",)

PROBE = [int(token) for token in prompt(77, length=24).tokens]


def config_of(path: Path, **bridge: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "algorithm": "grpo",
            "model": {"model": str(path), "torch_dtype": "float32", "device": "cpu"},
            "trainer": {"tensor_model_parallel_size": 2, "lr": 1e-2},
            "rollout": {
                "num_engines": 2,
                "max_model_len": 96,
                "max_num_seqs": 8,
                "kv_cache_memory_bytes": 32 << 20,
                "heartbeat_timeout_s": 8,
            },
            "grpo": {"num_generations": 2},
            "data": {"dataset": "none.jsonl"},
            "rewards": [{"function": "none.py:none"}],
            "bridge": {"bucket_size_mb": 0.02, "max_recoveries": 20, "stall_timeout_s": 6, **bridge},
            # Other tests have engines in the same Ray.
            "cluster": {
                "cpus_per_engine": 0.05,
                "cpus_per_trainer_rank": 0.05,
                "step_timeout_s": 120,
                "collective_timeout_s": 60,
            },
        }
    )


@dataclass
class Stack:
    """Everything of a run but its loop."""

    config: RunConfig
    reservation: Reservation
    trainers: TrainerGroup
    engines: EngineGroup
    weights: WeightBridge
    folder: Path
    version: int = 0

    def train(self) -> None:
        """One step that changes every weight."""
        row = int_row(PROBE)
        sample = TrainSample(
            tokens=row,
            loss_mask=int_row([1] * len(PROBE)),
            advantages=float_row([1.0] * len(PROBE)),
            logprobs=float_row([-1.0] * len(PROBE)),
            version=0,
        )
        self.trainers.step(pack([sample], TrainerConfig(tensor_model_parallel_size=2)))

    def sync(self) -> dict[str, float]:
        self.version += 1
        return dict(self.weights.sync(self.version))

    def expected(self) -> list[float]:
        """What transformers says about the probe with the trainers' weights, through a checkpoint."""
        from transformers import AutoModelForCausalLM

        self.trainers.save(self.version)
        path = self.folder / f"checkpoint-{self.version}"
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            logprobs = model(torch.tensor([PROBE])).logits[0].log_softmax(-1)
        return [float(logprobs[at, token]) for at, token in enumerate(PROBE[1:])]

    def assert_all_follow(self) -> None:
        """Every engine computes what transformers computes from the trainers' weights."""
        expected = self.expected()
        found = self.engines.score(PROBE)
        assert len(found) == 2
        for row in found:
            np.testing.assert_allclose(row, expected, atol=1e-4)

    def pid_of(self, index: int, core: bool = False) -> int:
        info = next(info for info in self.engines.info() if info.name == f"engine {index}")
        return info.child_pids[0] if core else info.pid


@pytest.fixture(scope="module")
def stack(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("weights")
    make_model("qwen3", seed=5).save_pretrained(folder / "model")
    save_tokenizer(folder / "model")
    config = config_of(folder / "model", offload_bridge=True)
    source = ModelSource(directory=folder / "model")
    from actors.model_source import model_size, read_contents

    size = model_size(source, read_contents(source).tensors)
    reservation = reserve(bundles_of(config, size, "cpu"), timeout_s=60, can_grow=False)
    engines = create_engines(config, str(source.directory), reservation.group, reservation.indices("engine"))
    starting = engines.start()
    trainers = TrainerGroup(config, reservation, "cpu", Sources(model=source), folder)
    engines.ready(starting, 300)
    weights = WeightBridge(config, reservation, trainers, engines, probe=PROBE)
    yield Stack(config, reservation, trainers, engines, weights, folder)
    engines.kill()
    for rank in trainers.ranks:
        ray.kill(rank)


def requests(count: int, max_tokens: int = 40) -> list[tuple[Any, SamplingSettings]]:
    return [(prompt(index), settings(max_tokens=max_tokens, seed=index)) for index in range(count)]


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_after_a_sync_all_engines_compute_what_the_trainers_do(stack: Stack) -> None:
    before = stack.engines.score(PROBE)
    stack.train()
    metrics = stack.sync()
    stack.assert_all_follow()
    assert np.abs(np.array(before) - np.array(stack.engines.score(PROBE))).max() > 0.01
    assert metrics["sync/collectives"] == metrics["sync/buckets"] + 1
    assert metrics["sync/engines"] == 2
    manifest = stack.weights.manifest()
    assert all(entry.content is not None for entry in manifest)
    assert len({entry.content for entry in manifest}) == len(manifest)


def test_an_engine_killed_while_idle_comes_back_with_the_bridges_copy(stack: Stack) -> None:
    os.kill(stack.pid_of(1), signal.SIGKILL)
    until(lambda: len(stack.engines.members) == 1, 30)
    # The trainers are further already: what it gets is what the others have.
    expected = stack.expected()
    stack.train()
    groups = list(stack.engines.generate(requests(6)))
    assert len(groups) == 6
    assert [member.incarnation for member in stack.engines.members] == [0, 1]
    for row in stack.engines.score(PROBE):
        np.testing.assert_allclose(row, expected, atol=1e-4)
    stack.sync()
    stack.assert_all_follow()


def test_an_engine_whose_core_dies_while_generating_loses_nothing(stack: Stack) -> None:
    groups: list[Group] = []
    reference = {group.prompt.id: group.rollouts[0] for group in stack.engines.generate(requests(8))}
    for group in stack.engines.generate(iter(requests(8))):
        if not groups:
            os.kill(stack.pid_of(0, core=True), signal.SIGKILL)
        groups.append(group)
    assert sorted(group.prompt.id for group in groups) == sorted(reference)
    for group in groups:
        assert group.rollouts[0].tokens.tolist() == reference[group.prompt.id].tokens.tolist()
    # On a busy machine its own prompts may have been done before it was killed.
    until(lambda: all(member.incarnation for member in stack.engines.members), 30)
    list(stack.engines.generate(requests(2)))
    assert [member.incarnation for member in stack.engines.members] == [1, 1]
    stack.train()
    stack.sync()
    stack.assert_all_follow()


def test_an_engine_killed_in_the_middle_of_a_sync_does_not_stop_it(stack: Stack) -> None:
    stack.train()
    core, actor = stack.pid_of(0, core=True), stack.pid_of(0)
    # It takes no more bytes, so the sync hangs in it until it is killed.
    os.kill(core, signal.SIGSTOP)
    timer = threading.Timer(3.0, lambda: [os.kill(pid, signal.SIGKILL) for pid in (core, actor)])
    timer.start()
    metrics = stack.sync()
    assert metrics["sync/seconds"] > 3
    assert metrics["sync/engines"] >= 1
    list(stack.engines.generate(requests(2)))
    assert len(stack.engines.members) == 2
    stack.assert_all_follow()


def test_an_engine_whose_core_stops_running_is_replaced(
    stack: Stack, caplog: pytest.LogCaptureFixture
) -> None:
    """While idle, and then, in the other engine, while it generates."""
    idle, busy = stack.pid_of(1, core=True), stack.pid_of(0, core=True)
    os.kill(idle, signal.SIGSTOP)
    until(lambda: len(stack.engines.members) == 1, 30)
    assert f"engine 1: vLLM's core process {idle} has not answered for 8 s" in caplog.text
    reference = {group.prompt.id: group.rollouts[0] for group in stack.engines.generate(requests(4))}
    groups: list[Group] = []
    for group in stack.engines.generate(iter(requests(8))):
        if not groups:
            os.kill(busy, signal.SIGSTOP)
        groups.append(group)
    # When the other one was quick, nobody has missed it yet.
    until(lambda: f"engine 0: vLLM's core process {busy} has not answered for 8 s" in caplog.text, 30)
    until(lambda: len(stack.engines.pool.members("new", "up")) == 2)
    assert sorted(group.prompt.id for group in groups) == [f"p{index}" for index in range(8)]
    for group in groups:
        if group.prompt.id in reference:
            assert group.rollouts[0].tokens.tolist() == reference[group.prompt.id].tokens.tolist()
    assert gone(idle)
    assert gone(busy)
    list(stack.engines.generate(requests(2)))
    stack.assert_all_follow()


def stop_in_the_next_sync(stack: Stack, pid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once engines are paused, and before they begin to receive."""
    receive = stack.engines.receive

    def stop_then_receive(*arguments: Any) -> list[Any]:
        os.kill(pid, signal.SIGSTOP)
        monkeypatch.undo()
        return receive(*arguments)

    monkeypatch.setattr(stack.engines, "receive", stop_then_receive)


@pytest.mark.parametrize("who", ["core", "actor"])
def test_an_engine_that_stops_running_in_a_sync_does_not_stop_it(
    stack: Stack, who: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack.train()
    stop_in_the_next_sync(stack, stack.pid_of(1, core=who == "core"), monkeypatch)
    metrics = stack.sync()
    assert 6 < metrics["sync/seconds"] < 60
    late = "worker 0 has not run" if who == "core" else "its process has not answered"
    words = rf"weight version {stack.version}: nothing has moved for 6 s; late: engine 1 \({late} for [567] s"
    assert re.search(words, caplog.text)
    list(stack.engines.generate(requests(2)))
    assert len(stack.engines.members) == 2
    stack.assert_all_follow()


def test_a_bridge_that_stops_running_is_made_again(
    stack: Stack, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack.train()
    # Any: only a bridge with an actor of its own has these.
    home: Any = stack.weights._home
    before = home._actor
    stop_in_the_next_sync(stack, ray.get(before.process_id.remote()), monkeypatch)
    metrics = stack.sync()
    assert 6 < metrics["sync/seconds"] < 60
    assert "late: bridge (its process has not answered for " in caplog.text
    assert home._actor is not before
    assert metrics["sync/engines"] == 2
    stack.assert_all_follow()


def test_a_bridge_that_dies_is_made_again(stack: Stack) -> None:
    stack.train()
    ray.kill(stack.weights._home._actor)  # pyright: ignore[reportAttributeAccessIssue]
    stack.sync()
    stack.assert_all_follow()


def test_the_bridge_in_a_trainer_rank_sends_only_what_changed(stack: Stack) -> None:
    config = config_of(
        stack.folder / "model", placement="trainer", skip_unchanged=True, check_logprobs_every=1
    )
    stack.weights = WeightBridge(
        config, stack.reservation, stack.trainers, stack.engines, version=stack.version, probe=PROBE
    )
    stack.train()
    full = stack.sync()
    assert full["sync/logprob_difference_max"] < 1e-4
    nothing = stack.sync()
    assert (nothing["sync/bytes"], nothing["sync/buckets"], nothing["sync/collectives"]) == (0, 0, 1)
    stack.assert_all_follow()
    stack.train()
    assert stack.sync()["sync/units_sent"] == full["sync/units_sent"]
    stack.assert_all_follow()


def test_without_a_copy_the_trainers_give_a_lost_engine_its_weights(stack: Stack) -> None:
    os.kill(stack.pid_of(1), signal.SIGKILL)
    with ThreadPoolExecutor(1) as pool:
        generating = pool.submit(lambda: list(stack.engines.generate(requests(6))))
        assert len(generating.result()) == 6
    assert len(stack.engines.members) == 2
    stack.assert_all_follow()
    # The next sync takes both in again; it has to be a whole one.
    assert stack.sync()["sync/engines"] == 2
    stack.assert_all_follow()

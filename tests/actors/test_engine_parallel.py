"""One engine of two workers that share its matrices, against transformers on the same weights."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.deadline import ActorLostError
from actors.engine import EngineError, EngineInfo
from tests.actors.engine_helpers import (
    Rig,
    Sender,
    ask,
    assert_copies_sample_the_same,
    gone,
    hf_tensors,
    make_model,
    prompt,
    reference_greedy,
    reference_logprobs,
    reference_score,
    settings,
    started,
)

pytestmark = pytest.mark.engine
pytest_plugins = ("tests.actors.engine_fixtures",)


@pytest.fixture(scope="module")
def rig(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    # More than one block of vLLM's key-value cache (128 tokens on CPU), so that prefixes can be cached.
    with started("llama", tmp_path_factory.mktemp("pair"), workers=2, max_model_len=192) as rig:
        # Nobody is to replace it when it is killed.
        rig.engines.close()
        yield rig


def assert_follows(rig: Rig, model: Any) -> None:
    for group in rig.engines.generate((prompt(i), settings(temperature=0.0)) for i in range(3)):
        assert group.rollouts[0].tokens.tolist() == reference_greedy(model, group.prompt.tokens, 12)
    (group,) = rig.engines.generate([(prompt(7), settings(n=4, seed=3))])
    for index, rollout in enumerate(group.rollouts):
        np.testing.assert_allclose(rollout.logprobs, reference_logprobs(model, group, index), atol=1e-4)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_two_workers_sample_like_transformers(rig: Rig) -> None:
    info: EngineInfo = ask(rig, "info")
    core, *workers = info.child_pids
    assert parent(core) == info.pid
    assert [parent(worker) for worker in workers] == [core, core]
    assert_follows(rig, rig.model)


def test_score_takes_nothing_from_cached_prefixes(rig: Rig) -> None:
    long = prompt(11, length=150)
    expected = reference_score(rig.model, long.tokens)
    ask(rig, "generate", long, settings(max_tokens=1))
    # Once after the prompt was cached, and once after it was scored.
    for _ in range(2):
        np.testing.assert_allclose(ask(rig, "score", long.tokens), expected, atol=1e-4)
    with ThreadPoolExecutor(40) as threads:
        scores = [threads.submit(ask, rig, "score", long.tokens) for _ in range(40)]
        time.sleep(0.1)
        rig.engines.pause(mode="abort")
        rig.engines.resume()
    for score in scores:
        np.testing.assert_allclose(score.result(), expected, atol=1e-4)
    with pytest.raises(EngineError, match="engine 0: 192 tokens to score: vLLM failed"):
        ask(rig, "score", prompt(12, length=192).tokens)


def test_every_worker_gets_its_part_also_after_a_failed_update(rig: Rig) -> None:
    """The first worker's failure once left the second one's answer to be taken for that of the next call."""
    whole = hf_tensors(rig.model)
    k_proj = "model.layers.1.self_attn.k_proj.weight"
    rig.engines.pause()
    for attempt in range(2):
        broken = {name: tensor for name, tensor in whole.items() if name != k_proj}
        sender = Sender(rig.engines, broken)
        with pytest.raises(EngineError, match=r"model\.layers\.1\.self_attn\.qkv_proj"):
            sender.push(attempt)
    model = make_model("llama", seed=2)
    sender = Sender(rig.engines, hf_tensors(rig.model))
    sender.push(5)
    sender.group.close()
    assert len(sender.reports) == 2
    rig.engines.resume()
    assert_copies_sample_the_same(rig, rig.model, model, version=6)
    assert_follows(rig, model)
    assert ask(rig, "info").version == 9


def shared_memory(pid: int) -> set[str]:
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {
        line[line.index("/dev/shm") :].removesuffix(" (deleted)") for line in lines if "/dev/shm/psm" in line
    }


def test_its_processes_and_what_they_share_end_with_the_actor(rig: Rig) -> None:
    info: EngineInfo = ask(rig, "info")
    shared = shared_memory(info.child_pids[0])
    assert len(shared) >= 3
    with ThreadPoolExecutor() as threads:
        working = threads.submit(ask, rig, "generate", prompt(1), settings(n=8, max_tokens=180, seed=1))
        while ask(rig, "info").in_flight == 0 and not working.done():
            time.sleep(0.005)
        os.kill(info.pid, signal.SIGKILL)
        with pytest.raises(ActorLostError, match="generate: engine 0"):
            working.result(30)
    assert all(gone(pid) for pid in info.child_pids)
    assert not any(Path(name).exists() for name in shared)

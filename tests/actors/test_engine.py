"""Real vLLM engines in a real local Ray, against transformers on the same weights."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.deadline import ActorLostError
from actors.engine import EngineError
from actors.engine_group import EngineGroup
from actors.engine_pool import EnginePool
from algorithms.data import Group, SamplingSettings
from tests.actors.engine_episodes import assert_episodes_are_transformers
from tests.actors.engine_helpers import (
    EOS,
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
    settings,
)
from tests.actors.engine_teaching import assert_judges_like_transformers

pytestmark = pytest.mark.engine
pytest_plugins = ("tests.actors.engine_fixtures",)


def generate(rig: Rig, *requests: Any) -> dict[str, Group]:
    return {group.prompt.id: group for group in rig.engines.generate(requests)}


def assert_follows(rig: Rig, model: Any) -> None:
    """Greedy tokens and sampled log-probabilities are those of the model in transformers."""
    greedy = generate(rig, *((prompt(i), settings(temperature=0.0)) for i in range(3)))
    for group in greedy.values():
        expected = reference_greedy(model, group.prompt.tokens, 12)
        assert group.rollouts[0].tokens.tolist() == expected
    group = generate(rig, (prompt(7), settings(n=4, seed=3)))["p7"]
    for index, rollout in enumerate(group.rollouts):
        np.testing.assert_allclose(rollout.logprobs, reference_logprobs(model, group, index), atol=1e-3)


def push(rig: Rig, model: Any, version: int) -> None:
    rig.engines.pause()
    sender = Sender(rig.engines, hf_tensors(model))
    assert len(sender.plan.buckets) > 3
    sender.push(version)
    sender.group.close()
    rig.engines.resume()


@pytest.mark.parametrize("family", ["llama", "qwen3", "moe"])
def test_start_samples_like_transformers(rigs: dict[str, Rig], family: str) -> None:
    assert_follows(rigs[family], rigs[family].model)


def test_logprobs_are_those_of_the_sampling_temperature(rigs: dict[str, Rig]) -> None:
    rig = rigs["llama"]
    group = generate(rig, (prompt(1), settings(n=2, temperature=0.7, seed=1)))["p1"]
    for index, rollout in enumerate(group.rollouts):
        expected = reference_logprobs(rig.model, group, index, temperature=0.7)
        np.testing.assert_allclose(rollout.logprobs, expected, atol=1e-3)


def test_a_flood_of_seeded_prompts_is_sampled_like_each_alone(rigs: dict[str, Rig]) -> None:
    """More prompt tokens than vLLM takes into one step: some prompts have to wait, or would be cut in two."""
    rig = rigs["llama"]
    requests = [(prompt(i, length=110), settings(max_tokens=2, seed=100 * i)) for i in range(60)]
    together = generate(rig, *requests)
    assert len(together) == 60
    for each in requests[::20]:
        name = each[0].id
        alone = generate(rig, each)[name]
        assert together[name].rollouts[0].tokens.tolist() == alone.rollouts[0].tokens.tolist()
        expected = reference_logprobs(rig.model, together[name], 0)
        np.testing.assert_allclose(together[name].rollouts[0].logprobs, expected, atol=1e-3)


def test_samples_differ_and_a_seed_repeats_them(rigs: dict[str, Rig]) -> None:
    rig = rigs["llama"]
    first = generate(rig, (prompt(2), settings(n=8, seed=5)))["p2"]
    again = generate(rig, (prompt(2), settings(n=8, seed=5)))["p2"]
    other = generate(rig, (prompt(2), settings(n=8, seed=500)))["p2"]
    rows = [tuple(rollout.tokens) for rollout in first.rollouts]
    assert len(set(rows)) == 8
    assert rows == [tuple(rollout.tokens) for rollout in again.rollouts]
    assert rows != [tuple(rollout.tokens) for rollout in other.rollouts]


def test_length_and_stop_are_told_apart_and_the_last_token_is_kept(rigs: dict[str, Rig]) -> None:
    rig = rigs["llama"]
    likeliest = reference_greedy(rig.model, prompt(0).tokens, 6)
    word = f"w{likeliest[3]}"
    assert likeliest.index(likeliest[3]) == 3
    cut = generate(rig, (prompt(0), settings(max_tokens=6, temperature=0.0)))["p0"].rollouts[0]
    stopping = settings(max_tokens=6, temperature=0.0, stop=(word,))
    stopped = generate(rig, (prompt(0), stopping))["p0"].rollouts[0]
    assert (cut.finish, cut.tokens.tolist()) == ("length", likeliest)
    assert cut.text.split() == [f"w{token}" for token in likeliest]
    assert (stopped.finish, stopped.tokens.tolist()) == ("stop", likeliest[:4])
    assert stopped.text.split() == [f"w{token}" for token in likeliest[:3]]
    assert stopped.loss_mask.tolist() == [1] * 4
    assert len(stopped.logprobs) == 4


def test_end_of_sequence_is_a_token_but_not_text(rigs: dict[str, Rig]) -> None:
    groups = generate(rigs["llama"], *((prompt(i), settings(n=8, max_tokens=100, seed=i)) for i in range(3)))
    ended = [r for group in groups.values() for r in group.rollouts if r.finish == "stop"]
    assert ended
    for rollout in ended:
        assert rollout.tokens[-1] == EOS
        assert EOS not in rollout.tokens[:-1]
        assert len(rollout.text.split()) == sum(token > EOS for token in rollout.tokens)


def test_aborted_completions_come_back_with_what_they_have(rigs: dict[str, Rig]) -> None:
    rig = rigs["llama"]
    answer: list[Group] = []
    long = (prompt(3), settings(n=4, max_tokens=120, seed=9, top_k=2))
    thread = threading.Thread(target=lambda: answer.extend(rig.engines.generate([long])))
    thread.start()
    end = time.monotonic() + 20
    while rig.engines.info()[0].in_flight == 0 and time.monotonic() < end:
        time.sleep(0.005)
    assert rig.engines.abort_all() == 1
    thread.join(30)
    assert len(answer) == 1
    assert [rollout.finish for rollout in answer[0].rollouts] == ["abort"] * 4
    for index, rollout in enumerate(answer[0].rollouts):
        assert len(rollout.tokens) == len(rollout.logprobs) == len(rollout.loss_mask) < 120
        assert len(reference_logprobs(rig.model, answer[0], index)) == len(rollout.tokens)


@pytest.mark.parametrize("family", ["llama", "qwen3", "moe"])
def test_given_tokens_are_judged_like_transformers_does(rigs: dict[str, Rig], family: str) -> None:
    assert_judges_like_transformers(rigs[family])


def test_too_long_prompt_is_named(rigs: dict[str, Rig]) -> None:
    with pytest.raises(EngineError, match=r"prompt p4: 120 tokens .* max_model_len 128"):
        ask(rigs["llama"], "generate", prompt(4, length=120), settings(max_tokens=9))


def test_episodes_are_rows_like_transformers(rigs: dict[str, Rig], tmp_path: Path) -> None:
    assert_episodes_are_transformers(rigs["llama"], tmp_path)


def test_both_engines_of_a_group_get_work(rigs: dict[str, Rig]) -> None:
    actors = [rigs[family].engines.members[0].actor for family in ("llama", "qwen3")]
    both = EngineGroup(EnginePool(actors), room=2, timeout_s=60)
    groups = list(both.generate((prompt(i), settings(temperature=0.0)) for i in range(12)))
    assert sorted(group.prompt.id for group in groups) == sorted(f"p{i}" for i in range(12))
    models = [rigs[family].model for family in ("llama", "qwen3")]
    by_engine = [
        sum(
            reference_greedy(model, group.prompt.tokens, 12) == group.rollouts[0].tokens.tolist()
            for group in groups
        )
        for model in models
    ]
    assert sum(by_engine) == 12
    assert min(by_engine) >= 3


@pytest.mark.parametrize("family", ["llama", "qwen3", "moe"])
def test_pushed_weights_are_the_ones_that_sample(rigs: dict[str, Rig], family: str) -> None:
    rig = rigs[family]
    generate(rig, (prompt(0), settings(temperature=0.0)))
    model = make_model(family, seed=2)
    push(rig, model, version=1)
    assert_follows(rig, model)
    group = generate(rig, (prompt(0), settings(n=2)))["p0"]
    assert [rollout.versions for rollout in group.rollouts] == [(1, 1)] * 2
    assert_copies_sample_the_same(rig, model, rig.model, version=2)
    assert_follows(rig, rig.model)


def pushed_in_flight(rig: Rig, model: Any, mode: str, sampling: SamplingSettings) -> tuple[Group, Group, int]:
    """A group that was begun before the push of `model`, one asked for in the pause, the version before."""
    before = rig.engines.info()[0].version
    with ThreadPoolExecutor() as threads:
        begun = threads.submit(generate, rig, (prompt(5), sampling))
        while rig.engines.info()[0].in_flight == 0 and not begun.done():
            time.sleep(0.001)
        assert rig.engines.pause(mode=mode) in (0, sampling.n)
        asked = threads.submit(generate, rig.beside(), (prompt(8), settings(seed=1)))
        push(rig, model, version=before + 1)
        return begun.result(60)["p5"], asked.result(60)["p8"], before


@pytest.mark.parametrize("mode", ["keep", "abort"])
def test_completions_in_flight_go_on_with_the_new_weights(rigs: dict[str, Rig], mode: str) -> None:
    rig = rigs["llama"]
    model = make_model("llama", seed=3)
    straddling = 0
    # On a busy machine the completions may all be over before the pause; then the next attempt counts.
    for attempt in range(5):
        sampling = settings(n=7, max_tokens=120, seed=10 * attempt)
        group, asked, before = pushed_in_flight(rig, model, mode, sampling)
        push(rig, rig.model, version=before + 2)
        assert asked.rollouts[0].versions == (before + 1, before + 1)
        assert len({tuple(rollout.tokens) for rollout in group.rollouts}) == 7
        for index, rollout in enumerate(group.rollouts):
            old = np.abs(rollout.logprobs - reference_logprobs(rig.model, group, index)) < 1e-3
            new = np.abs(rollout.logprobs - reference_logprobs(model, group, index)) < 1e-3
            cut = int(np.argmin(np.append(old, False)))
            assert new[cut:].all()
            versions = [before] * cut + [before + 1] * (len(old) - cut)
            assert rollout.versions == (versions[0], versions[-1])
            straddling += versions[0] != versions[-1]
            assert rollout.finish == ("stop" if rollout.tokens[-1] == EOS else "length")
            assert len(rollout.tokens) == 120 or rollout.finish == "stop"
            assert rollout.text.split() == [f"w{token}" for token in rollout.tokens if token > EOS]
        if straddling:
            return
    pytest.fail("no completion was in flight during a push")


def test_a_stop_string_across_a_cut_is_found(rigs: dict[str, Rig]) -> None:
    rig = rigs["llama"]
    likeliest = reference_greedy(rig.model, prompt(5).tokens, 120)
    words = [f"w{token}" for token in likeliest]
    sampling = settings(n=2, max_tokens=120, temperature=0.0, stop=(" ".join(words[1:110]),))
    for _ in range(5):
        group, _, before = pushed_in_flight(rig, rig.model, "abort", sampling)
        for rollout in group.rollouts:
            assert (rollout.finish, rollout.tokens.tolist()) == ("stop", likeliest[:110])
            assert rollout.text.split() == words[:1]
            np.testing.assert_allclose(rollout.logprobs, reference_logprobs(rig.model, group, 0), atol=1e-3)
        if group.rollouts[0].versions == (before, before + 1):
            return
    pytest.fail("no completion was in flight during a push")


def test_completions_that_a_pause_cut_can_be_aborted(rigs: dict[str, Rig]) -> None:
    rig = rigs["llama"]
    likeliest = reference_greedy(rig.model, prompt(5).tokens, 120)
    for attempt in range(8):
        with ThreadPoolExecutor() as threads:
            long = (prompt(5), settings(n=16, max_tokens=120, temperature=0.0))
            begun = threads.submit(generate, rig, long)
            while rig.engines.info()[0].in_flight == 0 and not begun.done():
                time.sleep(0.001)
            # The sooner, the fewer tokens are there, maybe none.
            time.sleep(0.02 * attempt)
            prompts = 1 + bool(rig.engines.pause(mode="abort"))
            asked = threads.submit(generate, rig.beside(), (prompt(6), settings(n=2)))
            while rig.engines.info()[0].in_flight < prompts:
                time.sleep(0.001)
            assert rig.engines.abort_all() == prompts
            rollouts = begun.result(30)["p5"].rollouts
            waited = asked.result(30)["p6"].rollouts
            assert rig.engines.info()[0].paused
            rig.engines.resume()
        assert [(rollout.finish, len(rollout.tokens)) for rollout in waited] == [("abort", 0)] * 2
        for rollout in rollouts:
            assert rollout.tokens.tolist() == likeliest[: len(rollout.tokens)]
            assert rollout.finish == ("length" if len(rollout.tokens) == 120 else "abort")
        if any(0 < len(rollout.tokens) < 120 for rollout in rollouts):
            return
    pytest.fail("no completion was in flight at a pause")


def test_a_caller_who_leaves_gives_up_what_is_in_flight(rigs: dict[str, Rig]) -> None:
    engines = rigs["llama"].engines
    groups = engines.generate(
        [(prompt(1), settings(max_tokens=1)), (prompt(2), settings(max_tokens=120, n=7))]
    )
    assert next(groups).prompt.id == "p1"
    engines.pause()
    groups.close()
    end = time.monotonic() + 20
    while engines.info()[0].in_flight and time.monotonic() < end:
        time.sleep(0.005)
    assert engines.info()[0].in_flight == 0
    assert engines._room.in_flight == (0,)
    engines.resume()


def drop(tensors: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: tensor for key, tensor in tensors.items() if key != name}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_failed_update_is_named_refused_and_recovered_from(rigs: dict[str, Rig], family: str) -> None:
    rig = rigs[family]
    whole = hf_tensors(rig.model)
    embedding = "model.embed_tokens.weight"
    k_proj = "model.layers.1.self_attn.k_proj.weight"
    broken = {
        # name of the failure: (what is sent, bucket before which the sender dies, what the error says)
        "sender dies": (whole, 3, "broadcast from bridge"),
        "half of qkv": (drop(whole, k_proj), None, "model.layers.1.self_attn.qkv_proj"),
        "no norm": (drop(whole, "model.norm.weight"), None, r"model\.norm"),
        "no embedding": (drop(whole, embedding), None, embedding.removesuffix(".weight")),
        "unknown name": ({**whole, "model.layers.0.foo.weight": whole["model.norm.weight"]}, None, "foo"),
        "wrong shape": ({**whole, embedding: whole[embedding][:, :8].contiguous()}, None, embedding),
    }
    rig.engines.pause()
    for tensors, stop_before, message in broken.values():
        with pytest.raises(EngineError, match=message) as failure:
            Sender(rig.engines, tensors).push(700, stop_before)
        assert "version 700" in str(failure.value)
        with pytest.raises(EngineError, match=r"prompt p1 refused.*version 700"):
            ask(rig, "generate", prompt(1), settings())
        with pytest.raises(EngineError, match="stays paused"):
            rig.engines.resume()
        assert rig.engines.info()[0].version < 700
    push(rig, rig.model, version=701)
    assert_follows(rig, rig.model)
    assert rig.engines.info()[0].failed_sync is None


def test_a_killed_engine_is_noticed_while_idle_and_named_with_the_prompt(rigs: dict[str, Rig]) -> None:
    rig = rigs["moe"]
    # Nobody is to replace it.
    rig.engines.close()
    (info,) = rig.engines.info()
    (core,) = info.child_pids
    ended = f"vLLM's core process {core} ended with exit code -9"
    with ThreadPoolExecutor() as threads:
        watching = threads.submit(ask, rig, "watch")
        os.kill(core, signal.SIGKILL)
        died = time.monotonic()
        with pytest.raises(EngineError, match=f"engine 0: {ended}"):
            watching.result()
    assert time.monotonic() - died < 10
    with pytest.raises(EngineError, match=f"engine 0: prompt p6: vLLM failed: {ended}"):
        ask(rig, "generate", prompt(6), settings())
    os.kill(info.pid, signal.SIGKILL)
    with pytest.raises(ActorLostError, match="generate: engine 0"):
        ask(rig, "generate", prompt(6), settings())
    assert all(gone(pid) for pid in info.child_pids)


@pytest.mark.parametrize("paused", [False, True])
def test_an_engine_killed_at_work_is_noticed(rigs: dict[str, Rig], paused: bool) -> None:
    rig = rigs["qwen3" if paused else "llama"]
    rig.engines.close()
    (info,) = rig.engines.info()
    (core,) = info.child_pids
    ended = f"vLLM's core process {core} ended with exit code -9"
    with ThreadPoolExecutor() as threads:
        watching = threads.submit(ask, rig, "watch")
        working = threads.submit(ask, rig, "generate", prompt(5), settings(n=32, max_tokens=120, seed=1))
        while rig.engines.info()[0].in_flight == 0 and not working.done():
            time.sleep(0.001)
        if paused:
            rig.engines.pause(mode="abort")
        os.kill(core, signal.SIGKILL)
        died = time.monotonic()
        with pytest.raises(EngineError, match=f"engine 0: {ended}"):
            watching.result()
        with pytest.raises(EngineError, match=f"engine 0: .*{ended}"):
            working.result()
    assert time.monotonic() - died < 10


DRIVER = """
import sys, time
import ray
from ray.util.placement_group import placement_group
from actors.engine_start import create_engines
from tests.actors.engine_helpers import run_config
ray.init(address=sys.argv[1], log_to_driver=False)
group = placement_group([{"CPU": 0.5}])
engines = create_engines(run_config(sys.argv[2]), sys.argv[2], group, [0])
engines.ready(engines.start(), 300)
(info,) = engines.info()
sys.stdout.write(" ".join(str(pid) for pid in (info.pid, *info.child_pids)) + chr(10))
sys.stdout.flush()
time.sleep(300)
"""


def test_killed_driver_leaves_no_process(ray_cluster: str, rigs: dict[str, Rig]) -> None:
    command = [sys.executable, "-c", DRIVER, ray_cluster, rigs["llama"].config.model.model]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()) as driver:
        assert driver.stdout is not None
        pids = [int(pid) for pid in driver.stdout.readline().split()]
        driver.kill()
    assert len(pids) >= 2
    assert all(gone(pid) for pid in pids)

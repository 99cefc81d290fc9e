"""One engine of two workers that is sent adapters made by PEFT, against PEFT on the same model."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import set_peft_model_state_dict

from actors.engine import EngineError
from tests.actors.engine_helpers import (
    Rig,
    Sender,
    ask,
    hf_tensors,
    make_model,
    prompt,
    reference_greedy,
    reference_logprobs,
    reference_score,
    settings,
    started,
)
from tests.actors.lora_helpers import LINEARS, Adapter, make_adapter

pytestmark = pytest.mark.engine
pytest_plugins = ("tests.actors.engine_fixtures",)


@pytest.fixture(scope="module")
def rig(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with started("llama", tmp_path_factory.mktemp("adapted"), workers=2, max_lora_rank=7) as rig:
        yield rig


def send(rig: Rig, adapter: Adapter, version: int, **others: Any) -> Sender:
    tensors = others.pop("tensors", adapter.tensors)
    rig.engines.pause()
    sender = Sender(rig.engines, tensors, bucket_bytes=6_000, ranks=2, adapter=adapter.config, **others)
    assert len(sender.plan.buckets) > 3
    sender.push(version)
    sender.group.close()
    rig.engines.resume()
    return sender


def assert_follows(rig: Rig, model: Any) -> None:
    tokens = prompt(1, length=60).tokens
    np.testing.assert_allclose(ask(rig, "score", tokens), reference_score(model, tokens), atol=1e-4)
    for group in rig.engines.generate((prompt(i), settings(temperature=0.0)) for i in range(2)):
        assert group.rollouts[0].tokens.tolist() == reference_greedy(model, group.prompt.tokens, 12)


def difference(one: Any, other: Any) -> float:
    tokens = prompt(1, length=60).tokens
    return float(np.abs(reference_score(one, tokens) - reference_score(other, tokens)).max())


def test_versions_of_an_adapter_replace_one_another(rig: Rig) -> None:
    assert_follows(rig, rig.model)
    first, second = make_adapter("llama", seed=1), make_adapter("llama", seed=2, use_rslora=True)
    assert min(difference(rig.model, first.model), difference(first.model, second.model)) > 0.5
    sender = send(rig, first, 1)
    assert_follows(rig, first.model)
    assert [report.tensors for report in sender.reports] == [len(first.tensors)] * 2
    assert len({report.digest for report in sender.reports}) == 1
    send(rig, second, 2)
    assert_follows(rig, second.model)
    assert ask(rig, "info").version == 2


def test_embedding_and_head(rig: Rig) -> None:
    adapter = make_adapter("llama", seed=3, modules=("embed_tokens", "lm_head", *LINEARS))
    send(rig, adapter, 3)
    assert_follows(rig, adapter.model)


def test_requests_in_flight_over_a_sync_go_on_with_the_new_adapter(rig: Rig) -> None:
    old, new = make_adapter("llama", seed=1), make_adapter("llama", seed=2)
    for attempt in range(5):
        send(rig, old, 10 * attempt + 10)
        with ThreadPoolExecutor() as threads:
            begun = threads.submit(
                ask, rig, "generate", prompt(5), settings(n=4, max_tokens=110, seed=attempt)
            )
            while ask(rig, "info").in_flight == 0 and not begun.done():
                time.sleep(0.001)
            send(rig, new, 10 * attempt + 11)
            group = begun.result(60)
        straddling = 0
        for index, rollout in enumerate(group.rollouts):
            by_old = np.abs(rollout.logprobs - reference_logprobs(old.model, group, index)) < 1e-3
            by_new = np.abs(rollout.logprobs - reference_logprobs(new.model, group, index)) < 1e-3
            cut = int(np.argmin(np.append(by_old, False)))
            assert by_new[cut:].all()
            straddling += 0 < cut < len(by_new)
        if straddling:
            return
    pytest.fail("no completion was in flight during a sync")


def test_units_that_did_not_change_need_not_be_sent_again(rig: Rig) -> None:
    first, second = make_adapter("llama", seed=1), make_adapter("llama", seed=2)
    mixed = {
        name: (second if ".layers.1.mlp" in name else first).tensors[name].clone() for name in first.tensors
    }
    rig.engines.pause()
    sender = Sender(rig.engines, dict(first.tensors), adapter=first.config, partial=True)
    sender.push(70)
    sender.tensors.update(mixed)
    sender.push(71, units=["base_model.model.model.layers.1.mlp"])
    sender.group.close()
    rig.engines.resume()
    assert sender.reports[0].tensors == 6
    set_peft_model_state_dict(first.model, mixed)
    assert_follows(rig, first.model)


def spoiled(number: int, buffer: torch.Tensor) -> None:
    if number == 2:
        buffer[5] += 1


def test_what_has_no_place_is_named_before_anything_is_sent(rig: Rig) -> None:
    adapter = make_adapter("llama", seed=1)
    send(rig, adapter, 600)
    whole, q = adapter.tensors, "base_model.model.model.layers.1.self_attn.q_proj"
    a, b = f"{q}.lora_A.weight", f"{q}.lora_B.weight"
    unknown = "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"
    saved = "base_model.model.lm_head.weight"
    misfits: list[tuple[str, dict[str, torch.Tensor]]] = [
        (rf"no place for {unknown}", {**whole, unknown: whole[a]}),
        (rf"no place for {saved}", {**whole, saved: whole[a]}),
        (f"{b} came without the other half", {k: v for k, v in whole.items() if k != a}),
        (rf"{a} is \[3, 64\], must be \[4, 64\]", {**whole, a: whole[a][:3].contiguous()}),
        (rf"{b} is \[64, 4\], must be \[128, 4\]", {**whole, b: whole[b][:64].contiguous()}),
    ]
    for message, tensors in misfits:
        with pytest.raises(EngineError, match=f"weights cannot be received: .*{message}"):
            Sender(rig.engines, tensors, adapter=adapter.config)
    # It was not touched.
    assert_follows(rig, adapter.model)


def test_what_is_not_what_was_sent_is_refused(rig: Rig) -> None:
    adapter = make_adapter("llama", seed=1)
    with pytest.raises(EngineError, match=r"bucket 2 of .*not what was sent: base_model\.model\..*lora_"):
        send(rig, adapter, 700, spoil=spoiled)
    with pytest.raises(EngineError, match=r"prompt p1 refused.*version 700"):
        ask(rig, "generate", prompt(1), settings())
    with pytest.raises(EngineError, match="stays paused"):
        rig.engines.resume()
    send(rig, adapter, 701)
    assert_follows(rig, adapter.model)


def test_the_base_can_still_be_sent(rig: Rig) -> None:
    """Full weights leave no adapter; no adapter hides that some of them did not come."""
    adapter, model = make_adapter("llama", seed=1), make_model("llama", seed=2)
    rig.engines.pause()
    with pytest.raises(EngineError, match="broadcast from bridge"):
        Sender(rig.engines, hf_tensors(model)).push(800, stop_before=3)
    with pytest.raises(EngineError, match="the model's own weights are those of a failed update"):
        send(rig, adapter, 801)
    sender = Sender(rig.engines, hf_tensors(model))
    sender.push(802)
    sender.group.close()
    rig.engines.resume()
    assert_follows(rig, model)


def test_the_other_modules_of_a_model_with_experts(ray_cluster: str, tmp_path: Path) -> None:
    modules = ("q_proj", "v_proj", "o_proj", "embed_tokens")
    with started("moe", tmp_path, workers=1, max_lora_rank=4, lora_modules=modules) as rig:
        assert_follows(rig, rig.model)
        adapter = make_adapter("moe", 1, modules, rank_pattern={"o_proj": 3}, alpha_pattern={"v_proj": 9})
        send(rig, adapter, 1)
        assert_follows(rig, adapter.model)

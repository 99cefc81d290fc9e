"""LoRA on Megatron under many layouts, against peft on transformers' models and against W + s B A by hand.

The numbers are measured by megatron_lora_worker.py, once per number of processes; here they are judged.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.actors.megatron_lora_layouts import SPLIT, STEPS, TRIPS, steps_of
from tests.actors.megatron_processes import RunWorkers

pytestmark = pytest.mark.megatron
pytest_plugins = ("tests.actors.megatron_fixtures",)

WORKER = Path(__file__).with_name("megatron_lora_worker.py")
STEP_CASES = [
    f"{layout}/{name}/{'split' if distributed else 'whole'}"
    for layout in STEPS
    for name, distributed in steps_of(layout)
]
TRIP_CASES = [f"{layout}/{first}/{name}/trip" for first, second, name in TRIPS for layout in ("one", second)]

Results = Callable[[str], list[Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, run_workers: RunWorkers) -> Results:
    """A case's results, one per rank. Two processes run first: they write checkpoints that one reads."""
    directory = tmp_path_factory.mktemp("lora")
    finished: dict[int, list[dict[str, Any]]] = {}

    def of_case(case: str) -> list[Any]:
        if not finished:
            for size in (2, 1):
                finished[size] = []
            for size in (2, 1):
                finished[size] = run_workers(WORKER, size, directory, prefix=f"{size}-", timeout_s=400)
        ranks = finished[1 if case.startswith("one") else 2]
        assert ranks, "the processes of this layout have failed before"
        return [rank[case] for rank in ranks]

    return of_case


@pytest.mark.parametrize("case", STEP_CASES)
def test_steps_equal_those_of_peft(case: str, results: Results) -> None:
    measured = results(case)
    assert any(rank["logprobs"] is not None for rank in measured)
    for rank in measured:
        assert rank["logprobs"] is None or rank["logprobs"] < 1e-5
        for step in range(3 if case.endswith("split") else 1):
            assert rank[f"loss_{step}"] < 1e-5
            # Of the whole gradient before clipping: every element was counted once.
            assert rank[f"norm_{step}"] < 1e-5
        if case.endswith("whole"):
            assert rank["grads"] < 2e-5
        assert rank["after"] < 1e-5


@pytest.mark.parametrize("case", STEP_CASES)
def test_nothing_but_adapters_and_saved_modules_is_trained(case: str, results: Results) -> None:
    for rank in results(case):
        assert rank["base_kept"]
        if "-saved" not in case:
            assert rank["trained"] == rank["adapters"]
        if case.endswith("whole"):
            assert rank["optimized"] == rank["trained"]


@pytest.mark.parametrize("layout", SPLIT)
def test_without_adapters_the_model_is_the_base_to_the_bit(layout: str, results: Results) -> None:
    same = [rank["base_is_base"] for rank in results(f"{layout}/{STEPS[layout][0]}/split")]
    # Stages that are not the last have no log-probabilities.
    last_stages = 1 if layout == "one" or "pp2" in layout else 2
    assert [one for one in same if one] == [[True, True]] * last_stages


def test_adapters_start_as_pefts_do_under_every_layout(results: Results) -> None:
    (one,) = results("one/initial")
    for module, whole in one.items():
        A, B = torch.tensor(whole["A"]), torch.tensor(whole["B"])
        if module.endswith("embed_tokens"):
            assert not A.any()
            assert B.std() == pytest.approx(1, rel=0.3)
        else:
            bound = 1 / math.sqrt(whole["in"])
            assert not B.any()
            assert A.abs().max() < bound
            assert A.std() == pytest.approx(bound / math.sqrt(3), rel=0.3)
    assert len({str(part["A"]) for part in one.values()}) == len(one)
    for rank in results("tp2-sp/initial"):
        assert rank.keys() == one.keys()
        for module, part in rank.items():
            start, stop = part["columns"]
            assert torch.equal(torch.tensor(part["A"]), torch.tensor(one[module]["A"])[:, start:stop])
            if module.endswith("embed_tokens"):
                assert part["B"] == one[module]["B"]


def test_dropout_is_the_same_where_ranks_see_the_same_input(results: Results) -> None:
    first, second = results("tp2/dropout")
    assert first == second
    for name in "qv":
        assert sum(first[name]) / (8 * first["inputs"][0]) == pytest.approx(0.6, abs=0.12)
    assert first["q"] != first["v"]
    assert first["o"][0] != first["o"][1]
    assert set(first["evaluated"]) == {first["inputs"][0]}


def test_dropout_differs_where_ranks_see_parts_of_the_input(results: Results) -> None:
    first, second = results("tp2-sp/dropout")
    # The inputs' tokens are put together, the outputs' are not.
    assert first["q"] == second["q"]
    assert first["q"][:8] != first["q"][8:]
    for rank in (first, second):
        assert rank["o"][0] != rank["o"][1]


def test_bfloat16_is_close_to_float32(results: Results) -> None:
    for rank in results("tp2-sp-ep2/bfloat16"):
        assert rank["loss"] < 2e-2
        assert rank["norm"] < 5e-2
        assert rank["base_kept"]


@pytest.mark.parametrize("case", TRIP_CASES)
def test_a_checkpoint_goes_on_under_another_layout(case: str, results: Results) -> None:
    saved = ["embedding.word_embeddings.weight", "output_layer.weight"] if "-saved" in case else []
    for rank in results(case):
        assert rank["iteration"] == 2
        assert rank["loaded"] < 1e-5
        assert rank["loss"] < 1e-5
        # The small gradients of a vision tower differ most after Adam's steps.
        assert rank["norm"] < (5e-5 if "_vl" in case else 1e-5)
        # With the optimizer's state the third step is the reference's.
        assert rank["after"] < 1e-5
        assert rank["other_keys"] == saved
        assert rank["adapter_keys"] == []
        assert rank["base"]

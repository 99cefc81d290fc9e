"""The experts' load, and the losses on it, against transformers' routers: the same however samples are packed.

The numbers are measured by megatron_balance_worker.py, once per number of processes; here they are judged.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.actors.megatron_processes import RunWorkers

pytestmark = pytest.mark.megatron
pytest_plugins = ("tests.actors.megatron_fixtures",)

WORKER = Path(__file__).with_name("megatron_balance_worker.py")
ONE = ("one/qwen3_moe", "one/deepseek_v3", "one/measured only", "one, recompute/qwen3_moe")
TWO = (
    "dp2-ep2/qwen3_moe",
    "tp2-sp-ep2/qwen3_moe",
    "tp2-sp-ep2/deepseek_v3",
    "pp2/qwen3_moe",
    "pp2/measured only",
    "cp2/qwen3_moe",
)

Results = Callable[[str], list[Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, run_workers: RunWorkers) -> Results:
    """What the ranks of a case measured; starts the processes when first asked."""
    finished: dict[int, list[dict[str, Any]]] = {}

    def of_case(case: str) -> list[Any]:
        size = 1 if case.startswith("one") else 2
        if size not in finished:
            finished[size] = run_workers(WORKER, size, tmp_path_factory.mktemp("balance"))
        return [rank[case] for rank in finished[size]]

    return of_case


@pytest.mark.parametrize("case", [*ONE, *TWO])
def test_loads_and_gradients_are_those_of_transformers_routers(case: str, results: Results) -> None:
    for rank in results(case):
        assert len(rank) == 3
        for packing, errors in rank.items():
            assert errors["loss"] < 1e-5, packing
            assert errors["grads"][0] < 1e-5, (packing, errors["grads"][1])
            assert all(error < 1e-5 for error in errors["metrics"].values()), (packing, errors["metrics"])


@pytest.mark.parametrize("layout", ["one", "tp2-sp-ep2"])
def test_deterministic_steps_are_the_same_to_the_bit(layout: str, results: Results) -> None:
    for rank in results(f"{layout}/twice"):
        assert rank == {"enabled": True, "same_numbers": True, "same_weights": True, "moved": True}

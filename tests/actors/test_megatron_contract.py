"""The gradient of a step does not depend on micro-batches, packing, order or layout: torch's, for every loss.

What the losses are is in tests/algorithms/test_losses.py. The numbers are measured by megatron_contract_worker.py,
once per number of processes; here they are judged.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.actors.megatron_contract_cases import LAYOUTS, losses_of, packings_of, world_size
from tests.actors.megatron_processes import RunWorkers

pytestmark = pytest.mark.megatron
pytest_plugins = ("tests.actors.megatron_fixtures",)

WORKER = Path(__file__).with_name("megatron_contract_worker.py")

Results = Callable[[str], list[Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, run_workers: RunWorkers) -> Results:
    """What the ranks of a layout measured; starts the processes when first asked."""
    finished: dict[int, list[dict[str, Any]]] = {}

    def of_case(case: str) -> list[Any]:
        size = world_size(case.split("/", maxsplit=1)[0])
        if size not in finished:
            finished[size] = run_workers(WORKER, size, tmp_path_factory.mktemp("contract"))
        return [rank[case] for rank in finished[size]]

    return of_case


@pytest.mark.parametrize(
    ("layout", "name"), [(layout, name) for layout in LAYOUTS for name in losses_of(layout)]
)
def test_the_gradient_is_that_of_every_sample_by_itself(layout: str, name: str, results: Results) -> None:
    measured = results(f"{layout}/{name}")
    assert len(measured) == world_size(layout)
    for rank in measured:
        assert tuple(rank) == packings_of(layout)
        for packing, errors in rank.items():
            assert errors["loss"] < 1e-5, packing
            assert errors["grads"] < 1e-5, packing

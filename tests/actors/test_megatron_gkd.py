"""A student's step towards a Megatron teacher, against transformers' full logits and torch's autograd and AdamW.

The numbers are measured by megatron_gkd_worker.py on two ranks; here they are judged.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.actors.gkd_reference import BETAS
from tests.actors.megatron_processes import RunWorkers

pytestmark = pytest.mark.megatron
pytest_plugins = ("tests.actors.megatron_fixtures",)

WORKER = Path(__file__).with_name("megatron_gkd_worker.py")
EVERY_BETA = tuple(f"beta {beta:g}" for beta in BETAS)
CASES = [
    *(f"tp2-sp/{name}" for name in (*EVERY_BETA, "temperature", "topk", "tail", "offload")),
    *(f"pp2/{name}" for name in ("beta 0", "beta 0.5", "beta 1", "topk", "offload")),
    *("tp2/beta 0.5", "tp2/offload", "dp2/beta 0.5", "tp2-sp/scoring", "pp2/scoring"),
    *(f"cp2/{name}" for name in ("beta 0.5", "tail", "offload")),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, run_workers: RunWorkers) -> list[dict[str, Any]]:
    return run_workers(WORKER, 2, tmp_path_factory.mktemp("gkd"))


@pytest.mark.parametrize("case", CASES)
def test_a_step_equals_transformers_on_full_logits(case: str, results: list[dict[str, Any]]) -> None:
    for rank in results:
        assert all(error < 1e-5 for error in rank[case].values()), rank[case]


@pytest.mark.parametrize("beta", BETAS)
def test_a_split_vocabulary_is_as_a_whole_one(beta: float, results: list[dict[str, Any]]) -> None:
    for rank in results:
        assert all(error < 1e-5 for error in rank[f"split/{beta:g}"].values()), rank

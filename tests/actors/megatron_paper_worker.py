"""What Megatron says of places and parameters, and what `bascule plan` prints, in a process of its own.

python megatron_paper_worker.py DIRECTORY; the answer is in DIRECTORY/answer.json. Process groups only count, so
that one process can be any rank.
"""

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import torch

from actors.cli import main
from actors.megatron_cpu import install

install()

from megatron.core import parallel_state  # noqa: E402

from actors.megatron_paper import counting_group, expert_rank_of, place_of  # noqa: E402
from actors.megatron_setup import build_chunks, transformer_config  # noqa: E402
from bridge.families import spec_of  # noqa: E402
from bridge.megatron import named_parameters, place_of_this_rank  # noqa: E402
from configs.schema import LayoutConfig  # noqa: E402
from tests.bridge.family_models import CONFIGS  # noqa: E402

SIZES = (
    (2, 1, 1, 3, 1, None),
    (2, 2, 1, 2, 2, None),
    (4, 1, 1, 2, 2, 2),
    (2, 2, 1, 4, 4, 1),
    (1, 1, 1, 4, 2, 2),
    (2, 2, 3, 2, 2, 1),
)
"""Tensor, pipeline, context, data, expert and expert-tensor parallel sizes."""


def places(sizes: tuple[int | None, ...]) -> list[dict[str, Any]]:
    """For every rank, by parallel_state and on paper: its places, its part of the experts, and its stage."""
    names = ("tensor_model", "pipeline_model", "context", "data", "expert_model", "expert_tensor")
    options = {f"{name}_parallel_size": size for name, size in zip(names, sizes, strict=True)}
    shape, rows = LayoutConfig.model_validate(options), []
    per_stage = shape.world_size // shape.pipeline_model_parallel_size
    for rank in range(shape.world_size):
        with counting_group(shape, rank):
            real = (
                place_of_this_rank(),
                parallel_state.get_expert_model_parallel_rank(),
                parallel_state.get_pipeline_model_parallel_rank(),
                parallel_state.get_data_parallel_rank(),
            )
        place = place_of(shape, rank)
        paper = (place, expert_rank_of(shape, rank), rank // per_stage, shape.replica_of(rank))
        rows.append({"rank": rank, "megatron": str(real), "paper": str(paper)})
    return rows


def parameters(directory: Path) -> dict[str, dict[str, Any]]:
    """By family the names and shapes of the modules that Megatron builds, on one rank."""
    found: dict[str, dict[str, Any]] = {}
    for name, config in CONFIGS.items():
        config.save_pretrained(directory / name)
        _, spec = spec_of(directory / name)
        with counting_group(LayoutConfig(), 0), torch.device("meta"):
            shape = transformer_config(LayoutConfig(), torch.float32, spec, "cpu")
            chunks = build_chunks(shape, spec, mtp=True)
            found[name] = {key: list(value.shape) for key, value in named_parameters(chunks).items()}
    return found


def plan(directory: Path) -> dict[str, Any]:
    """Exit code and output of the command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        words = ["--model", str(directory), "--world", "4", "--tensor_model_parallel_size", "2"]
        code = main(["plan", *words])
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


if __name__ == "__main__":
    place = Path(sys.argv[1])
    answer = {
        "parameters": parameters(place),
        "plan": plan(place / "glm4_moe"),
        "places": [row for sizes in SIZES for row in places(sizes)],
    }
    (place / "answer.json").write_text(json.dumps(answer))

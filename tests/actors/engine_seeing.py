"""Engines of several models in one process, one after the other: vLLM is imported once. Not a test.

`python -m tests.actors.engine_seeing FOLDER` makes an engine for each model directory in FOLDER and writes
FOLDER/answers.pickle: by directory what was asked and what came; under "infer" what `bascule infer` says.
"""

import asyncio
import multiprocessing
import os
import pickle
import sys
from pathlib import Path
from typing import Any

from actors.engine_settings import engine_arguments, engine_environment
from algorithms.conversations import make_prompts
from algorithms.data import Prompt, SamplingSettings
from algorithms.datasets import read_rows
from configs.export import InferConfig
from configs.schema import RunConfig


def run_config(model: Path, dataset: Path) -> RunConfig:
    """A run of grpo with this model and data."""
    return RunConfig.model_validate(
        {
            "algorithm": "grpo",
            "max_steps": 1,
            "model": {"model": str(model), "torch_dtype": "float32", "device": "cpu"},
            "data": {"dataset": str(dataset)},
            "rewards": [{"function": "exact_match"}],
            "rollout": {"max_model_len": 64, "max_num_seqs": 16, "kv_cache_memory_bytes": 32 << 20},
        }
    )


def prompts_of(config: RunConfig) -> list[Prompt]:
    """The dataset's prompts as the model takes them."""
    from actors.model_source import load_tokenizer
    from actors.pictures import PictureReader
    from bridge.families import spec_of

    directory = Path(config.model.model or "")
    vision = spec_of(directory)[1].vision
    assert vision is not None
    eye = PictureReader(directory, vision, config.vision)
    return make_prompts(
        read_rows(config.data, "train", config.seed), load_tokenizer(directory), config.data, eye
    )


async def answers(config: RunConfig, prompts: list[Prompt]) -> dict[str, Any]:
    """What one engine makes of the prompts, and what it thinks of the first one with its completion."""
    from actors.engine import Engine

    path = str(config.model.model)
    engine = Engine("engine 0", config, engine_arguments(config, path, "cpu"), 120.0)
    await engine.start()
    sampling = SamplingSettings(n=2, max_tokens=6, temperature=1.0, seed=7)
    groups = await asyncio.gather(*(engine.generate(prompt, sampling) for prompt in prompts))
    whole = [*groups[0].prompt.tokens.tolist(), *groups[0].rollouts[0].tokens.tolist()]
    score = await engine.score(whole, groups[0].prompt.vision)
    blind = await engine.score(whole)
    # With pictures in the cache, and after it was emptied as a sync does.
    await engine.pause()
    await engine.resume()
    again = await engine.generate(prompts[0], sampling)
    await engine.stop()
    return {"groups": groups, "score": score, "blind": blind, "again": again}


def inferred(model: Path, picture: Path) -> str:
    """What `bascule infer --image` says."""
    from actors.infer import infer

    config = InferConfig(model=str(model), prompt="range", image=(str(picture),), max_new_tokens=6)
    return infer(config, lambda _: None)


def main(folder: Path) -> None:
    found: dict[str, Any] = {"infer": inferred(folder / "qwen3_vl", folder / "small.png")}
    for directory in sorted(path.parent for path in folder.glob("*/config.json")):
        config = run_config(directory, folder / "rows.jsonl")
        found[directory.name] = asyncio.run(answers(config, prompts_of(config)))
    (folder / "answers.pickle").write_bytes(pickle.dumps(found))


def fork_cores() -> None:
    """Let cores begin where this process is, so that vLLM is imported once: no thread has computed in it.

    vLLM has them start anew on CPU, for the sake of OpenMP's threads; here there is one.
    """
    from vllm.v1.engine import utils

    setattr(utils, "get_mp_context", lambda: multiprocessing.get_context("fork"))  # noqa: B010


if __name__ == "__main__":
    os.environ.update(engine_environment(sys.argv[1], "cpu", 1))
    fork_cores()
    main(Path(sys.argv[1]))
    # vLLM's threads of a stopped engine are not waited for.
    os._exit(0)

"""Memory, seconds and bytes of a trainer rank with LoRA against one that trains the whole model.

    python -m benchmarks.lora [--model models/smollm2-135m-instruct] [--rank 8] [--tokens 64] [--steps 2]

One process for each, one after the other, with the same batch in bfloat16. Memory is the peak of the resident
memory over that of the process with the weights loaded and no optimizer; seconds are the median of the steps after
the first; bytes are what a sync sends.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def measure(model: str, kind: str, rank: int, tokens: int, steps: int) -> dict[str, float]:
    """Train some steps in this process."""
    from actors.adapter_source import fill_adapter, find_adapter
    from actors.standalone import start_megatron
    from configs.data import DataConfig
    from configs.schema import ModelConfig, RunConfig, TrainerConfig
    from configs.tuner import TunerConfig

    lora = {"tuner_type": "lora", "lora_rank": rank, "lora_dropout": 0.0} if kind == "lora" else {}
    run = RunConfig(
        algorithm="sft",
        model=ModelConfig(model=model),
        trainer=TrainerConfig(lr=1e-5),
        tuner=TunerConfig.model_validate(lora),
        data=DataConfig(dataset=("none",)),
    )
    start_megatron(run.trainer, device="cpu")
    from actors.megatron_model import MegatronModel
    from algorithms.data import TrainSample, float_row, int_row
    from algorithms.losses import loss_of
    from algorithms.packing import pack
    from bridge.model_bridge import ModelBridge

    bridge = ModelBridge(model)
    adapter = find_adapter(run.tuner, bridge, run.vision)
    adapters = None if adapter is None else adapter.bridge(bridge)
    before = 0

    def adapt(chunks: list[Any]) -> None:
        nonlocal before
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if adapters is not None and adapter is not None:
            fill_adapter(adapters, adapter, 42, chunks)

    def load(chunks: list[Any]) -> None:
        bridge.load(chunks)

    trainer = MegatronModel(run, bridge.spec, device="cpu", load=load, adapt=adapt)
    row = int_row([7 + number % 1000 for number in range(tokens)])
    sample = TrainSample(
        tokens=row,
        loss_mask=int_row([1] * tokens),
        advantages=float_row([0.0] * tokens),
        logprobs=float_row([0.0] * tokens),
        version=0,
    )
    batch = pack([sample], TrainerConfig())
    seconds: list[float] = []
    for _ in range(steps):
        start = time.perf_counter()
        trainer.step(batch.ranks[0], batch.num_loss_tokens, loss_of(run), 1.0)
        seconds.append(time.perf_counter() - start)
    plan = bridge.plan(trainer.chunks, copies=False) if adapters is None else adapters.plan(trainer.chunks)
    trained = [p for chunk in trainer.chunks for p in chunk.parameters() if p.requires_grad]
    return {
        "trained parameters": float(sum(parameter.numel() for parameter in trained)),
        "memory, MB": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e6,
        "step, s": statistics.median(seconds[1:]),
        "bytes of a sync, MB": sum(info.nbytes for info in plan.tensors) / 1e6,
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--kind", choices=("full", "lora"), help="measure in this process and write --result")
    parser.add_argument("--result", type=Path)
    options = parser.parse_args()
    if options.kind is not None:
        found = measure(options.model, options.kind, options.rank, options.tokens, options.steps)
        options.result.write_text(json.dumps(found))
        return
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("full", "lora"):
            result = Path(folder) / kind
            words = [*sys.argv[1:], "--kind", kind, "--result", str(result)]
            subprocess.run([sys.executable, "-m", "benchmarks.lora", *words], cwd=ROOT, check=True)
            results[kind] = json.loads(result.read_text())
    print(f"{'':24}{'full':>14}{'lora':>14}{'ratio':>10}")  # noqa: T201
    for name, full in results["full"].items():
        lora = results["lora"][name]
        print(f"{name:24}{full:14.4g}{lora:14.4g}{lora / full:10.4f}")  # noqa: T201


if __name__ == "__main__":
    main()

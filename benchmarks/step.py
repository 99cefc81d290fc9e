"""Tokens per second of an optimizer step of one trainer rank against transformers with the same batch.

    python -m benchmarks.step [--model models/smollm2-135m-instruct] [--dtype float32] [--steps 3] [--threads 2]

Both train the same sequences in one process, a step of one after a step of the other; the median of the steps
after the first counts. transformers has the sequences in one batch, padded to the longest, with its own loss and
AdamW of torch. `equal`: all sequences are as long; `ragged`: most are short, one is long, and the trainer packs
them. The losses of the first step are printed: they have to agree.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from configs.data import DataConfig
from configs.schema import ModelConfig, RunConfig, TrainerConfig

LENGTHS = {"equal": (128,) * 8, "ragged": (256, 96, 64, 48, 48, 32, 32, 24)}


def sequences(lengths: Sequence[int]) -> list[list[int]]:
    """Token ids without meaning."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(100, 40000, (length,), generator=generator).tolist() for length in lengths]


def ours(run: RunConfig, tokens: Sequence[Sequence[int]]) -> Callable[[], float]:
    """One step of the trainer; returns the loss. The process must have been made a Megatron rank."""
    import numpy as np

    from actors.megatron_model import MegatronModel
    from algorithms.data import TrainSample, float_row, int_row
    from algorithms.losses import loss_of
    from algorithms.packing import pack
    from bridge.model_bridge import ModelBridge

    assert run.model.model is not None
    bridge = ModelBridge(run.model.model)

    def load(chunks: list[Any]) -> None:
        bridge.load(chunks)

    model = MegatronModel(run, bridge.spec, device="cpu", load=load)
    samples = [
        TrainSample(
            tokens=int_row(row),
            loss_mask=int_row(np.ones(len(row))),
            advantages=float_row(np.zeros(len(row))),
            logprobs=float_row(np.zeros(len(row))),
            version=0,
        )
        for row in tokens
    ]

    def step() -> float:
        batch = pack(samples, run.trainer)
        found = model.step(batch.ranks[0], batch.num_loss_tokens, loss_of(run), 1.0, batch.denominator)
        return found.loss

    return step


def theirs(run: RunConfig, tokens: Sequence[Sequence[int]]) -> Callable[[], float]:
    """One step of transformers' model under torch's AdamW; returns the loss."""
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if run.model.torch_dtype == "float32" else torch.bfloat16
    model: Any = AutoModelForCausalLM.from_pretrained(run.model.model, dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.trainer.lr, betas=(0.9, 0.95), weight_decay=0.0)
    longest = max(map(len, tokens))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in tokens])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in tokens])
    labels = ids.masked_fill(mask == 0, -100)

    def step() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss)

    return step


def main() -> None:
    """Print a line for each kind of batch."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    run = RunConfig(
        algorithm="sft",
        model=ModelConfig(model=options.model, torch_dtype=options.dtype),
        trainer=TrainerConfig(lr=1e-6, micro_batch_size=8),
        data=DataConfig(dataset="none"),
    )
    from actors.standalone import start_megatron

    start_megatron(run.trainer, device="cpu")
    torch.set_num_threads(options.threads)
    print(f"{'batch':8}{'tokens':>8}{'trainer':>12}{'transformers':>14}{'ratio':>8}   losses")  # noqa: T201
    for kind, lengths in LENGTHS.items():
        tokens = sequences(lengths)
        steps = {"ours": ours(run, tokens), "theirs": theirs(run, tokens)}
        losses: dict[str, list[float]] = {name: [] for name in steps}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(options.steps + 1):
            for name, step in steps.items():
                start = time.perf_counter()
                losses[name].append(step())
                seconds[name].append(time.perf_counter() - start)
        rates = {name: sum(lengths) / statistics.median(row[1:]) for name, row in seconds.items()}
        print(  # noqa: T201
            f"{kind:8}{sum(lengths):8}{rates['ours']:10.1f}/s{rates['theirs']:12.1f}/s"
            f"{rates['ours'] / rates['theirs']:8.2f}   {losses['ours'][0]:.5f} {losses['theirs'][0]:.5f}"
        )


if __name__ == "__main__":
    main()

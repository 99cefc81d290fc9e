"""Samples per second of GRPO on a real model, against TRL's GRPOTrainer on the same machine.

    python -m benchmarks.grpo [--model models/smollm2-135m-instruct] [--steps 3] [--rounds 2] [--prompts 4]

Both take the prompts of configs/grpo-smollm2.yaml in float32 and make one optimizer step of dapo from as many
completions each, of at most as many tokens, at temperature 1, without a reference and without leaving any out.
Runs of `bascule grpo` (two trainer ranks, two engines) and of TRL (one process with two threads, whose
completions come from transformers; no recomputation) alternate, each in processes of its own. A step is
everything from its prompts to its updated weights, in the engines too; the first of each run does not count.
"""

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from configs.load import load_config
from configs.schema import RunConfig

CONFIG = Path("configs/grpo-smollm2.yaml")
_LENGTH = "completions/mean_length"


def words(options: argparse.Namespace, directory: str) -> list[str]:
    """What is set besides the file."""
    return [
        *("--model", options.model, "--torch_dtype", "float32", "--output_dir", f"{directory}/grpo"),
        *("--max_steps", str(options.steps + 1), "--lr_warmup_iters", "0"),
        # Few enough questions that some are left to evaluate on.
        *("--dataset_size", "60", "--eval_size", "4"),
        *("--prompts_per_step", str(options.prompts), "--num_generations", "4"),
        *("--filter_zero_variance", "false", "--num_cpus", "4", "--exist_ok", "true", "--resume_steps", "0"),
    ]


def ours(options: argparse.Namespace, directory: str) -> list[dict[str, float]]:
    """Seconds and mean length of completions of each step but the first."""
    command = [
        sys.executable,
        "-m",
        "actors.cli",
        "grpo",
        "--config",
        str(CONFIG),
        *words(options, directory),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = map(json.loads, (Path(directory) / "grpo" / "metrics.jsonl").read_text().splitlines())
    return [
        {"seconds": row["time/step"], "length": row[_LENGTH]}
        for row in rows
        if "time/step" in row and row["step"] > 1
    ]


def theirs(options: argparse.Namespace, directory: str) -> list[dict[str, float]]:
    """The same of TRL, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.grpo", "--trl", directory]
    for name in ("model", "steps", "prompts"):
        command += [f"--{name}", str(getattr(options, name))]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((Path(directory) / "trl.json").read_text())


def run_trl(config: RunConfig, directory: str, threads: int) -> None:
    """Train, and write what `theirs` reads."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    from algorithms.datasets import read_rows

    # Its types are made up as it is imported.
    trl: Any = importlib.import_module("trl")
    torch.set_num_threads(threads)
    grpo, name = config.grpo, config.model.model
    assert name is not None
    began: list[float] = []
    steps: list[dict[str, float]] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            began.append(time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            steps.append({"seconds": time.perf_counter() - began[-1]})

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if _LENGTH in logs:
                steps[-1]["length"] = logs[_LENGTH]

    def reward(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
        texts = [each[0]["content"].split() for each in completions]
        return [
            float(bool(words) and words[-1].strip(".") == right)
            for words, right in zip(texts, answer, strict=True)
        ]

    rows = [
        {"prompt": [{"role": "user", "content": row.columns["prompt"]}], "answer": str(row.columns["answer"])}
        for row in read_rows(config.data, "train", config.seed)
    ]
    arguments = trl.GRPOConfig(
        output_dir=f"{directory}/trl",
        max_steps=config.max_steps,
        per_device_train_batch_size=grpo.prompts_per_step * grpo.num_generations,
        num_generations=grpo.num_generations,
        max_completion_length=grpo.max_completion_length,
        temperature=grpo.temperature,
        learning_rate=config.trainer.lr,
        loss_type="dapo",
        beta=0.0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=config.seed,
    )
    trl.GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(name),
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        callbacks=[Clock()],
    ).train()
    (Path(directory) / "trl.json").write_text(json.dumps(steps[1:]))


def main() -> None:
    """Print a line for each run, and the ratio of the medians over all steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trl", metavar="DIR", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trl:
        run_trl(load_config(CONFIG, words(options, options.trl), "grpo"), options.trl, options.threads)
        return
    count = 4 * options.prompts
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(options.rounds):
            for name, run in (("bascule", ours), ("TRL", theirs)):
                steps = run(options, directory)
                rates.setdefault(name, []).extend(count / step["seconds"] for step in steps)
                seconds = ", ".join(f"{step['seconds']:.1f}" for step in steps)
                length = statistics.mean(step["length"] for step in steps)
                print(f"{name:8} steps of {seconds} s, completions of {length:.1f} tokens", flush=True)  # noqa: T201
    both = {name: statistics.median(each) for name, each in rates.items()}
    print(  # noqa: T201
        f"samples/s: {both['bascule']:.2f} against {both['TRL']:.2f}, ratio {both['bascule'] / both['TRL']:.2f}"
    )


if __name__ == "__main__":
    main()

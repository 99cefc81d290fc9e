"""The command line: `bascule grpo|gkd|sft|view|status|reward|plan|export|...`. The only module that prints."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from tqdm import tqdm

from actors.heavy_imports import uncollected
from actors.reward_options import add_commands
from actors.submit_options import add_command as add_submit
from configs.errors import BasculeError, ConfigError, WriteError
from configs.export import ExportConfig, InferConfig
from configs.load import dump_config, load_config, load_settings
from configs.manifest import ManifestConfig
from configs.options import describe_options
from configs.plan import PlanConfig
from configs.schema import RunConfig

_RUNS = {
    "grpo": "train with group-relative policy optimization: Megatron trainers, vLLM engines, weight bridge",
    "gkd": "knowledge distillation: learn a teacher's distribution on completions of one's own and of a dataset",
    "sft": "supervised fine-tuning with the same trainer, without engines",
}
# Completions in a file that `bascule view --html` writes.
_MAX_ROLLOUTS = 2000
_EPILOG = (
    "Options are set in the YAML file or here; here they win. Names that are unique work without section."
)


class Terminal:
    """Lines, and a progress bar when the output is a terminal."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None

    def line(self, text: str) -> None:
        """Print a line, above the bar when there is one."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def progress(self, done: int, total: int) -> None:
        """Move the bar."""
        if self._bar is None:
            # disable=None: no bar unless stderr is a terminal.
            self._bar = tqdm(total=total, unit="step", disable=None, leave=False)
        self._bar.update(done - self._bar.n)
        if done == total:
            self._bar.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 well, 1 a run failed, 2 wrong input, 130 interrupted.

    A run that is told to end: 0 before its time_limit, 143 by SIGTERM, 75 when a node drains; see
    docs/reliability.md.
    """
    options, rest = _parse(sys.argv[1:] if arguments is None else arguments)
    try:
        return options.command_function(options, rest)
    except BasculeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="bascule",
        description="RL training for language models: Ray, Megatron-core, vLLM.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, text in _RUNS.items():
        command = _add_command(commands, name, text, RunConfig, "--config FILE")
        command.set_defaults(command_function=_run, algorithm=name)
    text = (
        "check a run (--config FILE) and print what it would start, or, for a model alone (--model DIR "
        "--world N), what each of N ranks would read, write and send; starts nothing"
    )
    plan = _add_command(commands, "plan", text, PlanConfig, "(--config FILE | --model DIR --world N)")
    plan.set_defaults(command_function=_plan)
    text = "convert a model between Hugging Face safetensors and Megatron torch_dist, and test the result"
    needed = "(--model DIR --to_mcore true | --mcore_model DIR --to_hf true) --output_dir DIR"
    export = _add_command(commands, "export", text, ExportConfig, needed)
    export.set_defaults(command_function=_export)
    text = "answer one prompt with vLLM or transformers, to look at a model"
    infer = _add_command(commands, "infer", text, InferConfig, "--model DIR --prompt TEXT")
    infer.set_defaults(command_function=_infer)
    text = "print a run as a job of Kubernetes (KubeRay), with pods that have what its actors ask for"
    needed = "--config FILE --image IMAGE --claim PVC"
    kubernetes = _add_command(commands, "manifest", text, ManifestConfig, needed)
    kubernetes.set_defaults(command_function=_manifest)
    _add_view(commands)
    _add_status(commands)
    make = commands.add_parser(
        "make-model", help="make a small model directory without a hub", allow_abbrev=False
    )
    kinds = "tiny: random qwen3; tiny-vl: random qwen3_vl; smollm2: SmolLM2-135M-Instruct"
    make.add_argument("kind", choices=["tiny", "tiny-vl", "smollm2"], help=kinds)
    make.add_argument("--output_dir", type=Path, required=True, help="where to write it")
    make.add_argument("--seed", type=int, default=42, help="seed of the random weights and of the data")
    make.set_defaults(command_function=_make_model)
    add_commands(commands, Terminal)
    add_submit(commands)
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command_function in (_make_model, _view, _status):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    return options, rest


def _add_view(commands: Any) -> None:
    text = "look at a run in a browser, while it goes or after it: curves, completions, tokens, events"
    view = commands.add_parser("view", help=text, description=text, allow_abbrev=False)
    view.add_argument("run", type=Path, metavar="RUN", help="the output_dir of a run")
    view.add_argument("--port", type=_port, help="port on 127.0.0.1; any free one by default, or for 0")
    view.add_argument("--html", type=Path, metavar="FILE", help="write one file that needs no server instead")
    view.add_argument(
        "--max_rollouts",
        type=_positive,
        help=f"completions in that file, the latest; {_MAX_ROLLOUTS} by default",
    )
    view.set_defaults(command_function=_view)


def _add_status(commands: Any) -> None:
    text = "how a run is: step, what it waits for, restarts, states, and what its processes do"
    status = commands.add_parser("status", help=text, description=text, allow_abbrev=False)
    status.add_argument("run", type=Path, metavar="RUN", help="the output_dir of a run")
    status.add_argument("--files", action="store_true", help="read its files alone, and ask no Ray")
    status.add_argument("--stacks", action="store_true", help="with the stack of every process")
    status.set_defaults(command_function=_status)


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError("a port is a number from 0 to 65535")
    return port


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def _add_command(
    commands: Any, name: str, text: str, schema: type[BaseModel], needed: str
) -> argparse.ArgumentParser:
    """A command whose options are those of `schema`; `needed` is the part of its usage that has no default."""
    command = commands.add_parser(
        name,
        help=text,
        description=f"{text}\n\n{_EPILOG}\n\n{describe_options(schema)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=f"bascule {name} {needed} [--section.key value ...]",
        allow_abbrev=False,
    )
    command.add_argument("--config", type=Path, metavar="FILE", help="a YAML file; see configs/")
    return command


def _run(options: argparse.Namespace, rest: list[str]) -> int:
    config = load_config(options.config, rest, options.algorithm)
    with uncollected():
        from actors.ending import EndedEarlyError
        from actors.run import run

    try:
        result = run(config, Terminal()) | _install_seconds()
    except EndedEarlyError as error:
        print(error, file=sys.stderr if error.exit_code else sys.stdout)
        return error.exit_code
    for name in ("accuracy", "divergence"):
        if f"{name}_before" in result:
            print(f"held-out {name}: {result[f'{name}_before']:.3f} -> {result[f'{name}_after']:.3f}")
    print(f"checkpoint: {result['checkpoint']}")
    print(f"curve: {result['curve']}")
    print(f"result: {json.dumps(result)}")
    return 0


def _install_seconds() -> dict[str, float]:
    """How long `make setup` took, when that is how this environment came to be."""
    stamp = Path(sys.prefix) / "setup-seconds"
    return {"seconds_install": float(stamp.read_text())} if stamp.is_file() else {}


def _plan(options: argparse.Namespace, rest: list[str]) -> int:
    if options.config is None:
        return _plan_model(rest)
    config = load_settings(RunConfig, options.config, rest)
    from actors.description import describe
    from actors.run import prepare

    prepared = prepare(config)
    print(dump_config(prepared.config))
    for line in describe(prepared):
        print(line)
    return 0


def _plan_model(rest: list[str]) -> int:
    config = load_settings(PlanConfig, None, rest)
    from actors.megatron_cpu import install

    install()
    from actors.megatron_paper import plan_on_paper
    from bridge.checkpoint import resolve_model
    from bridge.estimate import Links, estimate_sync
    from bridge.plan import TORCH_DTYPES
    from bridge.report import report_plan
    from bridge.sync_plan import cut_plan

    dtype = None if config.torch_dtype is None else TORCH_DTYPES[config.torch_dtype]
    paper = plan_on_paper(resolve_model(config.model, "model"), config.layout, dtype)
    bucket_bytes = int(config.bucket_size_mb * (1 << 20))
    sync_plan = cut_plan(paper.plan, bucket_bytes)
    links = Links(
        into_bridge=config.link_gb_s * 1e9, out_of_bridge=config.link_gb_s * 1e9, load=config.load_gb_s * 1e9
    )
    estimate = estimate_sync(sync_plan, links, 1 / config.engine_tensor_parallel_size)
    for line in [*report_plan(paper.plan, paper.claims, sync_plan).lines(), *estimate.lines()]:
        print(line)
    return 0


def _export(options: argparse.Namespace, rest: list[str]) -> int:
    config = load_settings(ExportConfig, options.config, rest)
    from actors.export import export

    result = export(config, Terminal())
    print(f"result: {json.dumps(result)}")
    return 0 if result["passed"] else 1


def _infer(options: argparse.Namespace, rest: list[str]) -> int:
    config = load_settings(InferConfig, options.config, rest)
    from actors.infer import infer

    def show(piece: str) -> None:
        if config.stream:
            print(piece, end="", flush=True)

    answer = infer(config, show)
    print("" if config.stream else answer)
    return 0


def _manifest(options: argparse.Namespace, rest: list[str]) -> int:
    config = load_settings(ManifestConfig, options.config, rest)
    from actors.manifest import manifest

    print(manifest(config), end="")
    return 0


def _view(options: argparse.Namespace, rest: list[str]) -> int:
    from actors.view import serve, write

    if options.html is None:
        if options.max_rollouts is not None:
            raise ConfigError("--max_rollouts: is for --html FILE; without it all completions are there")
        serve(options.run, options.port or 0, Terminal().line)
    elif options.port is not None:
        raise ConfigError("--port: a file is not served; give --port or --html")
    else:
        write(options.run, options.html, options.max_rollouts or _MAX_ROLLOUTS, Terminal().line)
    return 0


def _status(options: argparse.Namespace, rest: list[str]) -> int:
    from actors.status import describe_run

    for line in describe_run(options.run, live=not options.files, stacks=options.stacks):
        print(line, flush=True)
    return 0


def _make_model(options: argparse.Namespace, rest: list[str]) -> int:
    if options.kind == "smollm2":
        from actors.smollm2 import convert_smollm2

        print(f"model: {convert_smollm2(options.output_dir)}")
        return 0
    if options.kind == "tiny-vl":
        from actors.tiny_vision import build_tiny_vision_model as build
        from actors.tiny_vision import write_numbers as write
    else:
        from actors.tiny_model import build_tiny_model as build
        from actors.tiny_model import write_arithmetic as write

    if options.output_dir.exists() and not options.output_dir.is_dir():
        raise ConfigError(f"--output_dir: {options.output_dir} is not a directory")
    try:
        build(options.output_dir / "base", seed=options.seed)
        write(options.output_dir / "data", seed=options.seed)
    except OSError as error:
        raise WriteError(f"--output_dir: {options.output_dir} cannot be written: {error}") from error
    print(f"model: {options.output_dir / 'base'}\ndata: {options.output_dir / 'data'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

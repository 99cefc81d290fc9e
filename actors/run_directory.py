"""The directory of a run: what may be in it already, and what is replaced."""

import json
from pathlib import Path

from actors.resume_state import has_finished
from actors.trainer_rank import MERGED, Sources
from bridge.partial_directory import check_replaceable
from configs.errors import ConfigError
from configs.load import dump_config
from configs.schema import RunConfig


def _is_own_checkpoint(directory: Path, path: Path) -> bool:
    """Whether `path` is, or is in, a place where a run in `directory` saves."""
    if directory not in path.parents:
        return False
    return path.relative_to(directory).parts[0].startswith("checkpoint")


def _holds_a_run(directory: Path) -> bool:
    """Whether a run has finished a step there. What is left of one that has not is in nobody's way."""
    if any(directory.glob("checkpoint*")):
        return True
    metrics = directory / "metrics.jsonl"
    return metrics.is_file() and any(map(_is_after_a_step, metrics.read_text().splitlines()))


def _is_after_a_step(line: str) -> bool:
    """Whether a line of metrics.jsonl is not just the evaluation before the first step."""
    try:
        row = json.loads(line)
    except ValueError:
        return True
    return not (isinstance(row, dict) and row.get("step") == 0)


def _why_not_resumed(config: RunConfig, directory: Path) -> str:
    if config.checkpoint.resume == "never":
        return ""
    if has_finished(directory):
        return ", which has finished"
    return ", and no complete state to go on from (see checkpoint.resume_steps)"


def make_directory(config: RunConfig, sources: Sources, *, resumes: bool) -> Path:
    """The run directory, with the resolved config in it.

    Raises ConfigError when it holds a run already, unless this one `resumes` it, and when it cannot be written.
    """
    directory = config.output_dir.resolve()
    found = (
        *(sources.model, sources.reference, sources.teacher),
        *(sources.adapter, sources.reference_adapter),
    )
    read = [path for each in found if each is not None for path in (each.directory, each.mcore) if path]
    if any(_is_own_checkpoint(directory, path) for path in read):
        raise ConfigError(
            f"output_dir: {directory} would replace the checkpoint that the run starts from; choose another"
        )
    if not resumes and _holds_a_run(directory) and not config.exist_ok:
        raise ConfigError(
            f"output_dir: {directory} holds a run already{_why_not_resumed(config, directory)}; "
            "choose another, or set exist_ok to replace it"
        )
    steps = [step for step in range(1, config.max_steps + 1) if config.saves_at(step)]
    names = ["checkpoint", *(f"checkpoint-{step}" for step in steps)]
    merged = [f"{name}{MERGED}" for name in names] if config.tuner.merge_lora else []
    for name in [*names, *merged]:
        check_replaceable(directory / name)
        # A torch_dist checkpoint adds an iteration, and who gives the directory as a model would read these.
        if (
            name in names
            and not config.checkpoint.save_safetensors
            and any((directory / name).glob("*.safetensors"))
        ):
            raise ConfigError(
                f"output_dir: {directory / name} holds safetensors of an earlier run, which this run, saving "
                "torch_dist, would leave there; remove it, or choose another output_dir"
            )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.yaml").write_text(dump_config(config))
    except OSError as error:
        raise ConfigError(f"output_dir: {directory} cannot be written: {error}") from error
    return directory

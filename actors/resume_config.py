"""What it means for a run that goes on when its config is another one than when it was cut off."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

from configs.errors import ConfigError

_NO_MATTER = "changes no result"
_ROUNDING = "results may differ in rounding from here on"
_LAYOUT = (
    "another layout: results may differ in rounding from here on, and random numbers of dropout begin anew"
)
_SCHEDULE = "the learning-rate schedule goes on as if the run had had this length from its start"
_REFUSED: tuple[tuple[str, str], ...] = (
    ("algorithm", "a state is of one algorithm"),
    ("seed", "order of the data and sampling hang on it"),
    ("model", "the state's weights and optimizer are of that model"),
    ("tuner", "the state's weights and optimizer are of these parameters"),
    ("data", "the position in the data is of that data"),
    ("sft", "the position in the data is of these samples"),
    *(
        (f"trainer.{name}", "it is in the state of the optimizer or its schedule")
        for name in (
            "lr",
            "min_lr",
            "lr_decay_style",
            "lr_warmup_iters",
            "lr_warmup_fraction",
            "weight_decay",
        )
    ),
    *(
        (f"trainer.{name}", "it is in the state of the optimizer")
        for name in ("adam_beta1", "adam_beta2", "adam_eps", "use_distributed_optimizer", "freeze")
    ),
    *(
        (f"vision.{name}", "it is in the state of the optimizer")
        for name in ("freeze_llm", "freeze_vit", "freeze_aligner", "vit_lr", "aligner_lr")
    ),
    *(
        (f"vision.{name}", "the position in the data is of samples with pictures of that size")
        for name in (
            "image_max_token_num",
            "image_min_token_num",
            "max_pixels",
            "min_pixels",
            "fps",
            "fps_min_frames",
            "fps_max_frames",
            "video_max_token_num",
            "video_min_token_num",
        )
    ),
    ("grpo.num_iterations", "the learning-rate schedule counts its steps"),
    ("grpo.steps_per_generation", "the learning-rate schedule counts its steps"),
    ("grpo.max_lag", "a state does not hold what is being sampled ahead"),
    ("grpo.sync_ref_model", "the state holds a reference only where it moves"),
)
_ALLOWED: tuple[tuple[str, str], ...] = (
    ("max_steps", _SCHEDULE),
    ("eval_steps", "evaluations come at other steps"),
    *((name, _NO_MATTER) for name in ("output_dir", "exist_ok", "checkpoint", "record", "cluster")),
    ("trainer.micro_batch_size", _ROUNDING),
    ("trainer.micro_batch_tokens", _ROUNDING),
    ("trainer.packing", _ROUNDING),
    ("trainer.recompute_granularity", _NO_MATTER),
    ("trainer.recompute_num_layers", _NO_MATTER),
    *(
        (f"trainer.{name}", "used from here on")
        for name in ("clip_grad", "moe_aux_loss_coeff", "moe_z_loss_coeff")
    ),
    ("trainer.deterministic_mode", _ROUNDING),
    ("trainer", _LAYOUT),
    ("rollout", "completions may differ in rounding from here on"),
    ("bridge", "weights travel another way"),
    ("rewards", "rewards are others from here on"),
)
# A run that is started again under these is the same run.
_UNSAID = ("exist_ok", "checkpoint.resume")


def changes(saved: Mapping[str, Any], now: Mapping[str, Any], step: int) -> list[str]:
    """A line for each option that changed, with what it means for a run that goes on after `step`.

    Both are configs as JSON has them. Raises ConfigError naming every change that a state does not survive.
    """
    lines: list[str] = []
    refused: list[str] = []
    for name, old, new in _differences(saved, now, ""):
        if name in _UNSAID:
            continue
        text = f"{name}: {old} -> {new}"
        reason = _meaning(name, _REFUSED)
        if name == "max_steps" and cast(int, new) <= step:
            reason = f"step {step} is done already"
        if reason is not None:
            refused.append(f"{text}: {reason}")
        else:
            lines.append(f"{text}: {_meaning(name, _ALLOWED) or 'used from here on'}")
    if refused:
        raise ConfigError(
            "\n".join(refused)
            + f"\nThe run cannot go on after step {step} like that; set what it was before, or "
            "begin anew with --resume never --exist_ok"
        )
    return lines


def is_same_layout(saved: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether ranks have the places that they had."""
    pairs = list(_differences(saved["trainer"], now["trainer"], "trainer."))
    return not any(_meaning(name, _ALLOWED) == _LAYOUT for name, _, _ in pairs)


def _differences(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, object, object]]:
    # An option that one of the two does not know is of another version of this program.
    for key in {**old, **new}:
        name, before, after = f"{prefix}{key}", old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(cast(dict[str, Any], before), cast(dict[str, Any], after), f"{name}.")
        elif before != after:
            yield name, before, after


def _meaning(name: str, table: tuple[tuple[str, str], ...]) -> str | None:
    exact = dict(table)
    parts = name.split(".")
    places = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next((exact[place] for place in places if place in exact), None)

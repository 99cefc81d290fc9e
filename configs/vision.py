"""Options of models that see."""

from pathlib import Path

from pydantic import Field

from configs.section import Section


class VisionConfig(Section):
    """Of a model that sees: which parts are trained, how large its pictures are. No use for others."""

    freeze_llm: bool = False
    """Do not train the language model."""
    freeze_vit: bool = True
    """Do not train the vision tower."""
    freeze_aligner: bool = True
    """Do not train what translates the tower's features for the language model."""
    vit_lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of the vision tower, in place of trainer.lr."""
    aligner_lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of the aligner, in place of trainer.lr."""
    image_max_token_num: int | None = Field(default=None, ge=1)
    """Tokens of an image at most: a larger one is made smaller. By default as its preprocessor has it."""
    image_min_token_num: int | None = Field(default=None, ge=1)
    """Tokens of an image at least: a smaller one is made larger."""
    max_pixels: int | None = Field(default=None, ge=1)
    """The same as image_max_token_num, in pixels."""
    min_pixels: int | None = Field(default=None, ge=1)
    """The same as image_min_token_num, in pixels."""
    root_image_dir: Path | None = None
    """Where relative paths of images begin; by default the current directory."""


def check_vision(vision: VisionConfig, *, lora: bool) -> None:
    """Raises ValueError naming the option that contradicts another."""
    for pixels, tokens in (("max_pixels", "image_max_token_num"), ("min_pixels", "image_min_token_num")):
        if getattr(vision, pixels) is not None and getattr(vision, tokens) is not None:
            raise ValueError(f"vision.{pixels}: give it or vision.{tokens}, not both")
    for part in ("vit", "aligner"):
        frozen = f"freeze_{part}"
        if not getattr(vision, frozen) and lora:
            raise ValueError(
                f"vision.{frozen}: tuner.tuner_type lora trains adapters of the language model alone"
            )
        if getattr(vision, f"{part}_lr") is not None and getattr(vision, frozen):
            raise ValueError(f"vision.{part}_lr: is not used while vision.{frozen} is true")
    if vision.freeze_llm and vision.freeze_vit and vision.freeze_aligner:
        raise ValueError(
            "vision.freeze_llm: with vision.freeze_vit and vision.freeze_aligner nothing is trained"
        )

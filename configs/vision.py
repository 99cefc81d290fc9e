"""Options of models that see."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from configs.section import Section


class VisionConfig(Section):
    """Of a model that sees: which parts are trained, how large its pictures are. No use for others."""

    freeze_llm: bool = False
    """Do not train the language model. With LoRA here and below: no adapters on it."""
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
    fps: float = Field(default=2.0, gt=0)
    """Frames that are seen of a second of a video file. Frames in a list are as many, where a row does not say."""
    fps_min_frames: int = Field(default=4, ge=1)
    """Frames of a video file at least, if it has as many."""
    fps_max_frames: int = Field(default=768, ge=1)
    """Frames of a video at most."""
    video_max_token_num: int | None = Field(default=None, ge=1)
    """Tokens of a step of a video, which is two frames, at most. By default as its preprocessor has it."""
    video_min_token_num: int | None = Field(default=None, ge=1)
    """Tokens of a step of a video at least."""
    root_image_dir: Path | None = None
    """Where relative paths of images and videos begin; by default the current directory."""

    @property
    def frozen_parts(self) -> tuple[Literal["llm", "vit", "aligner"], ...]:
        """Those that are not trained."""
        frozen = {"llm": self.freeze_llm, "vit": self.freeze_vit, "aligner": self.freeze_aligner}
        return tuple(part for part in ("llm", "vit", "aligner") if frozen[part])


def check_vision(vision: VisionConfig) -> None:
    """Raises ValueError naming the option that contradicts another."""
    for pixels, tokens in (("max_pixels", "image_max_token_num"), ("min_pixels", "image_min_token_num")):
        if getattr(vision, pixels) is not None and getattr(vision, tokens) is not None:
            raise ValueError(f"vision.{pixels}: give it or vision.{tokens}, not both")
    for what, least, most in (
        ("fps_{}_frames", vision.fps_min_frames, vision.fps_max_frames),
        ("video_{}_token_num", vision.video_min_token_num, vision.video_max_token_num),
    ):
        if least is not None and most is not None and least > most:
            raise ValueError(
                f"vision.{what.format('min')}: {least} is above vision.{what.format('max')}, {most}"
            )
    for part in ("vit", "aligner"):
        frozen = f"freeze_{part}"
        if getattr(vision, f"{part}_lr") is not None and getattr(vision, frozen):
            raise ValueError(f"vision.{part}_lr: is not used while vision.{frozen} is true")
    if vision.freeze_llm and vision.freeze_vit and vision.freeze_aligner:
        raise ValueError(
            "vision.freeze_llm: with vision.freeze_vit and vision.freeze_aligner nothing is trained"
        )

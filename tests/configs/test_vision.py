"""Options of models that see, against each other."""

from typing import Any

import pytest
from pydantic import ValidationError

from configs.schema import RunConfig


def config(tuner: str = "full", **vision: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "algorithm": "sft",
            "model": {"model": "m"},
            "data": {"dataset": ["x"]},
            "tuner": {"tuner_type": tuner},
            "vision": vision,
        }
    )


@pytest.mark.parametrize(
    ("vision", "words"),
    [
        (
            {"max_pixels": 5, "image_max_token_num": 5},
            "vision.max_pixels: give it or vision.image_max_token_num",
        ),
        ({"vit_lr": 1.0}, "vision.vit_lr: is not used while vision.freeze_vit is true"),
        ({"freeze_llm": True}, "vision.freeze_llm: .* nothing is trained"),
        (
            {"fps_min_frames": 9, "fps_max_frames": 8},
            "vision.fps_min_frames: 9 is above vision.fps_max_frames, 8",
        ),
    ],
)
def test_what_contradicts_is_named(vision: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        config(**vision)
    assert config().vision.freeze_vit

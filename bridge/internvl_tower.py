"""InternVL's vision tower and projector as one module, which transformers has only with the language model."""

from typing import Any

import torch
from transformers import AutoModel, InternVLConfig, InternVLModel
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector


class InternVLTower(InternVLModel):
    """transformers' InternVLModel without its language model; names are the same."""

    config_class = InternVLConfig

    def __init__(self, config: InternVLConfig) -> None:
        # Past InternVLModel's own, which would make the language model.
        super(InternVLModel, self).__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = InternVLMultiModalProjector(config)
        self.post_init()

    # Called as the towers of Qwen's models are.
    def forward(self, tiles_NC: torch.Tensor, grid_thw: torch.Tensor | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`pooler_output` are the features [V, H] of the tiles, each a row of `tiles_NC`."""
        vision: Any = self.config.vision_config
        look: Any = self.get_image_features
        found = look(
            tiles_NC.view(-1, vision.num_channels, *vision.image_size),
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
        )
        found.pooler_output = found.pooler_output.flatten(0, 1)
        return found

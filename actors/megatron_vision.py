"""A model that sees: Megatron's language model, and transformers' vision tower on the first pipeline stage.

Every tensor- and context-parallel rank of the stage has the whole tower and runs it on all images of a row. The
features take the places of the row's visual tokens among the embeddings; those that Qwen3-VL adds after the first
layers (deepstack) are kept for these layers, which therefore have to be on the first stage.

On a machine without CUDA, actors.megatron_cpu.install() must have run before this module is imported.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig

from actors.megatron_context import ContextShare
from algorithms.data import FloatRow, Picture
from bridge.rules import VisionSpec
from bridge.vision import build_tower
from configs.errors import BasculeError

Look = Callable[[Sequence[Picture]], FloatRow]
"""Pictures -> their patches [P, C], one picture after the other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What the first stage gets of a row's pictures.

    `patches_PC`, or tiles, of all pictures, `grids_N3` of each; `slots_L` has for each of this rank's tokens the
    number of its feature, counted from 1, or 0.
    """

    patches_PC: torch.Tensor
    grids_N3: torch.Tensor
    slots_L: torch.Tensor


class MultimodalRotary(torch.nn.Module):
    """Angles of a rotary embedding with three positions (time, height, width) for each token.

    Each of a head's frequencies takes one of the positions: in three blocks of the sizes `mrope_section`, or
    interleaved, where every third of the first 3 x height and 3 x width frequencies takes those.
    """

    def __init__(self, vision: VisionSpec, head_dim: int, base: float) -> None:
        super().__init__()
        self._frequencies = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        self._position = torch.tensor(_position_of_frequency(vision))

    def forward(
        self, positions_3L: torch.Tensor, mrope_section: Any = None, cp_group: Any = None
    ) -> torch.Tensor:
        """Angles [L, 1, 1, head size] for positions [3, 1, L] of the whole row, whatever this rank has of it."""
        device = positions_3L.device
        taken = positions_3L[self._position.to(device), 0].float()
        angles = taken.T * self._frequencies.to(device)
        return torch.cat([angles, angles], dim=-1)[:, None, None]


def _position_of_frequency(vision: VisionSpec) -> list[int]:
    section = vision.mrope_section
    assert section is not None, "its tokens have three positions"
    if not vision.mrope_interleaved:
        return [position for position, size in enumerate(section) for _ in range(size)]
    found = [0] * sum(section)
    for position in (1, 2):
        for place in range(position, 3 * section[position], 3):
            found[place] = position
    return found


class VisionLanguageModel(GPTModel):
    """GPTModel with a tower, `visual`, where its embedding is."""

    def __init__(
        self, config: TransformerConfig, *args: Any, vision: VisionSpec, rotary_base: float, **options: Any
    ) -> None:
        # Embeddings are scattered once features are among them; Megatron's rotary embedding is not interleaved.
        options |= {"scatter_embedding_sequence_parallel": False, "rotary_base": rotary_base}
        if vision.mrope_section is not None:
            options["position_embedding_type"] = "none"
        super().__init__(config, *args, **options)
        if vision.mrope_section is not None:
            self.position_embedding_type = "mrope"
            self.mrope_section = vision.mrope_section
            assert config.kv_channels is not None, "set for every family"
            self.rotary_pos_emb = MultimodalRotary(vision, config.kv_channels, rotary_base)
        self._added: list[torch.Tensor] = []
        if self.pre_process:
            self.visual = build_tower(vision).to(config.params_dtype)
            self._deepstack = vision.deepstack
            for number, layer in enumerate(self.decoder.layers[: vision.deepstack]):
                layer.register_forward_hook(self._adding(number))

    # Megatron's schedule passes on what _forward of megatron_schedule gives, and no more.
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        seen: Seen | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        padding_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As GPTModel's, of tokens [1, L]. Where each has three positions: [3, 1, L'], of the whole row."""
        embedded = None
        if self.pre_process:
            embedded = self._embed(input_ids, position_ids, seen)
            if padding_mask is not None and self.config.sequence_parallel:
                padding_mask = scatter_to_sequence_parallel_region(padding_mask.T.contiguous()).T.contiguous()
        try:
            return super().forward(
                input_ids,
                position_ids,
                attention_mask,  # pyright: ignore[reportArgumentType]
                decoder_input=embedded,  # pyright: ignore[reportArgumentType]
                packed_seq_params=packed_seq_params,  # pyright: ignore[reportArgumentType]
                padding_mask=padding_mask,
            )
        finally:
            self._added = []

    def _embed(self, input_ids: torch.Tensor, position_ids: torch.Tensor, seen: Seen | None) -> torch.Tensor:
        """Embeddings [L, 1, H], or this rank's part of them, with features in the places of visual tokens."""
        embedded = self.embedding(input_ids=input_ids, position_ids=position_ids)
        if seen is not None:
            features = self.visual(seen.patches_PC.to(embedded.dtype), grid_thw=seen.grids_N3)
            instead = _in_places(features.pooler_output, seen.slots_L).to(embedded.dtype)
            embedded = torch.where(seen.slots_L[:, None, None] > 0, instead[:, None], embedded)
            if self._deepstack:
                self._keep(features.deepstack_features, seen.slots_L, embedded.dtype)
        return self._scattered(embedded)

    def _keep(self, features: Sequence[torch.Tensor], slots_L: torch.Tensor, dtype: torch.dtype) -> None:
        if len(self.decoder.layers) < len(features):
            raise BasculeError(
                f"features of {len(features)} layers of the vision tower are added after as many first layers of "
                f"the language model, but its first pipeline stage has {len(self.decoder.layers)}"
            )
        self._added = [
            self._scattered(_in_places(feature, slots_L)[:, None].to(dtype)) for feature in features
        ]

    def _scattered(self, whole: torch.Tensor) -> torch.Tensor:
        return scatter_to_sequence_parallel_region(whole) if self.config.sequence_parallel else whole

    def _adding(self, number: int) -> Callable[..., Any]:
        def add(layer: torch.nn.Module, args: Any, output: tuple[torch.Tensor, Any]) -> Any:
            return (output[0] + self._added[number], *output[1:]) if self._added else None

        return add


def _in_places(features_VH: torch.Tensor, slots_L: torch.Tensor) -> torch.Tensor:
    """[L, H]: the features, and zeros where a token has none."""
    return torch.cat([features_VH.new_zeros(1, features_VH.shape[1]), features_VH])[slots_L]


def seen_by(share: ContextShare, look: Look, device: torch.device) -> Seen | None:
    """What the first stage needs of the pictures in a row; None where there are none."""
    vision = share.batch.vision
    if vision is None or not vision.pictures:
        return None
    grids = [picture.grid for picture in vision.pictures]
    return Seen(
        patches_PC=torch.tensor(look(vision.pictures), device=device),
        grids_N3=torch.tensor(grids, dtype=torch.int64, device=device),
        slots_L=torch.tensor(share.mine(vision.slots_T), dtype=torch.int64, device=device),
    )

"""Pictures of prompts as vLLM takes them: patches that are ready, and where their features belong."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from actors.pictures import PictureReader
from algorithms.data import Vision
from bridge.families import spec_of
from configs.errors import BasculeError
from configs.vision import VisionConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """The pictures of one prompt, made ready once for all its completions. Names are vLLM's."""

    mm_kwargs: Any
    mm_hashes: Mapping[str, list[str]]
    mm_placeholders: Mapping[str, Any]


class Eyes:
    """Makes pictures ready for one model, which need not be one that sees."""

    def __init__(self, directory: Path, config: VisionConfig) -> None:
        """The image processor is that of the model directory, within the limits of `config`."""
        vision = spec_of(directory)[1].vision if directory.is_dir() else None
        self._reader = None if vision is None else PictureReader(directory, vision, config)

    @property
    def are_there(self) -> bool:
        """Whether the model sees."""
        return self._reader is not None

    async def see(self, vision: Vision | None, what: str) -> Shown | None:
        """What vLLM has to be told of the pictures of `what`; None where there are none.

        Raises BasculeError naming it, and a file that cannot be read or has changed since the run started.
        """
        if vision is None:
            return None
        if self._reader is None:
            raise BasculeError(f"{what} has pictures, and the model is one that sees none")
        try:
            return await asyncio.to_thread(_shown, self._reader, vision)
        except BasculeError as error:
            raise BasculeError(f"{what}: {error}") from error


def engine_input(tokens: Sequence[int], shown: Shown | None) -> Any:
    """A prompt for AsyncLLM.generate: what vLLM would else make of a prompt in a thread.

    It has to be this one: an abort while the thread is at it would not find the request.
    """
    from vllm.inputs import tokens_input
    from vllm.inputs.engine import mm_input

    if shown is None:
        return tokens_input(list(tokens))
    return mm_input(list(tokens), shown.mm_kwargs, shown.mm_hashes, shown.mm_placeholders)


def _shown(reader: PictureReader, vision: Vision) -> Shown:
    from transformers import BatchFeature
    from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange

    counts = [reader.sight.num_tokens(picture) for picture in vision.pictures]
    firsts = np.cumsum([1, *counts[:-1]]).tolist()
    # As many times as a picture is in a prompt; vLLM takes care that its features are computed once.
    patches = [torch.tensor(reader.patches([picture])) for picture in vision.pictures]
    grids = torch.tensor([picture.grid for picture in vision.pictures])
    items = MultiModalKwargsItems.from_hf_inputs(
        BatchFeature({"pixel_values": torch.cat(patches), "image_grid_thw": grids}),
        {
            "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", grids.prod(-1)),
            "image_grid_thw": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        },
    )
    return Shown(
        mm_kwargs=items,
        mm_hashes={
            "image": [
                xxhash.xxh3_128_hexdigest(row.numpy().tobytes() + repr(picture.grid).encode())
                for row, picture in zip(patches, vision.pictures, strict=True)
            ]
        },
        mm_placeholders={
            "image": [
                PlaceholderRange(offset=int(np.argmax(vision.slots_T == first)), length=count)
                for first, count in zip(firsts, counts, strict=True)
            ]
        },
    )

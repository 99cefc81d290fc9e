"""vLLM's models that see, which are given pictures as patches: see vllm_vision, by which they are found."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from vllm.model_executor.models import qwen2_5_vl, qwen2_vl, qwen3_vl, qwen3_vl_moe
from vllm.multimodal import MULTIMODAL_REGISTRY


class _Limits:
    """In place of what a processor knows: an image may be as long as a prompt, and there are no videos."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": seq_len}


class _Qwen2Info(_Limits, qwen2_vl.Qwen2VLProcessingInfo):
    pass


class _Qwen25Info(_Limits, qwen2_5_vl.Qwen2_5_VLProcessingInfo):
    pass


class _Qwen3Info(_Limits, qwen3_vl.Qwen3VLProcessingInfo):
    pass


class _Qwen3MoeInfo(_Limits, qwen3_vl_moe.Qwen3VLMoeProcessingInfo):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    qwen2_vl.Qwen2VLMultiModalProcessor, info=_Qwen2Info, dummy_inputs=qwen2_vl.Qwen2VLDummyInputsBuilder
)
class Qwen2VL(qwen2_vl.Qwen2VLForConditionalGeneration):
    """Qwen2VLForConditionalGeneration."""


@MULTIMODAL_REGISTRY.register_processor(
    qwen2_5_vl.Qwen2_5_VLMultiModalProcessor,
    info=_Qwen25Info,
    dummy_inputs=qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder,
)
class Qwen25VL(qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    """Qwen2_5_VLForConditionalGeneration."""


@MULTIMODAL_REGISTRY.register_processor(
    qwen3_vl.Qwen3VLMultiModalProcessor, info=_Qwen3Info, dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder
)
class Qwen3VL(qwen3_vl.Qwen3VLForConditionalGeneration):
    """Qwen3VLForConditionalGeneration."""


@MULTIMODAL_REGISTRY.register_processor(
    qwen3_vl.Qwen3VLMultiModalProcessor, info=_Qwen3MoeInfo, dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder
)
class Qwen3VLMoe(qwen3_vl_moe.Qwen3VLMoeForConditionalGeneration):
    """Qwen3VLMoeForConditionalGeneration, whose packed experts may lie in either way."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """vLLM 0.32 takes them as published, with input features first, and not as transformers has them."""
        config: Any = self.config
        hidden = config.text_config.hidden_size
        return super().load_weights((name, _as_published(name, tensor, hidden)) for name, tensor in weights)


def _as_published(name: str, tensor: torch.Tensor, hidden: int) -> torch.Tensor:
    """[experts, hidden, 2 x width] or [experts, width, hidden]; the sides differ (bridge.families.qwen_vl)."""
    side = {"gate_up_proj": 1, "down_proj": 2}.get(name.rpartition(".experts.")[2])
    return tensor if side is None or tensor.shape[side] == hidden else tensor.transpose(1, 2)

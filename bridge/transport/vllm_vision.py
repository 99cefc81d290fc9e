"""vLLM's models that see, for engines that are given pictures as patches, the ones that trainers compute with.

So nothing of a picture is done twice in two ways, and vLLM needs no processor of transformers: those of Qwen
have one for videos, which takes torchvision.
"""

import importlib
import importlib.util
import sys
from typing import Any


def __getattr__(name: str) -> Any:
    """The class of this name in vllm_models, when vLLM asks for it."""
    without_torchvision()
    return getattr(importlib.import_module("bridge.transport.vllm_models"), name)


def without_torchvision() -> None:
    """Let vLLM find transformers' processor on PIL where it imports the one on torchvision by its module.

    Symptom: `import vllm.model_executor.models.qwen3_vl` fails without torchvision, for the sake of a type and of
    a function that both modules have. To be dropped when vLLM imports both from transformers.models.qwen2_vl.
    """
    if importlib.util.find_spec("torchvision") is None:
        found: Any = importlib.import_module("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
        found.Qwen2VLImageProcessor = found.Qwen2VLImageProcessorPil
        sys.modules["transformers.models.qwen2_vl.image_processing_qwen2_vl"] = found

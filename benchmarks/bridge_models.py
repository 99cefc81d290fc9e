"""The models of the bridge's benchmark: a config.json each, and the layouts they are measured under."""

import json
import shutil
from pathlib import Path
from typing import Any

MODELS = ("smollm2", "dense-1b", "moe-1b")
REAL_SMOLLM2 = Path("models/smollm2-135m-instruct")

_CONFIGS: dict[str, dict[str, Any]] = {
    "smollm2": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "dense-1b": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
    "moe-1b": {
        "model_type": "qwen3_moe",
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "moe_intermediate_size": 512,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
}


def prepare(model: str, directory: Path, config: Path) -> bool:
    """Copy SmolLM2 to `directory` where `make model-smollm2` has made it.

    Else make the directory `config` with a config.json; returns whether a model is still to be made of it.
    """
    if model == "smollm2" and REAL_SMOLLM2.is_dir():
        shutil.copytree(REAL_SMOLLM2, directory)
        return False
    config.mkdir()
    (config / "config.json").write_text(json.dumps(_CONFIGS[model] | {"dtype": "bfloat16"}))
    return True


def layout_of(model: str, processes: int) -> dict[str, int]:
    """Tensor parallel for the dense model (row-parallel matrices are exchanged), expert parallel for the other.

    SmolLM2 has three query groups, which two ranks cannot share: pipeline stages and replicas.
    """
    match model:
        case "dense-1b":
            return {"tensor_model_parallel_size": processes}
        case "moe-1b":
            return {"data_parallel_size": processes, "expert_model_parallel_size": processes}
        case _:
            stages = min(processes, 2)
            return {"pipeline_model_parallel_size": stages, "data_parallel_size": processes // stages}

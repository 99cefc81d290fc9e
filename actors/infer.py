"""`bascule infer`: one prompt, one answer, by vLLM or by transformers. Needs no Ray."""

import asyncio
import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.engine_settings import completion_arguments, engine_environment
from actors.engine_stream import stream_completion
from actors.engine_support import check_routing, check_sight
from actors.engine_vision import Eyes, engine_input
from actors.env import resolve_device
from actors.model_source import is_torch_dist, load_tokenizer
from actors.pictures import PictureReader
from algorithms.conversations import make_prompts
from algorithms.data import Vision
from algorithms.rows import Row
from bridge.checkpoint import check_files, resolve_model
from bridge.families import read_hf_config, spec_of
from configs.data import DataConfig
from configs.errors import BasculeError, ConfigError
from configs.export import InferConfig
from configs.vision import VisionConfig

OnText = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Request:
    """What both backends are asked."""

    model: Path
    tokenizer: Any
    tokens: Sequence[int]
    vision: Vision | None
    max_new_tokens: int
    device: str
    dtype: str
    """Name of a torch type, or "auto" where config.json names none."""
    config: InferConfig


def infer(config: InferConfig, on_text: OnText) -> str:
    """The answer's text, without special tokens. `on_text` gets it piece by piece as it comes.

    The answer ends at the model's end-of-text token, after `max_new_tokens`, or where the model's positions
    end. Raises ConfigError for a model or tokenizer that is missing, damaged, or another one to the backend, and
    for a prompt that does not fit; BasculeError when the backend fails.
    """
    if is_torch_dist(Path(config.model)):
        raise ConfigError(
            f"model: {config.model} is a Megatron torch_dist checkpoint; make safetensors of it first: bascule "
            f"export --mcore_model {config.model} --to_hf true"
        )
    model = resolve_model(config.model, "model")
    device = resolve_device(config.device)
    tokenizer = load_tokenizer(model)
    tokens, vision = _prompt(config, model, tokenizer)
    hf_config = _read_config(model)
    room = _room(hf_config, len(tokens))
    check_files(model)
    if config.backend == "vllm":
        check_routing(model, hf_config.to_dict())
    request = _Request(
        model=model,
        tokenizer=tokenizer,
        tokens=tokens,
        vision=vision,
        max_new_tokens=config.max_new_tokens if room is None else min(config.max_new_tokens, room),
        device=device,
        # Not left to the backends: vLLM's own choice for a float32 model is bfloat16.
        dtype=config.torch_dtype or str(hf_config.dtype or "auto").removeprefix("torch."),
        config=config,
    )
    answer = _with_vllm if config.backend == "vllm" else _with_transformers
    return answer(request, on_text)


def _prompt(config: InferConfig, model: Path, tokenizer: Any) -> tuple[list[int], Vision | None]:
    """Tokens of the prompt, and what they show. Raises ConfigError."""
    if not config.image:
        return _prompt_tokens(config, tokenizer), None
    hf_config = read_hf_config(model)
    vision = spec_of(model)[1].vision
    if vision is None:
        raise ConfigError(f"image: {model} is a model that sees none")
    check_sight(model, hf_config)
    content: list[dict[str, str]] = [{"type": "image", "image": path} for path in config.image]
    content.append({"type": "text", "text": config.prompt})
    row = Row(id="1", place="image", columns={"messages": [{"role": "user", "content": content}]})
    data = DataConfig(dataset=("image",), system_prompt=config.system_prompt)
    (prompt,) = make_prompts([row], tokenizer, data, PictureReader(model, vision, VisionConfig()))
    return prompt.tokens.tolist(), prompt.vision


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
        tokens: list[int] = []
        # Only here: vLLM may not be imported before its environment was set.
        eyes = None if request.vision is None else Eyes(request.model, VisionConfig())
        shown = None if eyes is None else await eyes.see(request.vision, "the prompt")
        async for piece, new_tokens in stream_completion(
            arguments,
            lambda: engine_input(request.tokens, shown),
            max_tokens=request.max_new_tokens,
            temperature=config.temperature,
            seed=config.seed,
        ):
            pieces.append(piece)
            tokens += new_tokens
            on_text(piece)
        rest = _held_back("".join(pieces), tokens, request.tokenizer)
        on_text(rest)
        return "".join([*pieces, rest])

    text = asyncio.run(collect())
    # The engine is part of a circle, and must be gone before the interpreter is.
    gc.collect()
    return text


def _held_back(text: str, tokens: Sequence[int], tokenizer: Any) -> str:
    """What is missing in vLLM's text at the end: bytes of a character that is not whole."""
    whole: str = tokenizer.decode(tokens, skip_special_tokens=True)
    # Some tokenizers drop the space that an answer begins with, where it is decoded alone.
    before = text.lstrip()
    return whole.lstrip().removeprefix(before) if whole.lstrip().startswith(before) else ""


def _with_transformers(request: _Request, on_text: OnText) -> str:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, TextStreamer
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    class Pieces(TextStreamer):
        """Hands every finished piece of text on."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            on_text(text)

    config = request.config
    # It would list tensors that it has no use for; a DeepSeek-V3 has a whole layer of them.
    set_verbosity_error()
    disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            request.model, dtype=request.dtype, local_files_only=True, output_loading_info=True
        )
    # Weights and config are foreign: a broken one may raise anything.
    except Exception as error:
        raise BasculeError(f"{request.model}: transformers cannot load the model: {error!r}") from error
    model, found = loaded
    if found["missing_keys"]:
        names = ", ".join(sorted(found["missing_keys"]))
        raise ConfigError(f"{request.model}: transformers needs tensors that are not there: {names}")
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

"""How far a converted model's logits are from transformers', said the way `megatron export` users know it."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from actors.precision_picture import Shown, show
from bridge.adapter_bridge import adapted_modules
from bridge.adapter_config import ADAPTER_WEIGHTS, read_adapter_config
from bridge.checkpoint import CheckpointReader
from bridge.layouts import region_of
from bridge.lora import PREFIX
from bridge.rules import VisionSpec
from configs.errors import BasculeError

_QUESTION = "How does a bascule bridge open, and why does it take so little power?"
_ANSWER = (
    "A bascule bridge carries a counterweight on the short side of its axle. The weight of the road and the "
    "weight of the block almost cancel, so the motor only has to overcome friction, wind and inertia. Before it "
    "opens, the lights turn red, the barriers come down, and the locks in the middle let go. Then the leaf turns "
    "upwards; in about 60 seconds a ship of 30 metres can pass. To close it again, the same steps run backwards: "
    "the leaf comes down slowly, the locks engage, the barriers lift, and cars drive on. Nothing is lost between "
    "the two states: a bridge that was opened and closed 1,000 times carries exactly the road it carried before. "
    "The oldest ones were moved by hand, with chains and a winch, and some of those can still be seen over the "
    "moats of castles. Modern ones use hydraulic cylinders or racks and pinions, and are watched by cameras."
)
_RANDOM_TOKENS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleBatch:
    """Tokens to compare two models on. All tensors are [B, S]; `loss_mask` says whose next token has a loss."""

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    shown: Shown | None = None
    """A picture at the beginning of the row, for a model that sees."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionReport:
    """Absolute differences of logits. `token_mean_diff` is a token's mean over the vocabulary."""

    token_mean_diff: tuple[float, ...]
    """One for each token, row after row."""
    mean_diff: float
    max_diff: float
    token_diff: int
    """Tokens whose likeliest next token differs."""
    num_tokens: int
    mean_diff_with_loss: float | None
    """This and the next two count only tokens that have a loss; None when none has."""
    max_diff_with_loss: float | None
    token_diff_with_loss: int | None
    num_loss_tokens: int
    hf_tokens: tuple[int, ...]
    """The likeliest next tokens of transformers' model, row after row, and of Megatron's."""
    mg_tokens: tuple[int, ...]

    def passes(self, threshold: float) -> bool:
        """Whether mean_diff, on tokens with a loss where there are any, is below `threshold`; never for NaN."""
        mean = self.mean_diff if self.mean_diff_with_loss is None else self.mean_diff_with_loss
        return mean < threshold

    def lines(self) -> list[str]:
        """The report as text, one line for each number or list."""
        lines = [
            f"token_mean_diff: {_numbers(self.token_mean_diff)}",
            f"mean_diff: {self.mean_diff:.3e}, max_diff: {self.max_diff:.3e}",
        ]
        if self.mean_diff_with_loss is not None:
            lines.append(
                f"mean_diff (with loss): {self.mean_diff_with_loss:.3e}, "
                f"max_diff (with loss): {self.max_diff_with_loss:.3e}"
            )
        lines += [
            f"hf_tokens: {list(self.hf_tokens)}",
            f"mg_tokens: {list(self.mg_tokens)}",
            f"token_diff: {self.token_diff} of {self.num_tokens}",
        ]
        if self.token_diff_with_loss is not None:
            lines.append(f"token_diff (with loss): {self.token_diff_with_loss} of {self.num_loss_tokens}")
        return lines


def compare_logits(hf: torch.Tensor, megatron: torch.Tensor, loss_mask: torch.Tensor) -> PrecisionReport:
    """Differences between two models' logits [B, S, V] for the same tokens, in float32.

    Columns of `megatron` beyond the vocabulary of `hf` are its padding and are cut off. `loss_mask` is [B, S].
    Raises BasculeError when the shapes do not belong together.
    """
    short = megatron.shape[-1] < hf.shape[-1]
    if hf.shape[:2] != megatron.shape[:2] or hf.shape[:2] != loss_mask.shape or short:
        raise BasculeError(
            f"precision test: logits of transformers {list(hf.shape)}, of Megatron {list(megatron.shape)} and a "
            f"loss mask {list(loss_mask.shape)} do not belong together"
        )
    megatron = megatron[..., : hf.shape[-1]]
    hf_tokens, mg_tokens = hf.argmax(-1).flatten(), megatron.argmax(-1).flatten()
    # Row by row: a copy of all logits in float32 would be the largest tensor of the test.
    rows = [
        (left.float() - right.float()).abs()
        for each_hf, each_mg in zip(hf, megatron, strict=True)
        for left, right in zip(each_hf, each_mg, strict=True)
    ]
    means, maxima = torch.stack([row.mean() for row in rows]), torch.stack([row.max() for row in rows])
    differs, chosen = hf_tokens != mg_tokens, loss_mask.flatten().bool()
    some = bool(chosen.any())
    return PrecisionReport(
        token_mean_diff=tuple(means.tolist()),
        mean_diff=float(means.mean()),
        max_diff=float(maxima.max()),
        token_diff=int(differs.sum()),
        num_tokens=len(rows),
        mean_diff_with_loss=float(means[chosen].mean()) if some else None,
        max_diff_with_loss=float(maxima[chosen].max()) if some else None,
        token_diff_with_loss=int(differs[chosen].sum()) if some else None,
        num_loss_tokens=int(chosen.sum()),
        hf_tokens=tuple(hf_tokens.tolist()),
        mg_tokens=tuple(mg_tokens.tolist()),
    )


def sample_tokens(
    tokenizer: Any | None,
    vocab_size: int,
    seed: int,
    *,
    max_length: int = 256,
    multiple_of: int = 8,
    vision: VisionSpec | None = None,
) -> SampleBatch:
    """One row to test on: a question and its answer, the answer with loss; without a tokenizer, random tokens.

    The row has at most `max_length` tokens and, so that sequence-parallel ranks can share it, a multiple of
    `multiple_of` of them. Raises BasculeError when the tokenizer gives tokens beyond `vocab_size`.
    """
    if tokenizer is None:
        generator = torch.Generator().manual_seed(seed)
        length = min(_RANDOM_TOKENS, max_length) // multiple_of * multiple_of
        ids = torch.randint(vocab_size, (length + 1,), generator=generator).tolist()
        prompt = 1
    else:
        ids, prompt = _chat_tokens(tokenizer)
    if max(ids) >= vocab_size:
        raise BasculeError(
            f"precision test: the tokenizer gives token {max(ids)}, but the model's vocabulary has {vocab_size}"
        )
    length = min(len(ids) - 1, max_length) // multiple_of * multiple_of
    ids, shown = ids[: length + 1], None
    if vision is not None:
        before = len(ids)
        ids, shown = show(vision, ids, seed, multiple_of)
        prompt, length = prompt + len(ids) - before, length + len(ids) - before
    row = torch.tensor([ids])
    labels = row[:, 1:].contiguous()
    # The last token of the prompt is the first whose next token belongs to the answer.
    mask = torch.arange(length)[None] >= prompt - 1
    return SampleBatch(tokens=row[:, :-1].contiguous(), labels=labels, loss_mask=mask, shown=shown)


def reference_logits(
    model_dir: Path,
    tokens: torch.Tensor,
    dtype: torch.dtype,
    device: str = "cpu",
    adapter_dir: Path | None = None,
    shown: Shown | None = None,
) -> torch.Tensor:
    """Float32 logits [B, S, V] that transformers computes in `dtype` with eager attention; on CPU.

    With `shown` the model is one that sees. With `adapter_dir` the PEFT adapter that is there is merged into
    the model first. Reads local files only; the model is gone afterwards. Raises BasculeError when it cannot be
    loaded.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    # It would list tensors that it has no use for; a DeepSeek-V3 has a whole layer of them.
    set_verbosity_error()
    disable_progress_bar()
    try:
        kind = AutoModelForCausalLM if shown is None else AutoModelForImageTextToText
        loaded: Any = kind.from_pretrained(
            model_dir,
            dtype=dtype,
            attn_implementation="eager",
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise BasculeError(f"{model_dir}: transformers cannot load the model: {error}") from error
    model, found = loaded
    if found["missing_keys"]:
        names = ", ".join(sorted(found["missing_keys"]))
        raise BasculeError(f"{model_dir}: transformers needs tensors that are not there: {names}")
    if adapter_dir is not None:
        merge_adapter(model, adapter_dir)
    model.to(device).eval()
    tokens = tokens.to(device)
    with torch.no_grad():
        logits = (
            model(tokens, use_cache=False, **(shown.inputs(tokens) if shown else {})).logits.float().cpu()
        )
    del model
    # Modules refer to each other in circles, so their memory is not free before this.
    gc.collect()
    return logits


@torch.no_grad()
def merge_adapter(model: Any, directory: Path) -> None:
    """Add a PEFT adapter to the weights of a transformers model, module by module, in float32.

    Raises BasculeError naming a module that the model does not have.
    """
    config = read_adapter_config(directory)
    with CheckpointReader(directory, ADAPTER_WEIGHTS) as reader:
        tensors = {name: reader.read(name, region_of(info.shape)) for name, info in reader.tensors.items()}
    for module in adapted_modules(tensors):
        weight = _weight_of(model, module, directory)
        prefix = f"{PREFIX}{module}.lora_"
        if f"{prefix}embedding_A" in tensors:
            delta = (tensors[f"{prefix}embedding_B"].float() @ tensors[f"{prefix}embedding_A"].float()).T
        else:
            delta = tensors[f"{prefix}B.weight"].float() @ tensors[f"{prefix}A.weight"].float()
        weight.copy_(weight.float() + config.scale_of(module) * delta)
    for name, tensor in tensors.items():
        module = name.removeprefix(PREFIX).rpartition(".")[0]
        if config.saves(module):
            _weight_of(model, module, directory).copy_(tensor)


def _weight_of(model: Any, module: str, directory: Path) -> torch.Tensor:
    """A view of a module's weight; transformers packs those of experts, gate above up."""
    experts, found, rest = module.partition(".experts.")
    try:
        if not found:
            return model.get_submodule(module).weight
        packed = model.get_submodule(f"{experts}.experts")
    except AttributeError as error:
        raise BasculeError(f"{directory}: transformers' model has no module {module}") from error
    number, leaf = rest.split(".")
    if leaf == "down_proj":
        return packed.down_proj[int(number)]
    both = packed.gate_up_proj[int(number)]
    return both.chunk(2)[leaf == "up_proj"]


def _chat_tokens(tokenizer: Any) -> tuple[list[int], int]:
    """Tokens of question and answer, and how many of them are the question's."""
    question = {"role": "user", "content": _QUESTION}
    answer = {"role": "assistant", "content": _ANSWER}
    if tokenizer.chat_template is None:
        # verbose: the text is cut to the model's length afterwards, no need to warn of it.
        ids = tokenizer.encode(f"{_QUESTION}\n{_ANSWER}", verbose=False)
        prompt = tokenizer.encode(f"{_QUESTION}\n", verbose=False)
    else:
        ids = tokenizer.apply_chat_template(
            [question, answer], return_dict=False, tokenizer_kwargs={"verbose": False}
        )
        prompt = tokenizer.apply_chat_template([question], add_generation_prompt=True, return_dict=False)
    # A template may write an answer in another way than it asks for one: only what both share is the prompt.
    return ids, _shared(ids, prompt)


def _shared(left: Sequence[int], right: Sequence[int]) -> int:
    same = (position for position, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1])
    return next(same, min(len(left), len(right)))


def _numbers(values: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:.2e}" for value in values) + "]"

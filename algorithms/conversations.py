"""Rows through a tokenizer and its chat template: prompts, and samples with a mask of what is trained on."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from algorithms.contents import split_pictures
from algorithms.data import Message, Picture, Prompt, Source, TrainSample, float_row, int_row
from algorithms.rows import Row, answer_messages, is_text, prompt_messages, prompt_text
from algorithms.vision import Eye
from configs.data import DataConfig
from configs.errors import BasculeError, ConfigError
from configs.sft import SFTConfig

# The same test as transformers' own.
_MARKED = re.compile(r"\{\%-?\s*generation\s*-?\%\}")
_SMALLER = (
    ", or vision.image_max_token_num lower (for videos vision.video_max_token_num or vision.fps_max_frames)"
)


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    @property
    def chat_template(self) -> Any:
        """The jinja source, or None."""
        ...

    @property
    def bos_token_id(self) -> Any:
        """Id of the token that starts a text, or None."""
        ...

    @property
    def eos_token_id(self) -> Any:
        """Id of the token that ends a text, or None."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text."""
        ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Ids of a rendered conversation (`tokenize=True, return_dict=False`)."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """Samples to train on, and how many rows were longer than allowed."""

    kept: tuple[TrainSample, ...]
    truncated: int
    """Rows that lost their end."""
    dropped: int
    """Rows left out: too long, or with nothing to train on before the cut."""

    def describe(self) -> str:
        """`16 samples`, and what happened to long rows."""
        return describe_counts(len(self.kept), self.truncated, self.dropped)


def describe_counts(samples: int, truncated: int, dropped: int) -> str:
    """`16 samples, 3 truncated, 2 dropped`, without what is zero."""
    changes = [(truncated, "truncated"), (dropped, "dropped")]
    return ", ".join([f"{samples} samples", *(f"{n} {what}" for n, what in changes if n)])


def make_prompts(
    rows: Sequence[Row], tokenizer: Tokenizer, data: DataConfig, eye: Eye | None = None
) -> list[Prompt]:
    """Prompts as the engine gets them: through the chat template if there is one, else the text as it is.

    Those with pictures need an `eye`. Raises ConfigError naming the row that is longer than
    `data.max_prompt_length` or has no usable prompt.
    """
    prompts: list[Prompt] = []
    for row in rows:
        messages = prompt_messages(row, data.system_prompt)
        if messages[-1]["role"] == "assistant":
            raise ConfigError(
                f"{row.place}: the last message is the assistant's; a prompt ends with the user's"
            )
        split, sources = split_pictures(row, messages)
        tokens = _encode_prompt(row, split, tokenizer)
        tokens, _, pictures = _look_at(row, tokens, [0] * len(tokens), sources, eye)
        if any(picture.video for picture in pictures):
            raise ConfigError(f"{row.place}: engines are shown images, no videos; only sft takes those")
        if data.max_prompt_length is not None and len(tokens) > data.max_prompt_length:
            raise ConfigError(
                f"{row.place}: the prompt has {len(tokens)} tokens{_with(pictures)}, data.max_prompt_length "
                f"allows {data.max_prompt_length}; shorten or remove the row, or raise the limit"
            )
        prompts.append(
            Prompt(
                id=row.id,
                tokens=int_row(tokens),
                messages=tuple(messages),
                columns=row.columns,
                vision=None if eye is None else eye.sight.vision_of(tokens, pictures),
            )
        )
    return prompts


def make_sft_samples(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    sft: SFTConfig,
    data: DataConfig,
    eye: Eye | None = None,
) -> Samples:
    """Tokens of each row, with `loss_mask` 1 on what the assistant says and on the token that ends a turn.

    Of `messages` that are the assistant's turns, of a row with a completion its answer only, as
    `data.loss_on` says; never on tokens of pictures, which need an `eye`. Advantages and logprobs are zeros.
    Raises ConfigError naming a row without an answer, one that is too long under `sft.truncation: error`, or one
    whose turns the chat template does not let tell apart; and where no row is left.
    """
    made = [make_sft_sample(row, tokenizer, sft, data, eye) for row in rows]
    kept = tuple(sample for sample, _ in made if sample is not None)
    if rows and not kept:
        raise nothing_left(sft, len(rows), rows[0].place)
    truncated = sum(sample is not None and cut for sample, cut in made)
    return Samples(kept=kept, truncated=truncated, dropped=len(rows) - len(kept))


def make_sft_sample(
    row: Row, tokenizer: Tokenizer, sft: SFTConfig, data: DataConfig, eye: Eye | None = None
) -> tuple[TrainSample | None, bool]:
    """The sample of one row, None where it is left out, and whether it was too long. Raises ConfigError."""
    tokens, mask, sources = _encode(row, tokenizer, data)
    tokens, mask, pictures = _look_at(row, tokens, mask, sources, eye)
    too_long = len(tokens) > sft.max_length
    if too_long:
        if sft.truncation == "error":
            raise ConfigError(
                f"{row.place}: the sample has {len(tokens)} tokens{_with(pictures)}, sft.max_length allows "
                f"{sft.max_length}; shorten or remove the row, raise the limit, or set sft.truncation to "
                f"truncate or drop{_SMALLER if pictures else ''}"
            )
        end = sft.max_length if eye is None else eye.sight.end_of_whole(tokens, pictures, sft.max_length)
        # The first token is not predicted, so that nothing is learned from a mask on it alone.
        if sft.truncation == "drop" or not any(mask[1:end]):
            return None, True
        tokens, mask = tokens[:end], mask[:end]
    zeros = float_row(np.zeros(len(tokens)))
    sample = TrainSample(
        tokens=int_row(tokens),
        loss_mask=int_row(mask),
        advantages=zeros,
        logprobs=zeros,
        version=0,
        vision=None if eye is None else eye.sight.vision_of(tokens, pictures),
    )
    return sample, too_long


def _with(pictures: Sequence[Picture]) -> str:
    return f", with those of {len(pictures)} pictures" if pictures else ""


def nothing_left(sft: SFTConfig, count: int, first: str) -> ConfigError:
    """What to say when every one of `count` rows is left out, the first of which is at the place `first`."""
    return ConfigError(
        f"sft.max_length: with {sft.max_length} tokens sft.truncation {sft.truncation} leaves none of the "
        f"{count} rows, the first of which is {first}; raise the limit"
    )


def _look_at(
    row: Row, tokens: list[int], mask: list[int], sources: Sequence[Source], eye: Eye | None
) -> tuple[list[int], list[int], list[Picture]]:
    """Tokens and mask with all that stands for the pictures, and these."""
    if eye is None:
        if sources:
            raise ConfigError(f"{row.place}: the row has pictures, and the model is one that sees none")
        return tokens, mask, []
    pictures = [eye.picture(source, row.place) for source in sources]
    try:
        return (*eye.sight.expanded(tokens, mask, pictures), pictures)
    except BasculeError as error:
        raise ConfigError(f"{row.place}: {error}") from error


def _encode_prompt(row: Row, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    if tokenizer.chat_template is not None:
        return _render(row, messages, tokenizer, add_generation_prompt=True)
    if not is_text(row):
        raise ConfigError(
            f"{row.place}: the row has messages, but the tokenizer has no chat template; use a model with "
            "one, or rows with a string as `prompt`"
        )
    if len(messages) > 1:
        where = f"{row.place}: `system`" if row.columns.get("system") else "data.system_prompt"
        raise ConfigError(f"{where}: the tokenizer has no chat template to put it in; remove it")
    tokens = tokenizer.encode(prompt_text(row))
    # The text may spell out the token that the tokenizer adds.
    doubled = tokens[:2] == [tokenizer.bos_token_id] * 2
    return tokens[1:] if doubled else tokens


def _encode(row: Row, tokenizer: Tokenizer, data: DataConfig) -> tuple[list[int], list[int], list[Source]]:
    """Ids of the whole row, up to the last one that is trained on, the mask, and the pictures in it."""
    context = prompt_messages(row, data.system_prompt)
    answer = answer_messages(row)
    messages = [*context, *answer]
    first = len(context) if answer else 0
    turns = [place for place in range(first, len(messages)) if messages[place]["role"] == "assistant"]
    if not turns or (answer and context[-1]["role"] == "assistant"):
        raise ConfigError(
            f"{row.place}: a row for sft ends with what the assistant says: in `messages`, or in `completion` "
            "or `output` after a prompt that ends with the user's"
        )
    turns = turns[-1:] if data.loss_on == "last_assistant" else turns
    # What comes after the last answer has no part in the loss.
    messages, sources = split_pictures(row, messages[: turns[-1] + 1])
    if tokenizer.chat_template is None:
        if sources:
            raise ConfigError(f"{row.place}: pictures need a model with a chat template")
        return (*_join_texts(row, context, messages[-1]["content"], tokenizer), sources)
    marked = isinstance(tokenizer.chat_template, str) and _MARKED.search(tokenizer.chat_template)
    return (*(_mask_marked if marked else _mask_by_prefixes)(row, messages, turns, tokenizer), sources)


def _join_texts(
    row: Row, context: Sequence[Message], answer: str, tokenizer: Tokenizer
) -> tuple[list[int], list[int]]:
    prompt = _encode_prompt(row, context, tokenizer)
    tail = _ended(tokenizer.encode(answer, add_special_tokens=False), tokenizer)
    return [*prompt, *tail], [0] * len(prompt) + [1] * len(tail)


def _ended(tail: list[int], tokenizer: Tokenizer) -> list[int]:
    """The end of a sample, up to an end-of-sequence token, which is added where there is none."""
    eos = tokenizer.eos_token_id
    if eos is None or eos in tail:
        return _until(tail, eos)
    return [*tail, eos]


def _until(tokens: list[int], eos: int | None) -> list[int]:
    """What a template puts after the end of a turn is never sampled."""
    return tokens[: len(tokens) - tokens[::-1].index(eos)] if eos in tokens else tokens


def _mask_marked(
    row: Row, messages: Sequence[Message], turns: Sequence[int], tokenizer: Tokenizer
) -> tuple[list[int], list[int]]:
    """As transformers computes it, for a template that marks what the assistant says."""
    found = _apply(row, messages, tokenizer, return_dict=True, return_assistant_tokens_mask=True)
    tokens, mask = list(found["input_ids"]), list(found["assistant_masks"])
    if any(message["role"] == "assistant" for message in messages[: turns[0]]):
        untrained = len(_history(row, messages, turns[0], tokens, tokenizer))
        mask[:untrained] = [0] * untrained
    if not any(mask):
        raise ConfigError(
            f"{row.place}: the chat template marks nothing of it with {{% generation %}} that has a token"
        )
    end = len(mask) - mask[::-1].index(1)
    return tokens[:end], mask[:end]


def _mask_by_prefixes(
    row: Row, messages: Sequence[Message], turns: Sequence[int], tokenizer: Tokenizer
) -> tuple[list[int], list[int]]:
    """A turn is what the conversation up to it has more than the conversation before it.

    Only if every one of these is, token by token, how the whole conversation begins.
    """
    whole = _render(row, messages, tokenizer, add_generation_prompt=False)
    mask = [0] * len(whole)
    for turn in turns[:-1]:
        start = _start(row, messages, turn, whole, tokenizer)
        end = len(_history(row, messages, turn + 1, whole, tokenizer))
        said = _until(whole[start:end], tokenizer.eos_token_id)
        mask[start : start + len(said)] = [1] * len(said)
    start = _start(row, messages, turns[-1], whole, tokenizer)
    tail = _ended(whole[start:], tokenizer)
    return [*whole[:start], *tail], [*mask[:start], *[1] * len(tail)]


def _start(row: Row, messages: Sequence[Message], turn: int, whole: list[int], tokenizer: Tokenizer) -> int:
    """Where the assistant's turn departs from the generation prompt.

    A generation prompt may hold more than the header of a finished turn, such as an opened think block.
    """
    history = _history(row, messages, turn, whole, tokenizer)
    prompt = _render(row, messages[:turn], tokenizer, add_generation_prompt=True)
    pairs = zip(whole, prompt, strict=False)
    same = next((index for index, (left, right) in enumerate(pairs) if left != right), None)
    start = min(len(whole), len(prompt)) if same is None else same
    if start < len(history):
        raise _not_stable(row, turn)
    return start


def _history(
    row: Row, messages: Sequence[Message], turn: int, whole: list[int], tokenizer: Tokenizer
) -> list[int]:
    """Ids of the messages before `turn`, which the whole conversation must begin with."""
    history = _render(row, messages[:turn], tokenizer, add_generation_prompt=False)
    if whole[: len(history)] != history:
        raise _not_stable(row, turn)
    return history


def _not_stable(row: Row, turn: int) -> ConfigError:
    return ConfigError(
        f"{row.place}: the chat template renders the turns before message {turn + 1} differently once that is "
        "there, so what the assistant says cannot be told apart; set data.loss_on to last_assistant if it is not, "
        "or put {% generation %} around the assistant's words in the template"
    )


def _render(
    row: Row, messages: Sequence[Message], tokenizer: Tokenizer, *, add_generation_prompt: bool
) -> list[int]:
    return _apply(row, messages, tokenizer, return_dict=False, add_generation_prompt=add_generation_prompt)


def _apply(row: Row, messages: Sequence[Message], tokenizer: Tokenizer, **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=True, **options
        )
    # Templates are foreign code: jinja's errors and raise_exception come in many types.
    except Exception as error:
        raise ConfigError(f"{row.place}: the chat template refuses the row: {error}") from error

"""Dataset rows, and the prompts and samples that a tokenizer makes of them."""

import dataclasses
import difflib
import importlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np

from algorithms.data import Message, Prompt, TrainSample, float_row, int_row
from configs.data import DataConfig
from configs.errors import ConfigError

Split = Literal["train", "eval"]
GENERATED = "reasoning_gym:"
# reasoning-gym seeds row i with seed + i: seeds that are close to each other share rows.
EVAL_SEED_DISTANCE = 1 << 30
EVAL_DRAWS_PER_ROW = 4


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
class Row:
    """One row: `id` (`train-7`), `place` for messages (file and line), and its columns as they were read."""

    id: str
    place: str
    columns: Mapping[str, Any]


def read_rows(data: DataConfig, split: Split, seed: int = 42) -> list[Row]:
    """Rows of a split, numbered from 1 (in a file: its lines).

    Without `data.eval_dataset`, the eval rows of a generated dataset come from the same task, and a file has
    none. Generated eval rows have another seed than `seed` and none of the training questions. Raises
    ConfigError for a dataset that is missing, malformed or empty.
    """
    dataset = data.dataset
    if split == "eval":
        dataset = data.eval_dataset or (dataset if dataset.startswith(GENERATED) else None)
        if dataset is None:
            return []
        if dataset.startswith(GENERATED):
            return _read_held_out(dataset, data, seed)
    rows = list(_read(dataset, split, data, seed))
    if not rows:
        raise ConfigError(f"{dataset}: there are no rows in it")
    return rows if split == "train" else rows[: data.eval_size]


def make_prompts(rows: Sequence[Row], tokenizer: Tokenizer, data: DataConfig) -> list[Prompt]:
    """Prompts as the engine gets them: through the chat template if there is one, else the text as it is.

    Raises ConfigError naming the row that is longer than `data.max_prompt_length` or has no usable prompt.
    """
    prompts: list[Prompt] = []
    for row in rows:
        messages = _prompt_messages(row, data.system_prompt)
        if messages[-1]["role"] == "assistant":
            raise ConfigError(
                f"{row.place}: the last message is the assistant's; a prompt ends with the user's"
            )
        tokens = _encode_prompt(row, messages, tokenizer)
        if data.max_prompt_length is not None and len(tokens) > data.max_prompt_length:
            raise ConfigError(
                f"{row.place}: the prompt has {len(tokens)} tokens, data.max_prompt_length allows "
                f"{data.max_prompt_length}; shorten or remove the row, or raise the limit"
            )
        prompts.append(Prompt(id=row.id, tokens=int_row(tokens), messages=messages, columns=row.columns))
    return prompts


def make_sft_samples(
    rows: Sequence[Row], tokenizer: Tokenizer, max_length: int, system_prompt: str | None = None
) -> list[TrainSample]:
    """Samples of prompt, completion and end-of-sequence token; `loss_mask` is 1 on the last two.

    The completion is the column `completion`, or the final assistant message. Advantages and logprobs are
    zeros. Raises ConfigError naming a row without a completion or longer than `max_length` tokens.
    """
    samples: list[TrainSample] = []
    for row in rows:
        prompt, completion = _encode_pair(row, tokenizer, system_prompt)
        tokens = [*prompt, *completion]
        if len(tokens) > max_length:
            raise ConfigError(
                f"{row.place}: the sample has {len(tokens)} tokens, sft.max_length allows {max_length}; "
                "shorten or remove the row, or raise the limit"
            )
        zeros = float_row(np.zeros(len(tokens)))
        mask = int_row([0] * len(prompt) + [1] * len(completion))
        samples.append(
            TrainSample(tokens=int_row(tokens), loss_mask=mask, advantages=zeros, logprobs=zeros, version=0)
        )
    return samples


def _read(dataset: str, split: Split, data: DataConfig, seed: int) -> Iterator[Row]:
    if dataset.startswith(GENERATED):
        size = data.dataset_size if split == "train" else data.eval_size * EVAL_DRAWS_PER_ROW
        entries = _generate(dataset.removeprefix(GENERATED), size, data.dataset_kwargs, seed)
        found = ((number, f"{dataset} row {number}", entry) for number, entry in enumerate(entries, 1))
    else:
        found = ((number, f"{dataset}:{number}", row) for number, row in _read_jsonl(Path(dataset)))
    for number, place, columns in found:
        row = Row(id=f"{split}-{number}", place=place, columns=columns)
        _check_columns(row)
        yield row


def _read_held_out(dataset: str, data: DataConfig, seed: int) -> list[Row]:
    known = {_question(row) for row in _read(data.dataset, "train", data, seed)}
    held_out: list[Row] = []
    for row in _read(dataset, "eval", data, seed + EVAL_SEED_DISTANCE):
        question = _question(row)
        if question not in known:
            known.add(question)
            held_out.append(row)
        if len(held_out) == data.eval_size:
            break
    if not held_out:
        raise ConfigError(
            f"data.eval_dataset: every question that {dataset} made is in the training set; lower "
            "data.dataset_size or widen data.dataset_kwargs"
        )
    return held_out


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(
            f"{path}: this dataset cannot be read: {reason}; give a JSONL file or {GENERATED}NAME"
        ) from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{path}:{number}: not valid JSON: {error.msg} at column {error.colno}"
            ) from None
        if not isinstance(row, dict):
            raise ConfigError(f"{path}:{number}: a row is a JSON object with `prompt` or `messages`")
        yield number, cast(dict[str, Any], row)


def _check_columns(row: Row) -> None:
    columns, place = row.columns, row.place
    if ("prompt" in columns) == ("messages" in columns):
        number = "both" if "prompt" in columns else "neither"
        names = ", ".join(columns)
        raise ConfigError(
            f"{place}: a row has `prompt` or `messages`, this one has {number} (it has: {names})"
        )
    if "prompt" in columns and not isinstance(columns["prompt"], str):
        raise ConfigError(f"{place}: `prompt` is a string; put a list of messages under `messages`")
    if "messages" in columns and not _is_conversation(columns["messages"]):
        raise ConfigError(
            f'{place}: `messages` is a list of {{"role": ..., "content": ...}}, both strings, '
            "with one at least that is not the assistant's"
        )


def _is_conversation(value: Any) -> bool:
    turns = cast(list[Any], value) if isinstance(value, list) else []
    for turn in turns:
        fields = cast(dict[str, Any], turn) if isinstance(turn, dict) else {}
        if not isinstance(fields.get("role"), str) or not isinstance(fields.get("content"), str):
            return False
    return any(turn["role"] not in ("assistant", "system") for turn in turns)


def _question(row: Row) -> str:
    if "prompt" in row.columns:
        return row.columns["prompt"]
    return next(turn["content"] for turn in reversed(row.columns["messages"]) if turn["role"] != "assistant")


def _generate(
    name: str, size: int, options: Mapping[str, str | int | float | bool], seed: int
) -> Iterator[dict[str, Any]]:
    # Imported here, because it takes seconds and most datasets do not need it.
    factory: Any = importlib.import_module("reasoning_gym.factory")
    tasks: dict[str, Any] = factory.DATASETS
    if name not in tasks:
        near = difflib.get_close_matches(name, tasks, n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"data.dataset: reasoning-gym has no task {name!r}{hint}")
    fields = {each.name for each in dataclasses.fields(tasks[name][1])} - {"seed", "size"}
    for key in options:
        if key not in fields:
            near = ", ".join(difflib.get_close_matches(key, fields, n=3, cutoff=0.4) or sorted(fields))
            raise ConfigError(
                f"data.dataset_kwargs.{key}: {name} takes no such argument; nearest: {near} "
                "(seed and size come from `seed`, data.dataset_size and data.eval_size)"
            )
    try:
        entries: Iterable[dict[str, Any]] = factory.create_dataset(name, size=size, seed=seed, **options)
        # The options are a column, because some tasks score an answer by them.
        for entry in entries:
            yield {"prompt": entry["question"], **entry, "dataset_kwargs": dict(options)}
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(
            f"data.dataset_kwargs: reasoning-gym's {name} refuses {dict(options)}: {error}"
        ) from error


def _prompt_messages(row: Row, system_prompt: str | None) -> tuple[Message, ...]:
    messages: list[Message] = list(
        row.columns["messages"]
        if "messages" in row.columns
        else [{"role": "user", "content": row.columns["prompt"]}]
    )
    if system_prompt is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    return tuple(messages)


def _encode_prompt(row: Row, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    if tokenizer.chat_template is not None:
        return _render(row, messages, tokenizer, add_generation_prompt=True)
    if "messages" in row.columns:
        raise ConfigError(
            f"{row.place}: the row has `messages`, but the tokenizer has no chat template; use a model with "
            "one, or rows with `prompt`"
        )
    if len(messages) > 1:
        raise ConfigError("data.system_prompt: the tokenizer has no chat template to put it in; remove it")
    tokens = tokenizer.encode(row.columns["prompt"])
    # The text may spell out the token that the tokenizer adds.
    doubled = tokens[:2] == [tokenizer.bos_token_id] * 2
    return tokens[1:] if doubled else tokens


def _encode_pair(row: Row, tokenizer: Tokenizer, system_prompt: str | None) -> tuple[list[int], list[int]]:
    """Ids of the prompt, and of the completion with its end-of-sequence token."""
    messages, completion = _prompt_messages(row, system_prompt), row.columns.get("completion")
    if completion is None and messages[-1]["role"] == "assistant":
        messages, completion = messages[:-1], messages[-1]["content"]
    if not isinstance(completion, str) or messages[-1]["role"] == "assistant":
        raise ConfigError(f"{row.place}: a row for sft ends with one `completion` or final assistant message")
    prompt = _encode_prompt(row, messages, tokenizer)
    if tokenizer.chat_template is None:
        tail = tokenizer.encode(completion, add_special_tokens=False)
    else:
        prompt, tail = _split_conversation(row, messages, completion, prompt, tokenizer)
    eos = tokenizer.eos_token_id
    if eos in tail:
        # What a template puts after the end of a turn is never sampled.
        tail = tail[: len(tail) - tail[::-1].index(eos)]
    elif eos is not None:
        tail.append(eos)
    return prompt, tail


def _split_conversation(
    row: Row, messages: Sequence[Message], completion: str, prompt: list[int], tokenizer: Tokenizer
) -> tuple[list[int], list[int]]:
    """The rendered conversation, cut where the assistant's turn departs from the generation prompt.

    A generation prompt may hold more than the header of a finished turn, such as an opened think block.
    """
    turn = {"role": "assistant", "content": completion}
    whole = _render(row, [*messages, turn], tokenizer, add_generation_prompt=False)
    history = _render(row, messages, tokenizer, add_generation_prompt=False)
    pairs = zip(whole, prompt, strict=False)
    same = next((index for index, (left, right) in enumerate(pairs) if left != right), None)
    cut = min(len(whole), len(prompt)) if same is None else same
    if whole[: len(history)] != history or cut < len(history):
        raise ConfigError(
            f"{row.place}: the chat template renders the turns before the answer differently once the answer "
            "is there, so prompt and completion cannot be told apart"
        )
    return whole[:cut], whole[cut:]


def _render(
    row: Row, messages: Sequence[Message], tokenizer: Tokenizer, *, add_generation_prompt: bool
) -> list[int]:
    try:
        tokens: list[int] = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=True,
            return_dict=False,
            add_generation_prompt=add_generation_prompt,
        )
    # Templates are foreign code: jinja's errors and raise_exception come in many types.
    except Exception as error:
        raise ConfigError(f"{row.place}: the chat template refuses the row: {error}") from error
    return tokens

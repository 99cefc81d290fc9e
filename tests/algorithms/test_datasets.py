"""Rows and tokens, against the files' own text and the tokenizer called directly."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reasoning_gym
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from algorithms.datasets import make_prompts, make_sft_samples, read_rows
from configs.data import DataConfig
from configs.errors import ConfigError

WORDS = ["<unk>", "<bos>", "<eos>", "<user>", "<assistant>", "<system>", "<think>", "\n"]
WORDS += ["what", "is", "two", "plus", "three", "?", "five", "six", "be", "brief", "hello"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}> {{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TALK = [{"role": "user", "content": "what is two plus three ?"}]


def tokenizer(template: str | None = None, bos: bool = True) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>"
    )
    fast.add_special_tokens({"additional_special_tokens": WORDS[3:8]})
    fast.chat_template = template
    return fast


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split(" ")]


def write(folder: Path, *rows: Any, name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def prompts_of(
    folder: Path, row: dict[str, Any], template: str | None, **options: Any
) -> tuple[list[int], Any]:
    data = DataConfig(dataset=write(folder, row), **options)
    (prompt,) = make_prompts(read_rows(data, "train"), tokenizer(template), data)
    return prompt.tokens.tolist(), prompt


def test_rows_keep_every_column_and_the_line_number(tmp_path: Path) -> None:
    first, second = {"prompt": "two", "answer": "2"}, {"messages": TALK, "level": 3}
    path = write(tmp_path, first, "", second)
    rows = read_rows(DataConfig(dataset=path), "train")
    assert [(row.id, row.place, row.columns) for row in rows] == [
        ("train-1", f"{path}:1", first),
        ("train-3", f"{path}:3", second),
    ]


def test_eval_rows(tmp_path: Path) -> None:
    path = write(tmp_path, *[{"prompt": str(index)} for index in range(5)])
    assert read_rows(DataConfig(dataset=path), "eval") == []
    rows = read_rows(DataConfig(dataset="none", eval_dataset=path, eval_size=2), "eval")
    assert [row.id for row in rows] == ["eval-1", "eval-2"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{}", "x"], ":1: a row has `prompt` or `messages`, this one has neither"),
        (['{"prompt": "a"}', "{x"], ":2: not valid JSON: Expecting property name"),
        (['{"prompt": "a", "messages": []}'], ":1: a row has `prompt` or `messages`, this one has both"),
        (['{"prompt": ["a"]}'], ":1: `prompt` is a string"),
        (['{"messages": [{"role": "user"}]}'], ":1: `messages` is a list of"),
        (["[1]"], ":1: a row is a JSON object"),
        (["", ""], ": there are no rows in it"),
    ],
)
def test_files_that_are_no_dataset(tmp_path: Path, lines: list[str], message: str) -> None:
    path = write(tmp_path, *lines)
    with pytest.raises(ConfigError) as caught:
        read_rows(DataConfig(dataset=path), "train")
    assert str(caught.value).startswith(f"{path}{message}")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.jsonl: this dataset cannot be read: No such file"):
        read_rows(DataConfig(dataset=str(tmp_path / "none.jsonl")), "train")


def test_generated_rows_are_reasoning_gyms_entries() -> None:
    data = DataConfig(
        dataset="reasoning_gym:chain_sum", dataset_size=4, dataset_kwargs={"max_terms": 3, "min_digits": 2}
    )
    expected = list(reasoning_gym.create_dataset("chain_sum", size=4, seed=9, max_terms=3, min_digits=2))
    rows = read_rows(data, "train", seed=9)
    assert [row.columns["prompt"] for row in rows] == [entry["question"] for entry in expected]
    for row, entry in zip(rows, expected, strict=True):
        assert {key: row.columns[key] for key in entry} == entry
        assert row.columns["dataset_kwargs"] == {"max_terms": 3, "min_digits": 2}
    assert rows == read_rows(data, "train", seed=9)


def test_generated_eval_rows_have_no_training_question() -> None:
    # One-digit sums of two terms: 1000 draws cover most of the 200 questions there are.
    name = "reasoning_gym:chain_sum"
    small: dict[str, str | int | float | bool] = {"max_terms": 2, "max_digits": 1}
    data = DataConfig(
        dataset=name, eval_dataset=name, dataset_size=200, eval_size=10, dataset_kwargs={**small}
    )
    train = {row.columns["question"] for row in read_rows(data, "train")}
    held_out = [row.columns["question"] for row in read_rows(data, "eval")]
    assert read_rows(data.model_copy(update={"eval_dataset": None}), "eval") == read_rows(data, "eval")
    assert len(held_out) == len(set(held_out)) == 10
    assert train.isdisjoint(held_out)
    crowded = data.model_copy(update={"dataset_size": 5000})
    with pytest.raises(
        ConfigError, match="every question that reasoning_gym:chain_sum made is in the training"
    ):
        read_rows(crowded, "eval")


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("chain_sums", {}, "reasoning-gym has no task 'chain_sums'; did you mean chain_sum"),
        (
            "chain_sum",
            {"max_term": 3},
            r"dataset_kwargs.max_term: chain_sum takes no such argument.*max_terms",
        ),
        ("chain_sum", {"seed": 3}, r"dataset_kwargs.seed: .*come from `seed`"),
        ("chain_sum", {"min_terms": 9, "max_terms": 3}, "chain_sum refuses .*max_terms"),
    ],
)
def test_generated_datasets_that_cannot_be(name: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_rows(DataConfig(dataset=f"reasoning_gym:{name}", dataset_kwargs=kwargs), "train")


def test_plain_prompt_without_template_is_encoded_as_it_is(tmp_path: Path) -> None:
    tokens, prompt = prompts_of(tmp_path, {"prompt": "two plus three", "answer": "five"}, None)
    assert tokens == ids("<bos> two plus three") == tokenizer().encode("two plus three")
    assert prompt.id == "train-1"
    assert prompt.messages == ({"role": "user", "content": "two plus three"},)
    assert prompt.columns["answer"] == "five"
    # A text that spells the token out does not get it twice.
    assert prompts_of(tmp_path, {"prompt": "<bos> two plus three"}, None)[0] == tokens


def test_plain_prompt_becomes_one_user_message_of_the_template(tmp_path: Path) -> None:
    tokens, _ = prompts_of(tmp_path, {"prompt": TALK[0]["content"]}, TEMPLATE)
    assert tokens == ids("<bos> <user> what is two plus three ? <eos> \n <assistant>")
    direct = tokenizer(TEMPLATE).apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    assert tokens == direct


def test_messages_and_system_prompt(tmp_path: Path) -> None:
    tokens, prompt = prompts_of(tmp_path, {"messages": TALK}, TEMPLATE, system_prompt="be brief")
    system = [{"role": "system", "content": "be brief"}]
    direct = tokenizer(TEMPLATE).apply_chat_template(
        system + TALK, add_generation_prompt=True, return_dict=False
    )
    assert tokens == direct
    assert list(prompt.messages) == system + TALK
    own = [{"role": "system", "content": "hello"}, *TALK]
    _, prompt = prompts_of(tmp_path, {"messages": own}, TEMPLATE, system_prompt="be brief")
    assert list(prompt.messages) == own


@pytest.mark.parametrize(
    ("row", "template", "options", "message"),
    [
        ({"messages": TALK}, None, {}, ":1: the row has `messages`, but the tokenizer has no chat template"),
        (
            {"prompt": "two"},
            None,
            {"system_prompt": "hello"},
            "data.system_prompt: the tokenizer has no chat",
        ),
        ({"prompt": "two two"}, None, {"max_prompt_length": 2}, ":1: the prompt has 3 tokens, .* allows 2"),
        (
            {"messages": [*TALK, {"role": "assistant", "content": "five"}]},
            TEMPLATE,
            {},
            ":1: the last message is the assistant's",
        ),
        (
            {"prompt": "two"},
            "{{ raise_exception('no roles') }}",
            {},
            ":1: the chat template refuses .*no roles",
        ),
    ],
)
def test_rows_that_make_no_prompt(
    tmp_path: Path, row: dict[str, Any], template: str | None, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        prompts_of(tmp_path, row, template, **options)


def sft(folder: Path, row: dict[str, Any], template: str | None, max_length: int = 64) -> tuple[str, str]:
    """Masked and trained words of the one sample."""
    rows = read_rows(DataConfig(dataset=write(folder, row)), "train")
    (sample,) = make_sft_samples(rows, tokenizer(template), max_length)
    cut = int(np.argmax(sample.loss_mask))
    assert sample.loss_mask.tolist() == [0] * cut + [1] * (sample.tokens.size - cut)
    assert not sample.advantages.any()
    assert not sample.logprobs.any()
    assert sample.advantages.shape == sample.logprobs.shape == sample.tokens.shape
    words = [WORDS[token] for token in sample.tokens]
    return " ".join(words[:cut]), " ".join(words[cut:])


def test_sft_without_template(tmp_path: Path) -> None:
    row = {"prompt": "two plus three", "completion": "five"}
    assert sft(tmp_path, row, None) == ("<bos> two plus three", "five <eos>")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": TALK[0]["content"], "completion": "five"},
        {"messages": TALK, "completion": "five"},
        {"messages": [*TALK, {"role": "assistant", "content": "five"}]},
    ],
)
def test_sft_with_template_trains_on_the_answer_and_its_end(tmp_path: Path, row: dict[str, Any]) -> None:
    expected = ("<bos> <user> what is two plus three ? <eos> \n <assistant>", "five <eos>")
    assert sft(tmp_path, row, TEMPLATE) == expected


def test_sft_trains_on_the_final_turn_only(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "five"}
    row = {"messages": [*TALK, {"role": "assistant", "content": "six"}, *TALK, answer]}
    before, trained = sft(tmp_path, row, TEMPLATE)
    assert trained == "five <eos>"
    assert before.count("<assistant>") == 2
    assert before.endswith("<assistant>")


def test_sft_when_the_generation_prompt_opens_a_think_block(tmp_path: Path) -> None:
    template = TEMPLATE.replace("%}<assistant>{%", "%}<assistant><think>{%")
    _, trained = sft(tmp_path, {"prompt": "two", "completion": "five"}, template)
    assert trained == "five <eos>"


def test_sft_adds_the_end_when_the_template_has_none(tmp_path: Path) -> None:
    template = TEMPLATE.replace("{{ eos_token }}", "")
    assert sft(tmp_path, {"prompt": "two", "completion": "five"}, template)[1] == "five \n <eos>"


@pytest.mark.parametrize(
    ("row", "template", "max_length", "message"),
    [
        ({"prompt": "two"}, None, 64, ":1: a row for sft ends with one `completion` or final assistant"),
        (
            {"prompt": "two", "completion": "five"},
            None,
            3,
            ":1: the sample has 4 tokens, sft.max_length allows 3",
        ),
        (
            {"prompt": "two", "completion": "five"},
            "{{ '<think>' if messages | length > 1 }}" + TEMPLATE,
            64,
            ":1: the chat template renders the turns before",
        ),
    ],
)
def test_rows_that_make_no_sample(
    tmp_path: Path, row: dict[str, Any], template: str | None, max_length: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        sft(tmp_path, row, template, max_length)

"""Prompts, samples and masks, against the tokenizer called directly and transformers' own masks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from algorithms.conversations import Samples, make_prompts, make_sft_samples
from algorithms.datasets import read_rows
from configs.data import DataConfig
from configs.errors import ConfigError
from configs.sft import SFTConfig

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
    data = DataConfig(dataset=(write(folder, row),), **options)
    (prompt,) = make_prompts(read_rows(data, "train"), tokenizer(template), data)
    return prompt.tokens.tolist(), prompt


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
        ({"messages": TALK}, None, {}, ":1: the row has messages, but the tokenizer has no chat template"),
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


def samples_of(folder: Path, rows: list[dict[str, Any]], template: str | None, **options: Any) -> Samples:
    of_data = {name: options.pop(name) for name in ("loss_on", "system_prompt") if name in options}
    data = DataConfig(dataset=(write(folder, *rows),), **of_data)
    settings = SFTConfig.model_validate({"max_length": 64, **options})
    return make_sft_samples(read_rows(data, "train"), tokenizer(template), settings, data)


def masked(folder: Path, row: dict[str, Any], template: str | None, **options: Any) -> str:
    """All words of the one sample, what is trained on in capitals."""
    (sample,) = samples_of(folder, [row], template, **options).kept
    assert not sample.advantages.any()
    assert not sample.logprobs.any()
    assert sample.advantages.shape == sample.logprobs.shape == sample.tokens.shape
    words = zip(sample.tokens, sample.loss_mask, strict=True)
    return " ".join(WORDS[token].upper() if trained else WORDS[token] for token, trained in words)


def sft(folder: Path, row: dict[str, Any], template: str | None, **options: Any) -> tuple[str, str]:
    """Words of the one sample before and after the one place where the mask goes from 0 to 1."""
    (sample,) = samples_of(folder, [row], template, **options).kept
    cut = int(np.argmax(sample.loss_mask))
    assert sample.loss_mask.tolist() == [0] * cut + [1] * (sample.tokens.size - cut)
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


def test_sft_trains_on_the_final_turn_only_where_asked(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "five"}
    row = {"messages": [*TALK, {"role": "assistant", "content": "six"}, *TALK, answer]}
    before, trained = sft(tmp_path, row, TEMPLATE, loss_on="last_assistant")
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
        (
            {"prompt": "two"},
            None,
            64,
            ":1: a row for sft ends with what the assistant says: in `messages`, or in",
        ),
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
        sft(tmp_path, row, template, max_length=max_length)


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CHAT = [
    said("user", "hello"),
    said("assistant", "six"),
    said("user", "be brief"),
    said("assistant", "five"),
]
MARKED = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}> {% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{{ eos_token }}{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
# As Qwen3's: earlier answers lose something once another turn is there.
UNSTABLE = TEMPLATE.replace(
    "{{ m.content }}", "{{ '<think>' if loop.last and m.role == 'assistant' }} {{ m.content }}"
)


@pytest.mark.parametrize("template", [TEMPLATE, MARKED])
def test_all_assistant_turns_are_trained_on_and_nothing_else(tmp_path: Path, template: str) -> None:
    whole = (
        "<bos> <user> hello <eos> \n <assistant> SIX <EOS> \n <user> be brief <eos> \n <assistant> FIVE <EOS>"
    )
    assert masked(tmp_path, {"messages": CHAT}, template) == whole
    # What the user says last has no part in it.
    assert masked(tmp_path, {"messages": [*CHAT, said("user", "hello")]}, template) == whole
    last = whole.replace("SIX <EOS>", "six <eos>")
    assert masked(tmp_path, {"messages": CHAT}, template, loss_on="last_assistant") == last
    # An answer in a column of its own makes the turns before it part of the prompt.
    assert masked(tmp_path, {"prompt": CHAT[:3], "completion": CHAT[3:]}, template) == last
    assert masked(tmp_path, {"messages": CHAT[:3], "completion": "five"}, template) == last
    assert masked(tmp_path, {"prompt": CHAT[:1], "completion": CHAT[1:]}, template) == whole


def test_the_mask_of_a_marked_template_is_transformers_own(tmp_path: Path) -> None:
    (sample,) = samples_of(tmp_path, [{"messages": CHAT}], MARKED).kept
    found = tokenizer(MARKED).apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    size = sample.tokens.size
    assert sample.tokens.tolist() == found["input_ids"][:size]
    assert sample.loss_mask.tolist() == found["assistant_masks"][:size]
    assert not any(found["assistant_masks"][size:])
    nothing = MARKED.replace("== 'assistant'", "== 'model'")
    with pytest.raises(ConfigError, match=r":1: the chat template marks nothing of it with {% generation %}"):
        samples_of(tmp_path, [{"messages": CHAT}], nothing)


def test_a_template_that_is_not_stable_names_the_row_and_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"rows\.jsonl:2: the chat template renders the turns before message 3"
    ):
        samples_of(tmp_path, [{"messages": CHAT[:2]}, {"messages": CHAT}], UNSTABLE)
    with pytest.raises(ConfigError, match=r"set data\.loss_on to last_assistant"):
        samples_of(tmp_path, [{"messages": CHAT}], UNSTABLE)
    trained = sft(tmp_path, {"messages": CHAT}, UNSTABLE, loss_on="last_assistant")[1]
    assert trained == "<think> five <eos>"


def test_alpaca_rows(tmp_path: Path) -> None:
    row = {"instruction": "what is", "input": "two plus three ?", "output": "five", "system": "be brief"}
    assert masked(tmp_path, row, TEMPLATE) == (
        "<bos> <system> be brief <eos> \n <user> what is \n two plus three ? <eos> \n <assistant> FIVE <EOS>"
    )
    plain = {"instruction": "what is two", "input": "", "output": "five"}
    assert masked(tmp_path, plain, None) == "<bos> what is two FIVE <EOS>"
    with pytest.raises(ConfigError, match=":1: `system`: the tokenizer has no chat template to put it in"):
        samples_of(tmp_path, [row], None)


def test_long_rows_lose_their_end_or_are_left_out(tmp_path: Path) -> None:
    long = {"prompt": "two plus", "completion": "three five six"}
    late = {"prompt": "what is two plus three", "completion": "five"}
    rows = [long, {"prompt": "two", "completion": "five"}, late]
    cut = samples_of(tmp_path, rows, None, max_length=5, truncation="truncate")
    assert [sample.tokens.tolist() for sample in cut.kept] == [
        ids("<bos> two plus three five"),
        ids("<bos> two five <eos>"),
    ]
    assert [sample.loss_mask.tolist() for sample in cut.kept] == [[0, 0, 0, 1, 1], [0, 0, 1, 1]]
    assert cut.describe() == "2 samples, 1 truncated, 1 dropped"
    left = samples_of(tmp_path, rows, None, max_length=5, truncation="drop")
    assert (len(left.kept), left.truncated, left.dropped) == (1, 0, 2)
    with pytest.raises(ConfigError, match=r"sft\.max_length: with 2 tokens sft\.truncation drop leaves none"):
        samples_of(tmp_path, rows, None, max_length=2, truncation="drop")

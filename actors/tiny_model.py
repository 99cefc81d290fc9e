"""A tiny random model with a tokenizer of its own, and the files of the task it learns."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from algorithms.arithmetic import make_splits

END = "<|end|>"
PAD = "<|pad|>"
ROLES = ("system", "user", "assistant")
MAX_LENGTH = 128
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tiny_model(output_dir: Path, *, seed: int) -> Path:
    """Write a random qwen3 of a million parameters with its tokenizer to `output_dir`, and return it.

    float32 safetensors, 4 layers, 4 heads in 2 groups: tensor parallel 2 and pipeline parallel 2 both fit.
    The same seed gives the same bytes. Files of an earlier call are replaced.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    vocabulary = tokenizer.get_vocab()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=vocabulary[END],
        pad_token_id=vocabulary[PAD],
    )
    save_random(lambda: Qwen3ForCausalLM(config), tokenizer, output_dir, seed)
    return output_dir


def save_random(
    make: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerFast, output_dir: Path, seed: int
) -> None:
    """Write what `make` makes with random numbers of the seed, in float32, and the tokenizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make().float()
    vocabulary = tokenizer.get_vocab()
    model.generation_config = GenerationConfig(eos_token_id=vocabulary[END], pad_token_id=vocabulary[PAD])
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def write_arithmetic(
    output_dir: Path,
    seed: int,
    *,
    warm_up: int = 60,
    train: int = 6400,
    held_out: int = 300,
    digits: int = 5,
) -> Path:
    """Write sft.jsonl, train.jsonl and eval.jsonl to `output_dir`, with as many rows as given; return it.

    Rows are {"prompt", "answer"}, in sft.jsonl {"prompt", "completion"}. No digits of eval.jsonl occur in the
    other two, in whatever order. Raises ConfigError when there are not that many problems.
    """
    output_dir = Path(output_dir)
    splits = make_splits(seed=seed, warm_up=warm_up, train=train, held_out=held_out, digits=digits)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_rows(
        output_dir / "sft.jsonl", ({"prompt": p.prompt, "completion": p.answer} for p in splits.warm_up)
    )
    write_rows(output_dir / "train.jsonl", ({"prompt": p.prompt, "answer": p.answer} for p in splits.train))
    write_rows(output_dir / "eval.jsonl", ({"prompt": p.prompt, "answer": p.answer} for p in splits.held_out))
    return output_dir


def train_tokenizer(more: Sequence[str] = (), chat_template: str = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text can be encoded, each digit is one token, `range` is one token.

    `more` are further special tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, END, *(f"<|{role}|>" for role in ROLES), *more]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
    )
    corpus = [problem.prompt for problem in make_splits(seed=0).warm_up]
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        model_max_length=MAX_LENGTH,
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

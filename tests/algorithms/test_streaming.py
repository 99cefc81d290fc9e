"""Streamed samples, against those of all rows read at once and a shuffle buffer written down here."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from algorithms.conversations import make_sft_samples
from algorithms.data import TrainSample
from algorithms.datasets import read_rows
from algorithms.streaming import SampleStream, open_stream
from configs.errors import BasculeError, ConfigError
from configs.schema import RunConfig


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<unk>": 0, "<eos>": 1, **{str(number): number + 2 for number in range(60)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>")


def write(path: Path, numbers: range, *more: str) -> str:
    rows = [json.dumps({"prompt": "0", "completion": " ".join(["7"] * (n % 3) + [str(n)])}) for n in numbers]
    path.write_text("\n".join([*rows, *more]) + "\n")
    return str(path)


def config(*datasets: str, sft: dict[str, Any] | None = None, **data: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "algorithm": "sft",
            "max_steps": 5,
            "model": {"model": "m"},
            "data": {"dataset": datasets, "streaming": True, "shuffle_buffer_size": 4, **data},
            "sft": {"batch_size": 2, **(sft or {})},
        }
    )


def names(samples: list[TrainSample]) -> list[int]:
    """The number that each row ends with."""
    return [int(sample.tokens[-2]) - 2 for sample in samples]


def test_samples_are_those_of_all_rows_at_once(tmp_path: Path) -> None:
    one = config(
        write(tmp_path / "a.jsonl", range(11)), shuffle=False, sft={"max_length": 4, "truncation": "truncate"}
    )
    whole = make_sft_samples(read_rows(one.data, "train"), tokenizer(), one.sft, one.data)
    stream = SampleStream(one, tokenizer())
    for found, expected in zip(stream.take(11), whole.kept, strict=True):
        assert found.tokens.tolist() == expected.tokens.tolist()
        assert found.loss_mask.tolist() == expected.loss_mask.tolist()
    assert stream.describe() == whole.describe() == "11 samples, 3 truncated"


def test_order_is_that_of_a_buffer_from_which_one_is_drawn_and_each_pass_has_another(tmp_path: Path) -> None:
    one = config(write(tmp_path / "a.jsonl", range(9)))
    found = names(SampleStream(one, tokenizer()).take(18))
    expected: list[int] = []
    for epoch in range(2):
        random, waiting, buffer = np.random.default_rng((42, epoch)), list(range(9)), []
        for _ in range(9):
            while waiting and len(buffer) < 4:
                buffer.append(waiting.pop(0))
            place = random.integers(len(buffer))
            expected.append(buffer[place])
            buffer[place] = buffer[-1]
            buffer.pop()
    assert found == expected
    assert sorted(found[:9]) == sorted(found[9:]) == list(range(9))
    assert found[:9] != found[9:]


def test_datasets_take_turns_until_all_are_read(tmp_path: Path) -> None:
    paths = write(tmp_path / "a.jsonl", range(5)), write(tmp_path / "b.jsonl", range(20, 22))
    found = names(SampleStream(config(*paths, shuffle=False), tokenizer()).take(9))
    assert found == [0, 20, 1, 21, 2, 3, 4, 0, 20]


@pytest.mark.parametrize("before", [0, 3, 11, 20])
def test_a_restored_stream_goes_on_with_the_same_samples_and_knows_the_data(
    tmp_path: Path, before: int
) -> None:
    # Every third row is left out, so that rows drawn and samples made are not the same number.
    path = write(tmp_path / "a.jsonl", range(15))
    one = config(path, sft={"max_length": 3, "truncation": "drop"})
    first = SampleStream(one, tokenizer())
    first.take(before)
    state, digest = first.state(), first.digest()
    again = SampleStream(one, tokenizer())
    again.restore(state)
    assert again.digest() == digest
    assert names(again.take(13)) == names(first.take(13))
    write(tmp_path / "a.jsonl", range(1, 16))
    other = SampleStream(one, tokenizer())
    other.restore(state)
    assert (other.digest() == digest) == (before == 0)
    write(tmp_path / "a.jsonl", range(1))
    if state["offset"] > 1:
        with pytest.raises(BasculeError, match=r"row \d+ of a pass, but the data have 1 rows"):
            SampleStream(one, tokenizer()).restore(state)


def test_nothing_but_the_buffer_and_the_next_rows_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", range(6), "{broken")
    stream = open_stream(config(path, shuffle_buffer_size=2), tokenizer())
    assert len(stream.take(4)) == 4
    with pytest.raises(ConfigError, match=r"a\.jsonl:7: not valid JSON"):
        stream.take(2)


def test_what_cannot_be_streamed_is_refused(tmp_path: Path) -> None:
    path, words = write(tmp_path / "a.jsonl", range(6)), tokenizer()
    with pytest.raises(ConfigError, match=r"a\.jsonl:1: the sample has 3 tokens, sft.max_length allows 2"):
        open_stream(config(path, sft={"max_length": 2}, shuffle=False), words)
    with pytest.raises(
        ConfigError, match=r"leaves none of the 6 rows, the first of which is .*a\.jsonl:1; raise"
    ):
        open_stream(config(path, sft={"max_length": 2, "truncation": "drop"}, shuffle=False), words)
    with pytest.raises(ConfigError, match=r"a\.jsonl#3 draws among all rows .* give .*a\.jsonl$"):
        open_stream(config(f"{path}#3"), words)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"empty\.jsonl: there are no rows in it"):
        open_stream(config(path, str(tmp_path / "empty.jsonl")), words)
    with pytest.raises(ValueError, match=r"split_dataset_ratio: needs all rows"):
        config(path, split_dataset_ratio=0.1)
    with pytest.raises(ValueError, match=r"num_train_epochs: how many steps these are is unknown"):
        config(path, sft={"num_train_epochs": 2})

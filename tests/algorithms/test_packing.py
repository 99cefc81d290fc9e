from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from algorithms.data import MicroBatch, TrainSample, float_row, int_row
from algorithms.packing import Scaling, pack, unpack
from configs.errors import BasculeError
from configs.schema import TrainerConfig


def sample(length: int, first: int, prompt: int = 1) -> TrainSample:
    tokens = np.arange(first, first + length)
    mask = np.arange(length) >= prompt
    return TrainSample(
        tokens=int_row(tokens),
        loss_mask=int_row(mask),
        advantages=float_row(tokens / 10 * mask),
        logprobs=float_row(-tokens * mask),
        version=0,
    )


def trainer(**settings: object) -> TrainerConfig:
    return TrainerConfig.model_validate(settings)


SAMPLES = [sample(3, 100), sample(7, 200, prompt=4), sample(2, 300), sample(5, 400), sample(4, 500)]


def sequences(micro: MicroBatch) -> list[slice]:
    return [slice(start, stop) for start, stop in zip(micro.starts_S, micro.starts_S[1:], strict=False)]


def test_every_token_is_predicted_once_with_what_belongs_to_it() -> None:
    batch = pack(SAMPLES, trainer(data_parallel_size=2, micro_batch_size=2, tensor_model_parallel_size=4))
    seen: dict[int, tuple[int, float, float]] = {}
    for micro in (micro for rank in batch.ranks for micro in rank):
        for part in sequences(micro):
            for position in range(part.start, part.stop - 1):
                label = int(micro.labels_T[position])
                if micro.loss_mask_T[position]:
                    assert label == micro.tokens_T[position + 1]
                    assert label not in seen
                    seen[label] = (
                        int(micro.tokens_T[position]),
                        float(micro.advantages_T[position]),
                        float(micro.logprobs_T[position]),
                    )
            assert micro.loss_mask_T[part.stop - 1] == 0
            np.testing.assert_array_equal(micro.positions_T[part], np.arange(part.stop - part.start))
    expected = {
        int(token): (int(token) - 1, pytest.approx(token / 10), -float(token))
        for each in SAMPLES
        for token, used in zip(each.tokens, each.loss_mask, strict=True)
        if used
    }
    assert seen == expected
    assert batch.num_loss_tokens == len(expected) == 2 + 3 + 1 + 4 + 3


def test_rows_have_one_length_that_is_a_multiple_and_ranks_have_as_many() -> None:
    batch = pack(SAMPLES, trainer(data_parallel_size=2, micro_batch_size=2, tensor_model_parallel_size=4))
    assert [len(rank) for rank in batch.ranks] == [2, 2]
    lengths = {micro.tokens_T.size for rank in batch.ranks for micro in rank}
    assert len(lengths) == 1
    assert lengths.pop() % 4 == 0
    for micro in (micro for rank in batch.ranks for micro in rank):
        assert micro.starts_S[0] == 0
        assert micro.starts_S[-1] == micro.tokens_T.size


def test_a_rank_without_samples_gets_a_row_of_padding() -> None:
    batch = pack([replace(sample(3, 10), ref_logprobs=float_row([0, 1, 2]))], trainer(data_parallel_size=2))
    first, second = batch.ranks[0][0], batch.ranks[1][0]
    assert first.tokens_T.size == second.tokens_T.size == 3
    assert first.loss_mask_T.sum() == 2
    assert second.loss_mask_T.sum() == 0
    assert second.weights_T is not None
    assert second.weights_T.sum() == 0
    # The names of metrics depend on what there is, and all micro-batches must have the same.
    assert second.ref_logprobs_T is not None


def test_rows_are_read_only() -> None:
    micro = pack(SAMPLES, trainer()).ranks[0][0]
    with pytest.raises(ValueError, match="read-only"):
        micro.tokens_T[0] = 1


LAYOUTS = [
    {},
    {"micro_batch_size": 1, "data_parallel_size": 2},
    {"micro_batch_tokens": 9, "data_parallel_size": 2, "tensor_model_parallel_size": 4},
    {"packing": False, "micro_batch_size": 2},
    {"packing": False, "micro_batch_tokens": 14},
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_predictions_come_back_as_rows_of_samples(layout: dict[str, object]) -> None:
    batch = pack(SAMPLES, trainer(**layout))
    # What predicts a token is made from the token, so that its place can be checked.
    rows = tuple(tuple(float_row(micro.labels_T * 2) for micro in micros) for micros in batch.ranks)
    for each, row in zip(SAMPLES, unpack(batch, rows), strict=True):
        np.testing.assert_array_equal(row, [0, *(each.tokens[1:] * 2)])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per", ["token", "sequence"])
def test_weights_do_not_depend_on_how_samples_are_packed(layout: dict[str, object], per: Any) -> None:
    batch = pack(SAMPLES, trainer(**layout), Scaling(per=per, denominator=3.5))
    assert batch.denominator == 3.5
    found: dict[int, float] = {}
    for micro in (micro for rank in batch.ranks for micro in rank):
        assert micro.weights_T is not None
        assert np.all(micro.weights_T[micro.loss_mask_T == 0] == 0)
        for label, weight in zip(micro.labels_T, micro.weights_T, strict=True):
            if weight:
                found[int(label)] = float(weight)
    assert found == {
        int(token): pytest.approx(1.0 if per == "token" else 1 / each.loss_mask.sum())
        for each in SAMPLES
        for token, used in zip(each.tokens, each.loss_mask, strict=True)
        if used
    }


def test_a_token_budget_is_kept_with_as_few_rows_as_it_allows() -> None:
    batch = pack(SAMPLES, trainer(micro_batch_tokens=11))
    sizes = [micro.tokens_T.size for micro in batch.ranks[0]]
    assert len(sizes) == 2
    assert max(sizes) <= 11
    with pytest.raises(BasculeError, match="a sample has 7 tokens, more than 6"):
        pack(SAMPLES, trainer(micro_batch_tokens=6))


def test_without_packing_each_sequence_is_padded_to_the_longest() -> None:
    batch = pack(SAMPLES, trainer(packing=False, micro_batch_size=2))
    assert len(batch.ranks[0]) == 3
    for micro in batch.ranks[0]:
        starts = [int(s) for s, n in zip(micro.starts_S[:-1], micro.samples_S, strict=True) if n >= 0]
        assert starts == [7 * place for place in range(len(starts))]
        assert micro.tokens_T.size == 14


@pytest.mark.parametrize(
    ("samples", "words"), [([], "no sample to train on"), ([sample(3, 1, prompt=3)], "token to train on")]
)
def test_nothing_to_pack_is_an_error(samples: list[TrainSample], words: str) -> None:
    with pytest.raises(BasculeError, match=words):
        pack(samples, trainer())

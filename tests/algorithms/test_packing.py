import numpy as np
import pytest

from algorithms.data import MicroBatch, TrainSample, float_row, int_row
from algorithms.packing import pack, with_logprobs


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


SAMPLES = [sample(3, 100), sample(7, 200, prompt=4), sample(2, 300), sample(5, 400), sample(4, 500)]


def sequences(micro: MicroBatch) -> list[slice]:
    return [slice(start, stop) for start, stop in zip(micro.starts_S, micro.starts_S[1:], strict=False)]


def test_every_token_is_predicted_once_with_what_belongs_to_it() -> None:
    batch = pack(SAMPLES, num_ranks=2, micro_batch_size=2, multiple=4)
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
    batch = pack(SAMPLES, num_ranks=2, micro_batch_size=2, multiple=4)
    assert [len(rank) for rank in batch.ranks] == [2, 2]
    lengths = {micro.tokens_T.size for rank in batch.ranks for micro in rank}
    assert len(lengths) == 1
    assert lengths.pop() % 4 == 0
    for micro in (micro for rank in batch.ranks for micro in rank):
        assert micro.starts_S[0] == 0
        assert micro.starts_S[-1] == micro.tokens_T.size


def test_a_rank_without_samples_gets_a_row_of_padding() -> None:
    batch = pack([sample(3, 10)], num_ranks=2, micro_batch_size=8, multiple=1)
    first, second = batch.ranks[0][0], batch.ranks[1][0]
    assert first.tokens_T.size == second.tokens_T.size == 3
    assert first.loss_mask_T.sum() == 2
    assert second.loss_mask_T.sum() == 0


def test_rows_are_read_only() -> None:
    micro = pack(SAMPLES, num_ranks=1, micro_batch_size=8, multiple=1).ranks[0][0]
    with pytest.raises(ValueError, match="read-only"):
        micro.tokens_T[0] = 1


def test_logprobs_are_attached_by_rank_and_row() -> None:
    batch = pack(SAMPLES, num_ranks=2, micro_batch_size=2, multiple=4)
    rows = tuple(
        tuple(float_row(np.full(micro.tokens_T.size, 10 * rank + row)) for row, micro in enumerate(micros))
        for rank, micros in enumerate(batch.ranks)
    )
    filled = with_logprobs(batch, old=rows)
    old = filled.ranks[1][0].old_logprobs_T
    assert old is not None
    assert old[0] == 10
    assert filled.ranks[1][0].ref_logprobs_T is None
    assert (
        with_logprobs(filled, reference=rows).ranks[0][1].old_logprobs_T is filled.ranks[0][1].old_logprobs_T
    )


@pytest.mark.parametrize(
    ("samples", "words"), [([], "at least one sample"), ([sample(3, 1, prompt=3)], "token to train on")]
)
def test_nothing_to_pack_is_an_error(samples: list[TrainSample], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pack(samples, num_ranks=1, micro_batch_size=1, multiple=1)

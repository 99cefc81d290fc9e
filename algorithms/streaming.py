"""Samples of rows that are read and turned into tokens as they are needed: of data that do not fit into memory."""

import hashlib
from collections.abc import Mapping

import numpy as np

from algorithms.conversations import Tokenizer, describe_counts, make_sft_sample, nothing_left
from algorithms.data import TrainSample
from algorithms.datasets import stream_rows
from algorithms.prompts import OtherDataError
from algorithms.rows import Row, content_of
from algorithms.vision import Eye
from configs.schema import RunConfig


class SampleStream:
    """Draws samples pass after pass over the data; no row comes twice in one pass.

    A row is drawn among `data.shuffle_buffer_size` that are held in memory, and the next one takes its place;
    without `data.shuffle` rows come as they are read. The order depends on seed and number of the pass, so that
    the number of rows drawn of it is the whole state: rows before it are read again, but not turned into tokens.
    """

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, eye: Eye | None = None) -> None:
        """Raises ConfigError for a dataset that cannot be streamed. Rows with pictures need an `eye`."""
        self._config, self._tokenizer, self._eye = config, tokenizer, eye
        self._size = config.data.shuffle_buffer_size if config.data.shuffle else 1
        self._made = self._truncated = self._dropped = 0
        self._begin(0)

    def take(self, n: int) -> list[TrainSample]:
        """The next `n` samples; a draw goes on into the next pass where one ends.

        Raises ConfigError naming a row of which no sample can be made, and when a whole pass has none.
        """
        taken: list[TrainSample] = []
        while len(taken) < n:
            row = self._draw()
            if row is None:
                self._next_pass()
                continue
            self._first = self._first or row.place
            sample, too_long = make_sft_sample(
                row, self._tokenizer, self._config.sft, self._config.data, self._eye
            )
            if sample is None:
                self._dropped += 1
                continue
            self._truncated += too_long
            self._made += 1
            self._is_fruitful = True
            taken.append(sample)
        return taken

    def describe(self) -> str:
        """How many samples were made, and what happened to long rows, since this object was."""
        return describe_counts(self._made, self._truncated, self._dropped)

    def digest(self) -> str:
        """Of the rows of this pass that were read."""
        return self._digest.hexdigest()

    def state(self) -> dict[str, int]:
        """`epoch` and `offset` (rows drawn in it) of the next draw."""
        return {"epoch": self._epoch, "offset": self._offset}

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on after the draw at which `state` was taken, given the same data, seed, shuffle and buffer.

        Raises OtherDataError when there are fewer rows than were drawn.
        """
        self._begin(state["epoch"])
        # Some draw before may have given a sample; that none does would have been found then.
        self._is_fruitful = state["offset"] > 0
        for drawn in range(state["offset"]):
            if self._draw() is None:
                raise OtherDataError(
                    f"the saved position is row {state['offset']} of a pass, but the data have {drawn} rows; "
                    "resume with the data that the run was started with"
                )

    def _begin(self, epoch: int) -> None:
        self._epoch, self._offset = epoch, 0
        self._rows = stream_rows(self._config.data, self._config.seed)
        self._random = np.random.default_rng((self._config.seed, epoch))
        self._buffer: list[Row] = []
        self._digest = hashlib.sha256()
        self._first, self._is_fruitful = "", False

    def _next_pass(self) -> None:
        if not self._is_fruitful:
            raise nothing_left(self._config.sft, self._offset, self._first)
        self._begin(self._epoch + 1)

    def _draw(self) -> Row | None:
        """The next row of this pass, None at its end."""
        while len(self._buffer) < self._size and (row := self._read()) is not None:
            self._buffer.append(row)
        if not self._buffer:
            return None
        place = int(self._random.integers(len(self._buffer)))
        # The last one takes its place, which is cheaper than to move those behind it.
        self._buffer[place], self._buffer[-1] = self._buffer[-1], self._buffer[place]
        self._offset += 1
        return self._buffer.pop()

    def _read(self) -> Row | None:
        row = next(self._rows, None)
        if row is not None:
            self._digest.update(content_of(row).encode())
        return row


def open_stream(config: RunConfig, tokenizer: Tokenizer, eye: Eye | None = None) -> SampleStream:
    """The samples of a run, of which those of the first step have been tried. Raises ConfigError."""
    SampleStream(config, tokenizer, eye).take(config.sft.batch_size)
    return SampleStream(config, tokenizer, eye)

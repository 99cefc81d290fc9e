"""Which engine takes the next prompt. Knows nothing of engines."""

from collections.abc import Collection

from configs.errors import ConfigError


class Room:
    """Sequences that each of `num_engines` engines is decoding, at most `capacity` at a time."""

    def __init__(self, num_engines: int, capacity: int) -> None:
        self._capacity = capacity
        self._in_flight = [0] * num_engines

    @property
    def in_flight(self) -> tuple[int, ...]:
        """Sequences per engine."""
        return tuple(self._in_flight)

    def take(self, n: int, engines: Collection[int] | None = None) -> int | None:
        """The engine that now has `n` sequences more: the one with most room, or None while all are full.

        With `engines` it is one of those.

        Raises ConfigError when `n` would not even fit into an idle engine.
        """
        if n > self._capacity:
            raise ConfigError(
                f"rollout.max_num_seqs: {n} completions of one prompt do not fit into an engine's "
                f"{self._capacity}"
            )
        able = range(len(self._in_flight)) if engines is None else sorted(engines)
        engine = min(able, key=self._in_flight.__getitem__, default=None)
        if engine is None or self._in_flight[engine] + n > self._capacity:
            return None
        self._in_flight[engine] += n
        return engine

    def give_back(self, engine: int, n: int) -> None:
        """The engine has finished `n` sequences."""
        assert self._in_flight[engine] >= n
        self._in_flight[engine] -= n

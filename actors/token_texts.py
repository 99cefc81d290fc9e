"""The text of each token, for people to look at."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

# A character is at most four bytes, so at most four tokens of one byte each.
_LONGEST = 4
_CUT = "\ufffd"


class TokenTexts:
    """Texts of the tokens of one model directory. Its tokenizer is loaded when the first text is asked for."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @cached_property
    def _tokenizer(self) -> Any:
        from actors.model_source import load_tokenizer

        return load_tokenizer(self._directory)

    def __call__(self, ids: Sequence[int]) -> list[str]:
        """See token_texts."""
        tokenizer = self._tokenizer
        return token_texts(
            ids,
            lambda part: tokenizer.decode(
                part, skip_special_tokens=False, clean_up_tokenization_spaces=False
            ),
        )


def token_texts(ids: Sequence[int], decode: Callable[[list[int]], str]) -> list[str]:
    """One text for each token; all of them joined are the text of the whole.

    A character that several tokens share is in the last of them, and the others are empty. Each is decoded after
    the one before it, since some tokenizers drop a space at the beginning.
    """
    texts: list[str] = []
    before: list[int] = []
    pending: list[int] = []
    for token in ids:
        pending.append(token)
        text = decode([*before, *pending])[len(decode(before)) if before else 0 :]
        if text.endswith(_CUT) and len(pending) < _LONGEST:
            texts.append("")
            continue
        texts.append(text)
        before, pending = pending, []
    if pending:
        texts[-1] = decode([*before, *pending])[len(decode(before)) if before else 0 :]
    return texts

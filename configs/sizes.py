"""Sizes as a user writes them."""

import re
from typing import Annotated

from pydantic import AfterValidator

_UNITS = {"": 1, "B": 1} | {
    name: base**power
    for power, letter in enumerate("KMGT", start=1)
    for name, base in ((letter + "B", 1000), (letter + "IB", 1024))
}


def parse_size(text: str) -> int:
    """Bytes of a size such as `5GB` (decimal, as in Hugging Face's libraries), `512MiB` or `1000000`.

    Raises ValueError for anything else, and for a size below one byte.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"{text!r} is no size; write a number and a unit, such as 5GB, 500MB or 512MiB")
    size = int(float(match[1]) * _UNITS[match[2].upper()])
    if size < 1:
        raise ValueError(f"{text!r} is no size above zero")
    return size


def _checked(text: str) -> str:
    parse_size(text)
    return text


ShardSize = Annotated[str, AfterValidator(_checked)]
"""The largest file of a checkpoint as text that parse_size takes, so that a dump says what the user wrote."""

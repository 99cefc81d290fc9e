"""Sizes and durations as a user writes them."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

_UNITS = {"": 1, "B": 1} | {
    name: base**power
    for power, letter in enumerate("KMGT", start=1)
    for name, base in ((letter + "B", 1000), (letter + "IB", 1024))
}

_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


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


def parse_duration(value: Any) -> float | None:
    """Seconds of a duration such as `4h`, `90m`, `1h30m`, `45s` or `3600`; None stays None.

    Raises ValueError for anything else, and for none above zero.
    """
    if value is None:
        return None
    text = str(value).strip().lower()
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text or seconds <= 0:
        raise ValueError(f"{value!r} is no duration; write 4h, 90m, 1h30m or a number of seconds")
    return seconds


Duration = Annotated[float, BeforeValidator(parse_duration)]
"""Seconds, given as a number or as text that parse_duration takes."""

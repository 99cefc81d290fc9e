"""What is shown of a message's content. Nothing heavy here: `bascule view` starts without numpy."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

TAG, VIDEO_TAG = "<image>", "<video>"
"""Where a text has a picture of the row's `images`, or of its `videos`."""

# How PNG, JPEG, GIF and WebP begin in base64: rows may hold that without saying so.
ENCODED = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")
_SHORT = 64


def text_of(content: Any) -> str:
    """What a content says, with a tag where it has a picture."""
    if isinstance(content, str):
        return content
    entries = cast(Sequence[Mapping[str, Any]], content or ())
    return "".join(map(_said, entries))


def without_files(value: Any) -> Any:
    """The same with what is in a picture's file told by its size: what is recorded is to be read."""
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, str):
        is_file = len(value) > _SHORT and value.startswith(("data:image", *ENCODED))
        return f"{value[:_SHORT]}... ({len(value)} characters)" if is_file else value
    if isinstance(value, Mapping):
        return {name: without_files(each) for name, each in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return [without_files(each) for each in cast(Sequence[Any], value)]
    return value


def _said(entry: Mapping[str, Any]) -> str:
    kind = str(entry.get("type"))
    return str(entry.get("text", "")) if kind == "text" else VIDEO_TAG if kind.startswith("video") else TAG

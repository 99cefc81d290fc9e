"""What messages hold: a text, or a list of texts and pictures."""

import base64
import binascii
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from configs.errors import ConfigError

if TYPE_CHECKING:
    # `bascule view` starts without numpy.
    from algorithms.data import Message
    from algorithms.rows import Row

Source = str | bytes
"""A picture's path, or what is in its file."""

TAG = "<image>"
"""Where a text has a picture of the row's `images`."""

# How PNG, JPEG, GIF and WebP begin in base64: rows may hold that without saying so.
_ENCODED = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")
_SHORT = 64


def split_pictures(row: "Row", messages: "Sequence[Message]") -> "tuple[list[Message], list[Source]]":
    """The messages with `{"type": "image"}` in place of each picture, and the pictures in order.

    Raises ConfigError naming the row for an entry that is no text and no image, for one that is only on the
    internet, and where the text has not as many tags as the row has `images`.
    """
    given = iter(cast(Sequence[Any], row.columns.get("images") or ()))
    sources: list[Source] = []
    split: list[Message] = []
    for message in messages:
        entries = list(_entries(row, message["content"], given))
        sources += [source for _, source in entries if source is not None]
        content = [entry for entry, _ in entries]
        # Templates of models without eyes take strings alone.
        if all(source is None for _, source in entries):
            content = "".join(entry["text"] for entry in content)
        split.append({**message, "content": content})
    left = len(list(given))
    if left:
        raise ConfigError(f"{row.place}: `images` has {left} more than the messages have {TAG} for")
    return split, sources


def text_of(content: Any) -> str:
    """What a content says, with a tag where it has a picture."""
    if isinstance(content, str):
        return content
    entries = cast(Sequence[Mapping[str, Any]], content or ())
    return "".join(entry["text"] if entry.get("type") == "text" else TAG for entry in entries)


def without_files(value: Any) -> Any:
    """The same with what is in a picture's file told by its size: what is recorded is to be read."""
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, str):
        is_file = len(value) > _SHORT and value.startswith(("data:image", *_ENCODED))
        return f"{value[:_SHORT]}... ({len(value)} characters)" if is_file else value
    if isinstance(value, Mapping):
        return {name: without_files(each) for name, each in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return [without_files(each) for each in cast(Sequence[Any], value)]
    return value


def _entries(
    row: "Row", content: Any, given: Iterator[Any]
) -> Iterator[tuple[Mapping[str, str], Source | None]]:
    """Each entry as templates take it, and its picture if it is one."""
    if isinstance(content, str):
        first, *rest = content.split(TAG) if row.columns.get("images") else [content]
        if first or not rest:
            yield {"type": "text", "text": first}, None
        for text in rest:
            image = next(given, None)
            if image is None:
                raise ConfigError(f"{row.place}: the messages have more {TAG} than the row has `images`")
            yield {"type": "image"}, _source(row, image)
            if text:
                yield {"type": "text", "text": text}, None
        return
    for entry in cast(Sequence[Any], content):
        fields: Mapping[str, Any] = cast(Mapping[str, Any], entry) if isinstance(entry, Mapping) else {}
        kind = fields.get("type")
        if kind == "text" and isinstance(fields.get("text"), str):
            yield {"type": "text", "text": fields["text"]}, None
        elif kind in ("image", "image_url"):
            image = next(
                (fields[key] for key in ("image", "image_url", "path", "url") if fields.get(key)), None
            )
            yield {"type": "image"}, _source(row, image)
        elif kind in ("video", "video_url"):
            raise ConfigError(f"{row.place}: videos are not read yet; give some frames as images")
        else:
            raise ConfigError(
                f'{row.place}: an entry of `content` is {{"type": "text", "text": ...}} or '
                f'{{"type": "image", "image": ...}}, not {entry!r:.80}'
            )


def _source(row: "Row", image: Any) -> Source:
    if isinstance(image, Mapping):
        fields = cast(Mapping[str, Any], image)
        return _source(row, next((fields[key] for key in ("bytes", "path", "url") if fields.get(key)), None))
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str) or not image:
        raise ConfigError(f"{row.place}: an image is a path, base64 or a data URL, not {str(image)[:80]!r}")
    if image.startswith(("http://", "https://")):
        raise ConfigError(f"{row.place}: {image[:80]}: images are not fetched; save it, and give its path")
    if image.startswith("data:"):
        return _decoded(row, image.partition(",")[2])
    if image.startswith(_ENCODED) and len(image) > 64:
        return _decoded(row, image)
    return image.removeprefix("file://")


def _decoded(row: "Row", text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ConfigError(f"{row.place}: an image that is no base64: {error}") from error

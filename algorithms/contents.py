"""What messages hold: a text, or a list of texts and pictures."""

import base64
import binascii
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from algorithms.content_text import ENCODED, TAG, VIDEO_TAG
from algorithms.data import Clip, Message, Source
from algorithms.rows import Row
from configs.errors import ConfigError

_COLUMNS = {TAG: "images", VIDEO_TAG: "videos"}


def split_pictures(row: Row, messages: Sequence[Message]) -> tuple[list[Message], list[Source]]:
    """The messages with `{"type": "image"}`, or video, in place of each picture, and the pictures in order.

    Raises ConfigError naming the row for an entry that is no text and no picture, for one that is only on the
    internet, and where the text has not as many tags as the row has `images` or `videos`.
    """
    given = {
        tag: iter(cast(Sequence[Any], row.columns.get(column) or ())) for tag, column in _COLUMNS.items()
    }
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
    for tag, rest in given.items():
        left = len(list(rest))
        if left:
            raise ConfigError(
                f"{row.place}: `{_COLUMNS[tag]}` has {left} more than the messages have {tag} for"
            )
    return split, sources


def _entries(
    row: Row, content: Any, given: Mapping[str, Iterator[Any]]
) -> Iterator[tuple[Mapping[str, str], Source | None]]:
    """Each entry as templates take it, and its picture if it is one."""
    if isinstance(content, str):
        yield from _tagged(row, content, given)
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
            video = next(
                (fields[key] for key in ("video", "video_url", "path", "url") if fields.get(key)), None
            )
            yield {"type": "video"}, _clip(row, video, fields.get("fps") or fields.get("sample_fps"))
        else:
            raise ConfigError(
                f'{row.place}: an entry of `content` is {{"type": "text", "text": ...}} or '
                f'{{"type": "image", "image": ...}} or the same with video, not {entry!r:.80}'
            )


def _tagged(
    row: Row, content: str, given: Mapping[str, Iterator[Any]]
) -> Iterator[tuple[Mapping[str, str], Source | None]]:
    """A text and the pictures at its tags, of the kinds that the row has a column for."""
    tags = [tag for tag, column in _COLUMNS.items() if row.columns.get(column)]
    parts = re.split(f"({'|'.join(tags)})", content) if tags else [content]
    for number, part in enumerate(parts):
        if number % 2 == 0:
            if part or len(parts) == 1:
                yield {"type": "text", "text": part}, None
            continue
        picture = next(given[part], None)
        if picture is None:
            raise ConfigError(
                f"{row.place}: the messages have more {part} than the row has `{_COLUMNS[part]}`"
            )
        if part == TAG:
            yield {"type": "image"}, _source(row, picture)
        else:
            yield {"type": "video"}, _clip(row, picture, None)


def _clip(row: Row, video: Any, fps: Any) -> Clip:
    """A video: the path of its file, or a list of frames."""
    if fps is not None and not (isinstance(fps, int | float) and fps > 0):
        raise ConfigError(
            f"{row.place}: `fps` of a video is a number of frames for each second, not {fps!r:.40}"
        )
    if isinstance(video, Mapping):
        fields = cast(Mapping[str, Any], video)
        return _clip(row, next((fields[key] for key in ("path", "url") if fields.get(key)), None), fps)
    if isinstance(video, str) and video and not video.startswith(("data:", "http://", "https://")):
        return Clip(sources=(video.removeprefix("file://"),), is_file=True)
    if isinstance(video, Sequence) and not isinstance(video, str | bytes) and video:
        frames = tuple(_source(row, frame) for frame in cast(Sequence[Any], video))
        return Clip(sources=frames, is_file=False, fps=fps)
    if isinstance(video, str) and video.startswith("http"):
        raise ConfigError(f"{row.place}: {video[:80]}: videos are not fetched; save it, and give its path")
    shown = str(cast(object, video))[:80]
    raise ConfigError(f"{row.place}: a video is the path of its file or a list of frames, not {shown!r}")


def _source(row: Row, image: Any) -> str | bytes:
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
    if image.startswith(ENCODED) and len(image) > 64:
        return _decoded(row, image)
    return image.removeprefix("file://")


def _decoded(row: Row, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ConfigError(f"{row.place}: an image that is no base64: {error}") from error

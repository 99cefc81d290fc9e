"""Videos as samples: against the parts of transformers' processors that need no torchvision."""

import importlib
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoTokenizer, Qwen3VLModel
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.video_utils import VideoMetadata

from actors.pictures import PictureReader
from actors.tiny_vision import IMAGE, START, STOP, VIDEO, build_tiny_vision_model
from algorithms.contents import split_pictures
from algorithms.conversations import Samples, make_sft_samples
from algorithms.data import Clip
from algorithms.rows import Row
from bridge.families import spec_of
from configs.data import DataConfig
from configs.errors import ConfigError
from configs.sft import SFTConfig
from configs.vision import VisionConfig

PLACE = "rows.jsonl:1"
TEXT = {"type": "text", "text": "1 2 3"}
# Not by its package, which asks for torchvision.
Processor = importlib.import_module(
    "transformers.models.qwen3_vl.video_processing_qwen3_vl"
).Qwen3VLVideoProcessor
SETTINGS: dict[str, Any] = {
    "size": {"shortest_edge": 256, "longest_edge": 16384},
    "patch_size": 8,
    "merge_size": 2,
    "temporal_patch_size": 2,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_vision_model(tmp_path_factory.mktemp("tiny-vl"), seed=3)


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder, rng = tmp_path_factory.mktemp("frames"), np.random.default_rng(1)
    paths = [str(folder / f"{number}.png") for number in range(5)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (32, 48, 3), np.uint8)).save(path)
    return paths


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> str:
    """30 frames of 64 x 48 pixels at 10 a second, each 8 brighter than the one before."""
    path = str(tmp_path_factory.mktemp("film") / "a.avi")
    writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for number in range(30):
        writer.write(np.full((48, 64, 3), 8 * number, np.uint8))
    writer.release()
    return path


def reader(model: Path, *, of_qwen2_5: bool = False, **options: Any) -> PictureReader:
    vision = spec_of(model)[1].vision
    assert vision is not None
    if of_qwen2_5:
        vision = replace(vision, timestamps=False, tokens_per_second=2.0)
    return PictureReader(model, vision, VisionConfig.model_validate(options))


def talk(*content: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": list(content)}, {"role": "assistant", "content": "7"}]
    return {"messages": turns}


def samples_of(eye: PictureReader, model: Path, columns: Mapping[str, Any], **options: Any) -> Samples:
    row = Row(id="train-1", place=PLACE, columns=columns)
    tokenizer = AutoTokenizer.from_pretrained(model)
    sft = SFTConfig.model_validate({"max_length": 500, **options})
    return make_sft_samples([row], tokenizer, sft, DataConfig(dataset=("rows.jsonl",)), eye)


def test_frames_of_qwen3_vl_are_what_transformers_makes_of_them(model: Path, frames: list[str]) -> None:
    row = talk(
        TEXT, {"type": "video", "video": frames, "fps": 4.0}, {"type": "image", "image": frames[0]}, TEXT
    )
    eye = reader(model)
    (sample,) = samples_of(eye, model, row).kept
    metadata = VideoMetadata(total_num_frames=5, fps=4.0, frames_indices=list(range(5)))
    grids = torch.tensor([[3, 4, 6]])
    processor: Any = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2),
        _calculate_timestamps=partial(Qwen3VLProcessor._calculate_timestamps, None),
        vision_start_token=START,
        vision_end_token=STOP,
        video_token=VIDEO,
    )
    shown = {"video_grid_thw": grids, "video_metadata": [metadata]}
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    text = text.replace(VIDEO, Qwen3VLProcessor.replace_video_token(processor, shown, 0)).replace(
        IMAGE, IMAGE * 6
    )
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    assert "<0.9 seconds>" not in text
    assert "<1.0 seconds>" in text
    assert sample.tokens.tolist() == tokens.tolist()
    assert sample.loss_mask.sum() == 2

    config = AutoConfig.from_pretrained(model)
    kinds = (tokens == config.image_token_id).int() + 2 * (tokens == config.video_token_id).int()
    with torch.device("meta"):
        theirs: Any = Qwen3VLModel(config)
    positions, _ = theirs.get_rope_index(
        tokens[None], kinds[None], image_grid_thw=torch.tensor([[1, 4, 6]]), video_grid_thw=grids
    )
    assert sample.vision is not None
    np.testing.assert_array_equal(sample.vision.positions_3T, positions[:, 0].numpy())

    pixels = torch.stack([torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in frames])
    settings = eye._images._processor  # pyright: ignore
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (settings.image_mean, settings.image_std))
    want = Processor.patchify(None, ((pixels / 255 - mean) / std)[None], 8, 2, 2)
    assert want[1:] == (3, 4, 6)
    got = eye.patches(sample.vision.pictures[:1])
    np.testing.assert_allclose(got, want[0][0].numpy(), atol=1e-5)


@pytest.mark.parametrize("size", [(48, 32), (400, 300), (10, 9), (30, 90)])
@pytest.mark.parametrize("count", [1, 7])
def test_sizes_of_qwen3_vl_are_those_of_all_frames(
    model: Path, tmp_path: Path, size: tuple[int, int], count: int
) -> None:
    path = tmp_path / "a.png"
    Image.new("L", size).save(path)
    clip = Clip(sources=(str(path),) * count, is_file=False)
    for options, limit in ({}, None), ({"video_max_token_num": 3}, 3):
        theirs: Any = SimpleNamespace(
            **SETTINGS, cap_pixels_per_frame=limit is not None, max_video_tokens=limit or 768
        )
        want = Processor.get_num_of_video_patches(theirs, max(count, 2), size[1], size[0])
        assert np.prod(reader(model, **options).picture(clip, PLACE).grid) == want
    for options in {"video_max_token_num": 3}, {"video_min_token_num": 20}:
        picture = reader(model, of_qwen2_5=True, **options).picture(clip, PLACE)
        tokens = picture.grid[1] * picture.grid[2] // 4
        assert tokens <= 3 if "video_max_token_num" in options else tokens >= 20


def test_a_file_is_seen_at_the_rate_that_is_asked_for(model: Path, film: str) -> None:
    clip = Clip(sources=(film,), is_file=True)
    limits: Any = SimpleNamespace(min_frames=4, max_frames=768)
    for fps in (2.0, 0.5, 3.0):
        eye = reader(model, fps=fps)
        metadata = VideoMetadata(total_num_frames=30, fps=10.0)
        want = Processor.sample_frames(limits, metadata, fps=fps).tolist()
        picture = eye.picture(clip, PLACE)
        assert list(picture.frames) == want
        metadata.frames_indices = want
        assert picture.seconds == pytest.approx(2 / metadata.sampled_fps)
        assert list(picture.times) == Qwen3VLProcessor._calculate_timestamps(None, want, 10.0)  # pyright: ignore
        patches = eye.patches([picture]).reshape(len(want) // 2, -1, 3, 2, 64)
        settings = eye._images._processor  # pyright: ignore
        seen = patches.mean(axis=(1, 4)) * np.array(settings.image_std)[:, None]
        seen = (seen + np.array(settings.image_mean)[:, None]) * 255
        bright = 8.0 * np.array(want).reshape(-1, 1, 2)
        np.testing.assert_allclose(seen, np.broadcast_to(bright, seen.shape), atol=3)
    picture = reader(model, of_qwen2_5=True).picture(clip, PLACE)
    assert picture.frames == (0, 5, 10, 15, 20, 25)
    assert picture.seconds == 1.0
    assert len(reader(model, fps_max_frames=5, of_qwen2_5=True).picture(clip, PLACE).frames) == 4


def test_long_lists_are_thinned_out_and_keep_their_times(model: Path, frames: list[str]) -> None:
    eye = reader(model, fps_max_frames=3, fps=1.0)
    picture = eye.picture(Clip(sources=tuple(frames), is_file=False), PLACE)
    assert picture.sources == (frames[0], frames[2], frames[4])
    assert picture.times == (1.0, 4.0)


def test_videos_are_given_in_many_ways(frames: list[str]) -> None:
    content = [
        {"type": "video", "video": "a.mp4"},
        {"type": "video_url", "video_url": {"url": "file:///b.mp4"}},
        {"type": "video", "video": frames[:2], "sample_fps": 1},
    ]
    row = Row(id="", place=PLACE, columns=talk(*content))
    messages, sources = split_pictures(row, row.columns["messages"])
    assert [part["type"] for part in messages[0]["content"]] == ["video"] * 3
    assert sources == [
        Clip(sources=("a.mp4",), is_file=True),
        Clip(sources=("/b.mp4",), is_file=True),
        Clip(sources=tuple(frames[:2]), is_file=False, fps=1),
    ]
    tagged = {
        "messages": [{"role": "user", "content": "<video>a<image><video>"}],
        "images": ["x.png"],
        "videos": ["c.mp4", frames],
    }
    messages, sources = split_pictures(Row(id="", place=PLACE, columns=tagged), tagged["messages"])
    assert [part["type"] for part in messages[0]["content"]] == ["video", "text", "image", "video"]
    assert sources[1] == "x.png"
    assert sources[2] == Clip(sources=tuple(frames), is_file=False)


def test_what_is_no_video_names_the_row(
    model: Path, frames: list[str], film: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = str(tmp_path / "other.png")
    Image.new("L", (8, 8)).save(other)
    text = tmp_path / "a.mp4"
    text.write_text("no video")
    for video, words in (
        ("missing.mp4", "missing.mp4 cannot be read as a video: there is no such file"),
        (str(text), "no frame of it can be read"),
        ("https://example.com/a.mp4", "videos are not fetched; save it"),
        (7, "a video is the path of its file or a list of frames, not '7'"),
        ([frames[0], other], r"other.png cannot be read as a frame: it has \(8, 8\) pixels, .* \(32, 48\)"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            samples_of(reader(model), model, talk({"type": "video", "video": video}, TEXT))
        assert str(caught.value).startswith(PLACE)
    with pytest.raises(ConfigError, match="`fps` of a video is a number"):
        samples_of(reader(model), model, talk({"type": "video", "video": frames, "fps": "two"}))
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ConfigError, match="pip install opencv-python-headless; or give a list of frames"):
        samples_of(reader(model), model, talk({"type": "video", "video": film}))


def test_a_long_sample_is_not_cut_within_a_video(model: Path, frames: list[str]) -> None:
    turns = [*talk(TEXT)["messages"], *talk({"type": "video", "video": frames}, TEXT)["messages"]]
    eye = reader(model)
    (whole,) = samples_of(eye, model, {"messages": turns}).kept
    for length in range(12, whole.tokens.size):
        (sample,) = samples_of(eye, model, {"messages": turns}, max_length=length, truncation="truncate").kept
        assert sample.vision is None or sample.vision.slots_T.max() == 18
        assert sample.tokens.size <= length

"""Rows with images as samples: against transformers' image processor, and its counts of tokens and positions."""

import base64
import io
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoTokenizer, Qwen3VLForConditionalGeneration, Qwen3VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from actors.pictures import PictureReader
from actors.tiny_vision import build_tiny_vision_model, draw_number, write_numbers
from algorithms.completions import sample_of
from algorithms.content_text import text_of, without_files
from algorithms.contents import split_pictures
from algorithms.conversations import Samples, make_prompts, make_sft_samples
from algorithms.data import MicroBatch, Rollout, TrainSample, float_row, int_row
from algorithms.packing import pack
from algorithms.rows import Row, check_row
from bridge.families import spec_of
from bridge.frozen import frozen_parts
from bridge.vision import part_of
from configs.data import DataConfig
from configs.errors import BasculeError, ConfigError
from configs.schema import TrainerConfig
from configs.sft import SFTConfig
from configs.vision import VisionConfig
from tests.actors.tiny_internvl import build_tiny_internvl, processed

PLACE = "rows.jsonl:1"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_vision_model(tmp_path_factory.mktemp("tiny-vl"), seed=3)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(1)
    for name, (width, height) in {
        "wide.png": (61, 30),
        "tall.jpg": (30, 70),
        "large.webp": (400, 300),
    }.items():
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / name)
    turned = Image.Exif()
    turned[0x0112] = 6
    draw_number("42", random.Random(1)).save(folder / "turned.png", exif=turned)
    return folder


def reader(model: Path, **options: Any) -> PictureReader:
    spec = spec_of(model)[1]
    assert spec.vision is not None
    return PictureReader(model, spec.vision, VisionConfig.model_validate(options))


def samples_of(model: Path, *columns: Mapping[str, Any], length: int = 500, **options: Any) -> Samples:
    rows = [Row(id=f"train-{n}", place=f"rows.jsonl:{n}", columns=row) for n, row in enumerate(columns, 1)]
    for row in rows:
        check_row(row)
    truncation = options.pop("truncation", "error")
    return make_sft_samples(
        rows,
        AutoTokenizer.from_pretrained(model),
        SFTConfig(max_length=length, truncation=truncation),
        DataConfig(dataset=("rows.jsonl",)),
        reader(model, **options),
    )


def talk(*content: Any, answer: str = "7") -> dict[str, Any]:
    turns = [{"role": "user", "content": list(content)}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


def image(path: Path | str) -> dict[str, str]:
    return {"type": "image", "image": str(path)}


TEXT = {"type": "text", "text": "1 2 3"}


@pytest.mark.parametrize("options", [{}, {"image_max_token_num": 12}, {"min_pixels": 5000}])
@pytest.mark.parametrize("name", ["wide.png", "tall.jpg", "large.webp", "turned.png"])
def test_grids_and_patches_are_transformers(
    model: Path, images: Path, name: str, options: dict[str, int]
) -> None:
    eye = reader(model, root_image_dir=images, **options)
    found = eye.picture(name, PLACE)
    settings = json.loads((model / "preprocessor_config.json").read_text())
    if "image_max_token_num" in options:
        settings["size"]["longest_edge"] = 12 * 16 * 16
    if "min_pixels" in options:
        settings["size"]["shortest_edge"] = 5000
    opened = Image.open(images / name)
    upright = opened.rotate(-90, expand=True) if name == "turned.png" else opened
    want = Qwen2VLImageProcessorPil(**settings)(upright, return_tensors="pt")
    assert list(found.grid) == want["image_grid_thw"][0].tolist()
    np.testing.assert_array_equal(eye.patches([found]), want["pixel_values"].numpy())


def test_a_sample_has_the_tokens_mask_and_positions_of_transformers(model: Path, images: Path) -> None:
    (sample,) = samples_of(
        model, talk(image(images / "wide.png"), TEXT, image(images / "tall.jpg"), TEXT), image_max_token_num=9
    ).kept
    config = AutoConfig.from_pretrained(model)
    seen = sample.tokens == config.image_token_id
    assert sample.vision is not None
    grids = torch.tensor([picture.grid for picture in sample.vision.pictures])
    assert seen.sum() == int((grids.prod(1) // 4).sum())
    assert not (sample.loss_mask * seen).any()
    assert sample.loss_mask.sum() == 2
    assert sample.vision.slots_T[seen].tolist() == list(range(1, seen.sum() + 1))
    with torch.device("meta"):
        theirs: Any = Qwen3VLModel(config)
    tokens = torch.tensor(sample.tokens, dtype=torch.int64)[None]
    positions, _ = theirs.get_rope_index(
        tokens, (tokens == config.image_token_id).int(), image_grid_thw=grids
    )
    np.testing.assert_array_equal(sample.vision.positions_3T, positions[:, 0].numpy())


@pytest.fixture(scope="module")
def tiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_internvl(tmp_path_factory.mktemp("internvl"), seed=3)


def test_a_sample_of_tiles_is_what_transformers_makes_of_it(tiled: Path, images: Path) -> None:
    paths = [images / "wide.png", images / "tall.jpg"]
    row = talk(image(paths[0]), TEXT, image(paths[1]), TEXT)
    (sample,) = samples_of(tiled, row).kept
    tokenizer: Any = AutoTokenizer.from_pretrained(tiled)
    text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    tokens, tiles = processed(tiled, text, [Image.open(path).convert("RGB") for path in paths])
    assert sample.tokens.tolist() == tokens
    assert sample.loss_mask.sum() == 2
    assert sample.vision is not None
    assert [picture.grid[0] for picture in sample.vision.pictures] == [3, 3]
    assert sample.vision.slots_T.max() == 16 * len(tiles)
    assert sample.vision.positions_3T.tolist() == [list(range(len(tokens)))] * 3
    np.testing.assert_array_equal(reader(tiled).patches(sample.vision.pictures), tiles.flatten(1).numpy())


def test_tiles_are_limited_by_their_tokens(tiled: Path, images: Path) -> None:
    def tiles(**options: Any) -> int:
        return reader(tiled, root_image_dir=images, **options).picture("large.webp", PLACE).grid[0]

    # Seven are 3 x 2 and the whole. 63 tokens are room for 2 x 1 and the whole, to which 1 x 1 is nearer.
    assert (tiles(), tiles(image_max_token_num=63), tiles(image_max_token_num=16)) == (7, 1, 1)
    with pytest.raises(ConfigError, match="15 is less than the 16 tokens of a tile"):
        tiles(image_max_token_num=15)
    with pytest.raises(ConfigError, match=r"vision.max_pixels: this model sees tiles of one size"):
        tiles(max_pixels=1000)


def test_an_image_is_given_in_many_ways(images: Path) -> None:
    path = images / "wide.png"
    data = path.read_bytes()
    encoded = base64.b64encode(data).decode()
    content = [
        *(image(path), image(f"file://{path}"), image(encoded), {"type": "text", "text": "a"}),
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}},
        {"type": "image", "image": {"bytes": data, "path": None}},
    ]
    row = Row(id="", place=PLACE, columns=talk(*content))
    messages, sources = split_pictures(row, row.columns["messages"])
    assert sources == [str(path), str(path), data, data, data]
    assert [part["type"] for part in messages[0]["content"]] == ["image"] * 3 + ["text"] + ["image"] * 2
    tagged = {"messages": [{"role": "user", "content": "a <image> b<image>"}], "images": ["x.png", "y.png"]}
    messages, sources = split_pictures(Row(id="", place=PLACE, columns=tagged), tagged["messages"])
    assert sources == ["x.png", "y.png"]
    assert [part.get("text") for part in messages[0]["content"]] == ["a ", None, " b", None]
    plain = {"messages": [{"role": "user", "content": [TEXT, TEXT]}]}
    messages, sources = split_pictures(Row(id="", place=PLACE, columns=plain), plain["messages"])
    assert (messages[0]["content"], sources) == ("1 2 31 2 3", [])


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (talk(image("https://example.com/a.png"), TEXT), "images are not fetched; save it"),
        (talk(image("missing.png"), TEXT), "missing.png cannot be read as an image"),
        (talk({"type": "image", "image": b"not one"}, TEXT), "an image of 7 bytes in the row cannot be read"),
        (talk(image("data:image/png;base64,?"), TEXT), "an image that is no base64"),
        (talk({"type": "image"}, TEXT), "an image is a path, base64 or a data URL"),
        (talk({"type": "audio"}, TEXT), "an entry of `content` is"),
        (talk(TEXT) | {"images": ["a.png"]}, "`images` has 1 more"),
        (talk({"type": "text", "text": "<|image_pad|>"}), "there are 0 pictures, but 1 tokens"),
    ],
)
def test_what_is_no_image_names_the_row(model: Path, row: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        samples_of(model, row)
    assert str(caught.value).startswith(PLACE)


def test_long_samples_name_their_pictures_or_are_cut_between_them(model: Path, images: Path) -> None:
    path = images / "large.webp"
    row = talk(image(path), TEXT)
    with pytest.raises(
        ConfigError, match=r"rows.jsonl:1: .* with those of 1 pictures, .*image_max_token_num"
    ):
        samples_of(model, row, length=20)
    assert samples_of(model, row, row | talk(TEXT), length=20, truncation="truncate").dropped == 1
    turns = [
        *talk(image(images / "wide.png"), answer="1")["messages"],
        *talk(image(path), TEXT, answer="2")["messages"],
    ]
    (sample,) = samples_of(model, {"messages": turns}, length=30, truncation="truncate").kept
    assert sample.vision is not None
    assert len(sample.vision.pictures) == 1
    assert sample.tokens.size < 30


def test_a_row_keeps_the_pictures_of_its_samples(model: Path, images: Path) -> None:
    wide, tall = image(images / "wide.png"), image(images / "tall.jpg")
    kept = samples_of(model, talk(wide, TEXT), talk(TEXT), talk(tall, wide), image_max_token_num=8).kept
    batch = pack(kept, TrainerConfig(micro_batch_size=3))
    (micro,) = batch.ranks[0]
    assert micro.vision is not None
    order = [kept[number] for number in micro.samples_S if number >= 0]
    assert micro.vision.pictures == tuple(
        picture for sample in order if sample.vision for picture in sample.vision.pictures
    )
    visual = micro.vision.slots_T[micro.vision.slots_T > 0]
    assert visual.tolist() == list(range(1, len(visual) + 1))
    for number, start in zip(micro.samples_S, micro.starts_S[:-1], strict=True):
        if number >= 0:
            _same_positions(micro, kept[number], int(start))


def _same_positions(micro: MicroBatch, sample: TrainSample, start: int) -> None:
    assert micro.vision is not None
    want = sample.vision.positions_3T if sample.vision else np.tile(np.arange(sample.tokens.size), (3, 1))
    np.testing.assert_array_equal(micro.vision.positions_3T[:, start : start + sample.tokens.size], want)


def test_a_picture_that_changes_during_a_run_is_named(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    draw_number("12", random.Random(1)).save(path)
    eye = reader(model)
    picture = eye.picture(str(path), PLACE)
    Image.new("L", (80, 80)).save(path)
    with pytest.raises(BasculeError, match=r"a\.png has another size than when the run started"):
        eye.patches([picture])


def test_a_model_without_preprocessor_or_eyes(model: Path, images: Path, tmp_path: Path) -> None:
    spec = spec_of(model)[1]
    assert spec.vision is not None
    with pytest.raises(ConfigError, match=r"preprocessor_config.json: a model that sees pictures needs it"):
        PictureReader(tmp_path, spec.vision, VisionConfig())
    row = Row(id="", place=PLACE, columns=talk(image(images / "wide.png"), TEXT))
    tokenizer = AutoTokenizer.from_pretrained(model)
    with pytest.raises(
        ConfigError, match=f"{PLACE}: the row has pictures, and the model is one that sees none"
    ):
        make_sft_samples([row], tokenizer, SFTConfig(), DataConfig(dataset=("x",)))


def test_parts_are_frozen_by_name(model: Path) -> None:
    spec = spec_of(model)[1]
    assert spec.vision is not None
    by_default = frozen_parts(spec, VisionConfig())
    assert {part_of(spec.vision, name) for name in by_default} == {"vit", "aligner"}
    rest = frozen_parts(spec, VisionConfig(freeze_llm=True, freeze_aligner=False))
    assert {part_of(spec.vision, name) for name in rest} == {"vit", "llm"}
    assert "output_layer.weight" in rest
    assert "visual.deepstack_merger_list.0.norm.weight" in by_default - rest


def test_a_prompt_has_the_positions_of_its_pictures_and_its_completion_those_of_text(
    model: Path, images: Path
) -> None:
    content = [{"type": "image", "image": str(images / "wide.png")}, {"type": "text", "text": "range 1"}]
    row = Row(id="train-1", place=PLACE, columns={"messages": [{"role": "user", "content": content}]})
    tokenizer = AutoTokenizer.from_pretrained(model)
    data = DataConfig(dataset=("rows.jsonl",))
    (prompt,) = make_prompts([row], tokenizer, data, reader(model))
    image_token = AutoConfig.from_pretrained(model).image_token_id
    assert prompt.vision is not None
    # A sampled token of a picture is one of text: nothing is behind it.
    said = int_row([tokenizer.encode("7")[0], image_token, tokenizer.eos_token_id])
    rollout = Rollout(
        tokens=said,
        logprobs=float_row([-1.0, -1.0, -1.0]),
        text="7",
        finish="stop",
        loss_mask=int_row([1, 1, 1]),
        versions=(0, 0),
    )
    sample = sample_of(prompt, rollout)
    size = prompt.tokens.size
    assert sample.vision is not None
    assert sample.vision.pictures == prompt.vision.pictures
    np.testing.assert_array_equal(sample.vision.slots_T[size:], 0)
    assert sample.vision.slots_T.max() == sum(prompt.tokens == image_token)
    as_text = torch.tensor([[*prompt.tokens.tolist(), *[1] * 3]])
    seen = Qwen2VLImageProcessorPil.from_pretrained(model)(
        Image.open(images / "wide.png"), return_tensors="pt"
    )
    whole = Qwen3VLForConditionalGeneration.from_pretrained(model)
    expected, _ = whole.model.get_rope_index(
        input_ids=as_text,
        mm_token_type_ids=(as_text == image_token).int(),
        image_grid_thw=seen["image_grid_thw"],
    )
    np.testing.assert_array_equal(sample.vision.positions_3T, expected[:, 0].numpy())
    with pytest.raises(
        ConfigError, match=f"{PLACE}: the row has pictures, and the model is one that sees none"
    ):
        make_prompts([row], tokenizer, data)
    with pytest.raises(ConfigError, match=r"with those of 1 pictures, data.max_prompt_length allows 5"):
        make_prompts([row], tokenizer, data.model_copy(update={"max_prompt_length": 5}), reader(model))
    video = [{"type": "video", "video": [str(images / "wide.png")] * 4}]
    columns = {"messages": [{"role": "user", "content": video}]}
    with pytest.raises(ConfigError, match="no videos; only sft takes those"):
        make_prompts([Row(id="v", place=PLACE, columns=columns)], tokenizer, data, reader(model))


def test_what_is_recorded_of_pictures_can_be_read(images: Path) -> None:
    data = (images / "large.webp").read_bytes()
    encoded = base64.b64encode(data).decode()
    content = [
        {"type": "image", "image": encoded},
        {"type": "text", "text": " what?"},
        {"type": "video", "video": "v.mp4"},
    ]
    assert text_of(content) == "<image> what?<video>"
    assert text_of("plain") == "plain"
    row = {"images": [{"bytes": data, "path": None}], "messages": [{"content": content}], "answer": "UklGR"}
    found = without_files(row)
    assert found["images"] == [{"bytes": f"{len(data)} bytes", "path": None}]
    assert found["answer"] == "UklGR"
    kept = found["messages"][0]["content"]
    assert kept[0]["image"] == f"{encoded[:64]}... ({len(encoded)} characters)"
    assert kept[1:] == content[1:]


def test_the_demo_holds_numbers_out(tmp_path: Path) -> None:
    write_numbers(tmp_path, 1, train=300, held_out=30)
    learned, held_out = (
        {json.loads(line)["completion"] for line in (tmp_path / name).read_text().splitlines()}
        for name in ("train.jsonl", "eval.jsonl")
    )
    assert len(learned) > 80
    assert held_out
    assert not learned & held_out
    first = json.loads((tmp_path / "eval.jsonl").read_text().splitlines()[0])["prompt"][0]["content"][0]
    assert Image.open(io.BytesIO(Path(first["image"]).read_bytes())).size == (48, 32)

"""The bridge's round trip on real Megatron models: safetensors -> shards -> safetensors, bit for bit.

round_trip_worker.py runs all cases of a number of processes in one start; here they are judged.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from tests.bridge import round_trip_models as models
from tests.bridge.family_models import CONFIGS, SIGHTED
from tests.bridge.round_trip_cases import DRAWS, LAYOUTS, Case, deep, draw, matrix

pytestmark = pytest.mark.megatron

WORKER = Path(__file__).with_name("round_trip_worker.py")
SEED = 20
MATRIX = matrix()
SHARD_SIZE = 20_000
NAN_NAMES = ["model.layers.1.input_layernorm.weight", "model.layers.2.mlp.experts.3.down_proj.weight"]
INF_NAMES = ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight"]

# Checkpoints of other types, and of other numbers of files.
VARIANTS: dict[str, Case] = {
    "bf16": Case(source="deepseek_v3-bf16", layout=LAYOUTS["tp2-ep2-etp1"], dtype="bfloat16"),
    "fp16": Case(source="qwen2_moe-fp16", layout=LAYOUTS["tp2"], dtype="float16"),
    "mixed": Case(source="deepseek_v3-mixed", layout=LAYOUTS["pp2"], dtype="float32"),
    "mixed one": Case(source="glm4_moe-mixed", layout=LAYOUTS["one"], dtype="float32"),
    "bf16 in fp32": Case(source="gpt_oss-bf16", layout=LAYOUTS["pp2-vpp2"], dtype="float32"),
    "nan": Case(source="qwen3_moe-nan", layout=LAYOUTS["tp2-ep2-etp1"], dtype="bfloat16"),
    "several files": Case(source="qwen3_moe-files", layout=LAYOUTS["tp2"], max_shard_size=SHARD_SIZE),
    "one file to several": Case(source="llama tied-deep", layout=LAYOUTS["one"], max_shard_size=SHARD_SIZE),
    "several files to one": Case(source="qwen3_moe-files", layout=LAYOUTS["one"]),
    "without mtp": Case(source="deepseek_v3-deep", layout=LAYOUTS["tp2-sp-etp1"], mtp=False),
    "without mtp pp": Case(source="glm4_moe-deep", layout=LAYOUTS["pp2"], mtp=False),
    "saved as bf16": Case(source="deepseek_v3-deep", layout=LAYOUTS["tp2"], torch_dtype="bfloat16"),
    "saved as fp16 without mtp": Case(
        source="glm4_moe-deep", layout=LAYOUTS["ep2"], torch_dtype="float16", mtp=False
    ),
    "fp8": Case(source="llama-fp8", expected="llama-fp8-values", layout=LAYOUTS["tp2"], dtype="bfloat16"),
    "fp8 moe": Case(
        source="deepseek_v3-fp8",
        expected="deepseek_v3-fp8-values",
        layout=LAYOUTS["tp2-ep2-etp1"],
        dtype="bfloat16",
    ),
    "mxfp4": Case(
        source="gpt_oss-mxfp4", expected="gpt_oss-mxfp4-values", layout=LAYOUTS["ep2"], dtype="bfloat16"
    ),
}
TRAINED: dict[str, Case] = {
    "trained without mtp": Case(
        kind="trained", source="deepseek_v3-deep", layout=LAYOUTS["tp2-sp-etp1"], mtp=False
    ),
    "trained without mtp pp": Case(kind="trained", source="glm4_moe-deep", layout=LAYOUTS["pp2"], mtp=False),
    "trained with mtp": Case(kind="trained", source="deepseek_v3-deep", layout=LAYOUTS["pp2"]),
}
DEQUANTIZED = [name for name, case in VARIANTS.items() if case.expected]
SEVERAL_FILES = [name for name, case in VARIANTS.items() if case.max_shard_size == SHARD_SIZE]
FAULTS: dict[str, Case] = {
    "misfit": Case(kind="refused", source="llama-misfit", layout=LAYOUTS["pp2"]),
    "unexpected": Case(kind="refused", source="llama-unexpected", layout=LAYOUTS["tp2"]),
    "untied": Case(kind="refused", source="llama tied-untied", layout=LAYOUTS["tp2"]),
    "untied on the last stage": Case(kind="refused", source="llama tied-untied", layout=LAYOUTS["pp2"]),
    "full disk": Case(kind="failing save", source="qwen3-deep", layout=LAYOUTS["tp2"]),
    "full disk of a replica": Case(kind="failing save", source="qwen3-deep", layout=LAYOUTS["dp2"]),
}
KILLED = Case(kind="killed", source="qwen3_moe-deep", layout=LAYOUTS["tp2"], key="step 7", bucket_bytes=3000)
CONTINUED: dict[str, Case] = {
    name: replace(KILLED, kind="round trip", key=key, partial="interrupted/killed.bascule-partial")
    for name, key in (("continued", "step 7"), ("started over", "step 8"))
}
DRAWN = [f"draw {number}" for number in range(DRAWS)]

Outcomes = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    """All cases by name."""
    drawn = dict(zip(DRAWN, draw(SEED).cases.values(), strict=True))
    return {**MATRIX, **VARIANTS, **TRAINED, **FAULTS, **CONTINUED, **drawn}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the checkpoints."""
    root = tmp_path_factory.mktemp("round-trip")
    for name, config in CONFIGS.items():
        models.write_source(config, root / name)
        models.write_source(deep(name), root / f"{name}-deep")
    for name, config in draw(SEED).configs.items():
        models.write_source(config, root / name)
    write_variants(root)
    write_faults(root)
    return root


def write_variants(root: Path) -> None:
    bf16, fp16 = torch.bfloat16, torch.float16
    for name in ("deepseek_v3", "gpt_oss"):
        models.cast(root / f"{name}-deep", root / f"{name}-bf16", bf16)
    models.cast(root / "qwen2_moe-deep", root / "qwen2_moe-fp16", fp16)
    models.cast(root / "deepseek_v3-deep", root / "deepseek_v3-mixed", bf16, norms=torch.float32)
    models.cast(root / "glm4_moe-deep", root / "glm4_moe-mixed", bf16, norms=torch.float32)
    models.split(root / "qwen3_moe-deep", root / "qwen3_moe-files", 3)
    for name in ("llama", "deepseek_v3"):
        models.quantize_fp8(root / f"{name}-deep", root / f"{name}-fp8", root / f"{name}-fp8-values")
    wide = models.resized(CONFIGS["gpt_oss"], hidden_size=64, intermediate_size=32)
    models.write_source(wide, root / "gpt_oss-wide")
    models.quantize_mxfp4(root / "gpt_oss-wide", root / "gpt_oss-mxfp4", root / "gpt_oss-mxfp4-values")


def write_faults(root: Path) -> None:
    models.cast(root / "qwen3_moe-deep", root / "qwen3_moe-bf16", torch.bfloat16)
    tensors = load_file(root / "qwen3_moe-bf16" / models.WEIGHTS)
    broken = {name: tensors[name].clone() for name in NAN_NAMES}
    for tensor in broken.values():
        # A NaN with a payload, which a copy by value keeps and a computation would not.
        tensor.view(-1)[-1:] = torch.tensor([0x7FA5], dtype=torch.int16).view(torch.bfloat16)
    for name, value in zip(INF_NAMES, (torch.inf, -torch.inf), strict=True):
        broken[name] = tensors[name].clone()
        broken[name].view(-1)[:1] = value
    models.edited(root / "qwen3_moe-bf16", root / "qwen3_moe-nan", broken)
    models.edited(
        root / "llama-deep",
        root / "llama-misfit",
        {
            "model.layers.3.mlp.up_proj.weight": None,
            "model.layers.0.self_attn.k_proj.weight": torch.ones(6, 24),
            "model.layers.1.mystery.weight": torch.ones(2),
        },
    )
    models.edited(
        root / "llama-deep", root / "llama-unexpected", {"model.layers.9.mlp.up_proj.weight": torch.ones(2)}
    )
    embedding = load_file(root / "llama tied-deep" / models.WEIGHTS)["model.embed_tokens.weight"]
    embedding[-1, -1] += 1
    models.edited(root / "llama tied-deep", root / "llama tied-untied", {"lm_head.weight": embedding})


@pytest.fixture(scope="module")
def outcomes(root: Path, cases: dict[str, Case]) -> Outcomes:
    """A case's outcomes, one per rank; starts the processes when first asked for one of as many ranks."""
    finished: dict[int, list[dict[str, Any]]] = {}

    def of_case(name: str) -> list[dict[str, Any]]:
        ranks = cases[name].ranks
        if ranks not in finished:
            chosen = {other: case for other, case in cases.items() if case.ranks == ranks}
            finished[ranks] = run_workers(ranks, root, chosen)
        return [rank[name] for rank in finished[ranks]]

    return of_case


def output(root: Path, name: str, case: Case) -> Path:
    """Where a case was saved."""
    return root / str(case.ranks) / name.replace("/", "-").replace(" ", "-")


def run_workers(ranks: int, root: Path, cases: dict[str, Case]) -> list[dict[str, Any]]:
    """Outcomes by rank and case. The ranks of a killed save come first, since other cases continue it."""
    directories = [write_cases(root / str(ranks), cases)]
    if ranks == KILLED.ranks:
        directories.insert(0, write_cases(root / "interrupted", {"killed": KILLED}))
    worker = subprocess.Popen(
        [sys.executable, str(WORKER), str(ranks), *map(str, directories)],
        cwd=WORKER.parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        start_new_session=True,
    )
    try:
        assert worker.wait(timeout=300) == 0
    finally:
        # Its ranks too, which it has forked.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()
    for rank, code in enumerate(json.loads((directories[-1] / "codes.json").read_text())):
        assert code == 0, (directories[-1] / f"{rank}.log").read_text()[-5000:]
    return [json.loads((directories[-1] / f"{rank}.json").read_text()) for rank in range(ranks)]


def write_cases(directory: Path, cases: dict[str, Case]) -> Path:
    directory.mkdir()
    (directory / "cases.json").write_text(json.dumps({name: case.to_json() for name, case in cases.items()}))
    return directory


def size_of(directory: Path) -> int:
    """Bytes of tensors."""
    return sum(
        tensor.nbytes for path in directory.glob("*.safetensors") for tensor in load_file(path).values()
    )


@pytest.mark.parametrize("name", [*MATRIX, *DRAWN])
def test_every_family_goes_round_under_every_layout(
    name: str, outcomes: Outcomes, cases: dict[str, Case], root: Path
) -> None:
    """Parameters are as converted by hand; exported and saved tensors are the source's, bit for bit.

    Every rank reads the bytes that it needs, once, and every byte is written once by one of them.
    """
    ranks = outcomes(name)
    assert [rank["wrong"] for rank in ranks] == [[]] * len(ranks), cases[name]
    assert [rank["read"] for rank in ranks] == [rank["needed"] for rank in ranks]
    assert sum(rank["written"] for rank in ranks) == size_of(root / cases[name].source)


@pytest.mark.parametrize("name", [name for name in MATRIX if name.startswith("dp")])
def test_replicas_share_reading_and_writing(
    name: str, outcomes: Outcomes, cases: dict[str, Case], root: Path
) -> None:
    source = root / cases[name].source
    largest = max(tensor.nbytes for tensor in load_file(source / models.WEIGHTS).values())
    share = size_of(source) / cases[name].ranks
    for rank in outcomes(name):
        assert share - largest <= rank["written"] <= share + largest


@pytest.mark.parametrize("name", VARIANTS)
def test_types_and_files_of_all_kinds_go_round(
    name: str, outcomes: Outcomes, cases: dict[str, Case], root: Path
) -> None:
    ranks = outcomes(name)
    assert [rank["wrong"] for rank in ranks] == [[]] * len(ranks)
    # What was cast has an infinity in each tensor; the rest, but for `nan`, has none.
    stored = {
        key: tensor
        for path in (root / (cases[name].expected or cases[name].source)).glob("*.safetensors")
        for key, tensor in load_file(path).items()
    }
    # What a layer for multi-token prediction repeats of the model is named once, by the original's name.
    repeats = re.compile(r"model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight")
    named = sorted(
        key for key, tensor in stored.items() if not tensor.isfinite().all() and not repeats.fullmatch(key)
    )
    assert all(rank["not_finite"] == named for rank in ranks)


@pytest.mark.parametrize("name", TRAINED)
def test_trained_weights_are_saved_with_their_copies_and_load_again(name: str, outcomes: Outcomes) -> None:
    for rank in outcomes(name):
        assert rank["error"] == ""
        assert rank["wrong"] == []


@pytest.mark.parametrize("name", SEVERAL_FILES)
def test_files_are_of_the_asked_size_and_have_an_index(
    name: str, outcomes: Outcomes, cases: dict[str, Case], root: Path
) -> None:
    outcomes(name)
    directory = output(root, name, cases[name])
    index = json.loads((directory / models.INDEX).read_text())
    stored: dict[str, str] = {}
    paths = sorted(directory.glob("*.safetensors"))
    assert len(paths) > 1
    for number, path in enumerate(paths, start=1):
        assert path.name == f"model-{number:05d}-of-{len(paths):05d}.safetensors"
        with safe_open(path, "pt") as file:
            stored |= dict.fromkeys(file.keys(), path.name)
            assert file.metadata() == {"format": "pt"}
            assert sum(file.get_tensor(key).nbytes for key in file.keys()) <= SHARD_SIZE  # noqa: SIM118
    assert index["weight_map"] == stored
    assert index["metadata"]["total_size"] == size_of(directory)


@pytest.mark.parametrize("name", [*DEQUANTIZED, "saved as bf16", "mixed"])
def test_the_config_says_what_was_saved(
    name: str, outcomes: Outcomes, cases: dict[str, Case], root: Path
) -> None:
    outcomes(name)
    source = json.loads((root / cases[name].source / "config.json").read_text())
    source.pop("quantization_config", None)
    saved = json.loads((output(root, name, cases[name]) / "config.json").read_text())
    assert saved == source | {"dtype": "bfloat16"}


def test_everything_that_does_not_fit_is_listed_together(outcomes: Outcomes) -> None:
    for rank in outcomes("misfit"):
        for words in (
            "MisfitError: ",
            "the checkpoint does not have model.layers.3.mlp.up_proj.weight",
            "model.layers.0.self_attn.k_proj.weight is [6, 24] in the checkpoint, the model needs [4, 24]",
            "no rule reads these tensors of the checkpoint: model.layers.1.mystery.weight",
        ):
            assert words in rank["error"]
        # What a broken parameter would have read is not called unread.
        assert rank["error"].count("mlp.gate_proj.weight") == 0
    for rank in outcomes("unexpected"):
        assert rank["error"].endswith("tensors of the checkpoint: model.layers.9.mlp.up_proj.weight")


@pytest.mark.parametrize("name", ["untied", "untied on the last stage"])
def test_a_tied_head_that_differs_is_an_error_everywhere(name: str, outcomes: Outcomes) -> None:
    for rank in outcomes(name):
        assert "WeightError: " in rank["error"]
        assert "lm_head.weight differs from model.embed_tokens.weight" in rank["error"]
        assert "tie_word_embeddings: false" in rank["error"]


@pytest.mark.parametrize("name", ["full disk", "full disk of a replica"])
def test_a_full_disk_of_one_rank_is_an_error_everywhere(name: str, outcomes: Outcomes) -> None:
    for rank in outcomes(name):
        assert rank["wrong"] == []
        assert "WriteError: " in rank["error"]
        assert "model.safetensors: model." in rank["error"]
        assert "No space left on device" in rank["error"]


def test_a_killed_save_is_continued_by_the_same_key(
    outcomes: Outcomes, cases: dict[str, Case], root: Path
) -> None:
    source = root / KILLED.source
    written = {name: sum(rank["written"] for rank in outcomes(name)) for name in CONTINUED}
    codes = json.loads((root / "interrupted" / "codes.json").read_text())
    assert codes[1] == -signal.SIGKILL
    assert codes[0] > 0
    assert not (root / "interrupted" / "killed").exists()
    for name in CONTINUED:
        assert [rank["wrong"] for rank in outcomes(name)] == [[], []]
        directory = output(root, name, cases[name])
        assert {path.name for path in directory.iterdir()} == {path.name for path in source.iterdir()}
        assert not directory.with_name(f"{directory.name}.bascule-partial").exists()
    assert 0 < written["continued"] < 0.9 * size_of(source)
    assert written["started over"] == size_of(source)


@pytest.mark.parametrize("family", CONFIGS)
def test_what_is_saved_gives_transformers_the_same_logits(
    family: str, outcomes: Outcomes, cases: dict[str, Case], root: Path
) -> None:
    name = next(name for name in reversed(MATRIX) if name.endswith(f"/{family}"))
    outcomes(name)
    tokens = torch.arange(7)[None]
    kind: Any = AutoModelForImageTextToText if family in SIGHTED else AutoModelForCausalLM
    logits = [
        kind.from_pretrained(path, dtype=torch.float32)(tokens).logits
        for path in (root / cases[name].source, output(root, name, cases[name]))
    ]
    assert logits[0].isfinite().all()
    assert torch.equal(*logits)

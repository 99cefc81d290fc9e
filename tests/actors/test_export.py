"""`bascule export` and training from and to torch_dist, by their commands, on a mixture-of-experts model."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from actors.checkpoint_files import LATEST, METADATA
from actors.export import check_output, export, finish
from actors.model_source import ModelSource
from bridge.partial_directory import partial_of
from configs.errors import ConfigError
from configs.export import ExportConfig
from tests.actors.run_helpers import Finished, assert_texts_are_transformers, make_workspace, rows, run

pytestmark = pytest.mark.e2e

EXPERTS = (
    *("--tensor_model_parallel_size", "2", "--sequence_parallel", "true"),
    *("--expert_model_parallel_size", "2", "--expert_tensor_parallel_size", "1"),
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("export"), family="moe")


@pytest.fixture(scope="module")
def to_mcore(workspace: Path) -> Finished:
    return run(
        *("export", "--model", str(workspace / "model"), "--to_mcore", "true"),
        *("--output_dir", str(workspace / "mcore"), "--test_convert_precision", "true", *EXPERTS),
    )


def export_back(workspace: Path, threshold: str) -> Finished:
    """Under another layout, into small files, over an older checkpoint."""
    return run(
        *("export", "--mcore_model", str(workspace / "mcore"), "--to_hf", "true"),
        *("--output_dir", str(workspace / "back"), "--exist_ok", "--pipeline_model_parallel_size", "2"),
        *("--max_shard_size", "100KB", "--test_convert_precision", "--precision_threshold", threshold),
    )


@pytest.fixture(scope="module")
def failed(workspace: Path, to_mcore: Finished) -> Finished:
    """An export back to safetensors; no float is as close as this threshold asks."""
    assert to_mcore.code == 0, to_mcore.err
    shutil.copytree(workspace / "model", workspace / "back")
    (workspace / "back" / "notes.txt").write_text("of the old one")
    return export_back(workspace, "1e-12")


@pytest.fixture(scope="module")
def trained(workspace: Path, to_mcore: Finished) -> Finished:
    """GRPO with weights and reference from torch_dist, saved as torch_dist."""
    assert to_mcore.code == 0, to_mcore.err
    return run(
        *("grpo", "--config", str(workspace / "grpo.yaml"), "--output_dir", str(workspace / "run")),
        *("--model.model", "null", "--model.mcore_model", str(workspace / "mcore")),
        *("--mcore_ref_model", str(workspace / "mcore"), "--beta", "0.1"),
        *("--save_steps", "1", "--save_safetensors", "false"),
        *("--tensor_model_parallel_size", "1", "--data_parallel_size", "2"),
        *("--expert_model_parallel_size", "2"),
    )


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def test_to_mcore_passes_its_precision_test_and_leaves_no_process(
    workspace: Path, to_mcore: Finished
) -> None:
    assert to_mcore.code == 0, to_mcore.err
    assert to_mcore.left == []
    count = len(tensors(workspace / "model"))
    assert f"round trip: {count} of {count} tensors are the same bit for bit" in to_mcore.out
    assert "token_diff: 0 of" in to_mcore.out
    assert "precision test passed" in to_mcore.out
    assert [path.name for path in workspace.glob("mcore*")] == ["mcore"]


def test_what_fails_the_test_replaces_nothing(workspace: Path, failed: Finished) -> None:
    back, written = workspace / "back", workspace / "back.bascule-partial"
    assert failed.code == 1
    assert "precision test FAILED (threshold 1e-12)" in failed.out
    assert f"{back} stays as it was; {written}, which failed the test, is left for you" in failed.out
    assert failed.result() == {"output_dir": str(written), "not_finite": [], "passed": False}
    assert (back / "notes.txt").exists()
    assert_same_bytes(back, workspace / "model")
    assert_same_bytes(written, workspace / "model")


def test_the_same_export_is_continued_and_replaces_what_is_there_when_it_passes(
    workspace: Path, failed: Finished
) -> None:
    again = export_back(workspace, "0.1")
    assert again.code == 0, again.err + again.out
    back = workspace / "back"
    count = len(tensors(workspace / "model"))
    assert f"continuing an interrupted save: {count} of {count} tensors were written" in again.out
    assert "continuing" not in failed.out
    assert again.result() == {"output_dir": str(back), "not_finite": [], "passed": True}
    assert_same_bytes(back, workspace / "model")
    assert len(list(back.glob("*.safetensors"))) > 3
    assert not {"notes.txt", "bascule.json"} & {path.name for path in back.iterdir()}
    assert [path.name for path in workspace.glob("back*")] == ["back"]
    assert [path.name for path in back.glob(".*")] == []


def assert_same_bytes(directory: Path, model: Path) -> None:
    before, after = tensors(model), tensors(directory)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name


class Lines:
    """A console that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def progress(self, done: int, total: int) -> None:
        raise AssertionError("an export has no steps")


def test_what_fails_the_test_is_put_in_place_where_nothing_is(tmp_path: Path) -> None:
    output, console = tmp_path / "out", Lines()
    partial_of(output).mkdir()
    assert finish(output, False, console) == output
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert console.lines == [f"renamed it to {output}"]


def test_engines_and_reference_start_with_the_weights_of_the_torch_dist_checkpoint(
    workspace: Path, trained: Finished
) -> None:
    assert trained.code == 0, trained.err
    assert trained.left == []
    steps = [row for row in rows(workspace / "run" / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    for row in steps:
        assert row["sampling/logprob_difference_mean"] < 1e-5
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-9)
    assert steps[1]["kl"] > 1e-5


def test_a_torch_dist_checkpoint_of_a_run_becomes_the_model_that_its_engines_had(
    workspace: Path, trained: Finished
) -> None:
    assert (workspace / "run" / "checkpoint-1" / "iter_0000001" / "metadata.json").is_file()
    finished = run(
        *("export", "--mcore_model", str(workspace / "run" / "checkpoint"), "--to_hf", "true"),
        *("--output_dir", str(workspace / "trained"), "--test_convert_precision", "true"),
    )
    assert finished.code == 0, finished.err + finished.out
    before, after = tensors(workspace / "model"), tensors(workspace / "trained")
    assert before.keys() == after.keys()
    assert all(not torch.equal(after[name], before[name]) for name in before)
    assert_texts_are_transformers(workspace / "run", workspace / "trained", step=3)


def test_wrong_input_is_refused_by_the_command(workspace: Path) -> None:
    output = str(workspace / "model")
    finished = run("export", "--model", output, "--to_mcore", "true", "--output_dir", output, "--exist_ok")
    assert finished.code == 2
    assert (
        f"output_dir: {output} is or holds {output}, which is read, and so is never replaced" in finished.err
    )


def test_an_output_that_would_replace_what_is_read_is_refused(tmp_path: Path) -> None:
    model, mcore = tmp_path / "home" / "model", tmp_path / "home" / "mcore"
    for number in (1, 2):
        (mcore / f"iter_000000{number}").mkdir(parents=True)
        (mcore / f"iter_000000{number}" / METADATA).touch()
        (mcore / f"iter_000000{number}" / "__0_0.distcp").touch()
    (mcore / LATEST).write_text("2")
    (mcore / "config.json").touch()
    (tmp_path / "store").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "store" / name).touch()
    model.mkdir()
    (model / "config.json").touch()
    (model / "model.safetensors").symlink_to(tmp_path / "store" / "model.safetensors")
    hf, torch_dist = ModelSource(directory=model), ModelSource(directory=mcore, mcore=mcore)
    for source, lost in ((hf, model), (torch_dist, mcore), (torch_dist, mcore / "iter_0000002")):
        for output in (lost, tmp_path / "home"):
            with pytest.raises(ConfigError, match=f"{output} is or holds .*, which is read, and so is never"):
                check_output(source, output, exist_ok=True)
    with pytest.raises(ConfigError, match=r"store is or holds .*model.safetensors, which is read"):
        check_output(hf, tmp_path / "store", exist_ok=True)
    # Nothing that is read is lost in these.
    for source in (hf, torch_dist):
        check_output(source, source.directory / "converted", exist_ok=False)
    check_output(torch_dist, mcore / "iter_0000001", exist_ok=True)


def test_an_output_that_is_something_else_or_cannot_be_made_is_refused(tmp_path: Path) -> None:
    source = ModelSource(directory=tmp_path / "model")
    source.directory.mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").touch()
    with pytest.raises(ConfigError, match=r"output_dir: .*home exists; choose another, or set exist_ok"):
        check_output(source, tmp_path / "home", exist_ok=False)
    with pytest.raises(ConfigError, match=r"output_dir: .*home is neither empty nor a checkpoint"):
        check_output(source, tmp_path / "home", exist_ok=True)
    with pytest.raises(
        ConfigError, match=r"output_dir: .*out cannot be made: .*letter.txt is not a directory"
    ):
        check_output(source, tmp_path / "home" / "letter.txt" / "out", exist_ok=True)


def test_a_wrong_layout_or_a_broken_tokenizer_is_refused_before_anything_starts(
    workspace: Path, tmp_path: Path
) -> None:
    words = {"to_mcore": True, "output_dir": tmp_path / "out", "test_convert_precision": True}
    with pytest.raises(ConfigError, match="expert_model_parallel_size 3"):
        export(
            ExportConfig(model=str(workspace / "model"), layout={"expert_model_parallel_size": 3}, **words),
            Lines(),
        )
    shutil.copytree(workspace / "model", tmp_path / "broken")
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="broken: no tokenizer can be loaded"):
        export(ExportConfig(model=str(tmp_path / "broken"), **words), Lines())
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]

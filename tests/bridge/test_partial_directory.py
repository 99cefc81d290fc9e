"""What a save may replace, and what becomes of the directories beside it."""

import os
from pathlib import Path

import pytest

from bridge.partial_directory import (
    check_replaceable,
    check_writable,
    make_partial,
    partial_of,
    put_in_place,
)
from configs.errors import ConfigError, WriteError

HUGGING_FACE = ("config.json", "model.safetensors")
MEGATRON = ("latest_checkpointed_iteration.txt", "iter_0000003/metadata.json")
ITERATION = ("metadata.json", "__0_0.distcp", "common.pt")
CHECKPOINTS = {
    "safetensors": HUGGING_FACE,
    "index": ("config.json", "model.safetensors.index.json"),
    "megatron": MEGATRON,
    "iteration": ITERATION,
    "no iteration yet": ("bascule.json", "config.json"),
    "interrupted": (*MEGATRON, "iter_0000004.bascule-partial/common.pt"),
}
OTHERS = {
    "files of a user": ("letter.txt", ".bashrc"),
    "a config alone": ("config.json",),
    "weights alone": ("model.safetensors",),
    "metadata alone": ("metadata.json", "table.csv"),
    "folders": ("documents/letter.txt",),
}


def make(directory: Path, files: tuple[str, ...]) -> Path:
    for name in files:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(name)
    return directory


def files_in(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("files", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_checkpoint_may_be_replaced(tmp_path: Path, files: tuple[str, ...]) -> None:
    check_replaceable(make(tmp_path / "out", files))


def test_nothing_and_an_empty_directory_may_be_replaced(tmp_path: Path) -> None:
    check_replaceable(tmp_path / "none")
    check_replaceable(tmp_path)


@pytest.mark.parametrize("files", OTHERS.values(), ids=OTHERS)
def test_anything_else_is_refused_by_name_and_stays(tmp_path: Path, files: tuple[str, ...]) -> None:
    out = make(tmp_path / "out", files)
    for action in (check_replaceable, make_partial):
        with pytest.raises(
            ConfigError, match="out is neither empty nor a checkpoint, so it is never replaced"
        ):
            action(out)
    assert files_in(tmp_path / "out") == sorted(files)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_more_than_a_checkpoint_is_refused(tmp_path: Path) -> None:
    make(tmp_path, (*HUGGING_FACE, "checkpoint-500/config.json", "notes/today.md"))
    with pytest.raises(ConfigError, match=r"more than a checkpoint: it also holds checkpoint-500, notes$"):
        check_replaceable(tmp_path)


def test_files_and_mount_points_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is not a directory"):
        check_replaceable(tmp_path / "file")
    with pytest.raises(ConfigError, match="/proc is a mount point"):
        check_replaceable(Path("/proc"))


def test_where_no_directory_can_be_made_is_said_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    check_writable(tmp_path / "not" / "yet" / "there")
    for path in (tmp_path / "file" / "out", tmp_path / "file" / "not" / "yet" / "out"):
        with pytest.raises(ConfigError, match=r"out cannot be made: .*file is not a directory"):
            check_writable(path)
    # Root may write everywhere, and tests may run as root.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(ConfigError, match="out cannot be made: no permission to write in"):
        check_writable(tmp_path / "not" / "yet" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_directories_of_a_user_beside_the_output_stay(tmp_path: Path) -> None:
    beside = ("out.old", "out.partial", "out.bascule-old-1", ".out")
    for name in beside:
        make(tmp_path / name, HUGGING_FACE)
    out = make(tmp_path / "out", HUGGING_FACE)
    make_partial(out)
    make(partial_of(out), ("config.json", "new.safetensors", ".bascule-contents", "folder/file"))
    put_in_place(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["out", *beside])
    assert files_in(out) == ["config.json", "folder/file", "new.safetensors"]
    for name in beside:
        assert files_in(tmp_path / name) == sorted(HUGGING_FACE)


def test_what_an_interrupted_save_left_is_made_anew(tmp_path: Path) -> None:
    out = tmp_path / "parent" / "out"
    make(partial_of(out), ("half.safetensors",))
    make_partial(out)
    assert files_in(tmp_path) == []
    assert [path.name for path in out.parent.iterdir()] == ["out.bascule-partial"]


def test_a_rename_that_fails_gives_the_old_one_its_name_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = make(tmp_path / "out", HUGGING_FACE)
    make(partial_of(out), ("config.json",))
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if path == partial_of(out):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(WriteError, match=r"out: cannot be written: .*Input/output error"):
        put_in_place(out)
    assert files_in(out) == sorted(HUGGING_FACE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.bascule-partial"]


def test_what_came_to_be_there_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_partial(out)
    make(out, ("letter.txt",))
    with pytest.raises(ConfigError, match="out is neither empty nor a checkpoint"):
        put_in_place(out)
    assert files_in(tmp_path) == ["out/letter.txt"]
    assert partial_of(out).is_dir()


def test_all_of_it_is_on_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order: files and directories of the partial one, then the rename, then the directory it is in."""
    out = tmp_path / "out"
    make_partial(out)
    make(partial_of(out), ("config.json", "iter_0000001/common.pt"))
    done: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def synced(descriptor: int) -> None:
        done.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        done.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    put_in_place(out)
    assert sorted(done[:-2]) == ["common.pt", "config.json", "iter_0000001", "out.bascule-partial"]
    assert done[-2:] == ["rename", tmp_path.name]

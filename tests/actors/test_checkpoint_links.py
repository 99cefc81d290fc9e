import math
from pathlib import Path

from actors.checkpoint_links import CheckpointLinks


def read(directory: Path) -> dict[str, str]:
    return {path.name: str(path.readlink()) for path in directory.iterdir() if path.is_symlink()}


def test_links_follow_what_is_saved_and_rated_in_any_order(tmp_path: Path) -> None:
    links = CheckpointLinks(tmp_path)
    links.rated(0, 0.9)
    assert read(tmp_path) == {}
    links.saved(10, tmp_path / "checkpoint-10")
    assert read(tmp_path) == {"last": "checkpoint-10"}
    links.rated(10, 0.5)
    assert read(tmp_path) == {"last": "checkpoint-10", "best": "checkpoint-10"}
    links.saved(20, tmp_path / "checkpoint-20")
    links.rated(20, 0.5)
    assert read(tmp_path) == {"last": "checkpoint-20", "best": "checkpoint-10"}
    # The evaluation after the last step comes before its checkpoint.
    links.rated(30, 0.7)
    assert read(tmp_path)["best"] == "checkpoint-10"
    links.saved(30, tmp_path / "checkpoint")
    assert read(tmp_path) == {"last": "checkpoint", "best": "checkpoint"}


def test_a_score_that_is_no_number_is_never_the_best(tmp_path: Path) -> None:
    links = CheckpointLinks(tmp_path)
    for step, score in ((1, math.nan), (2, -7.0), (3, math.nan)):
        links.saved(step, tmp_path / f"checkpoint-{step}")
        links.rated(step, score)
        assert read(tmp_path).get("best") == (None if step == 1 else "checkpoint-2")


def test_what_is_saved_and_what_becomes_best_is_told_once(tmp_path: Path) -> None:
    told: list[tuple[object, ...]] = []

    def event(step: int | None, kind: str, text: str, **details: object) -> None:
        told.append((step, kind, text, details))

    links = CheckpointLinks(tmp_path, event)
    links.rated(10, 0.5)
    links.saved(10, tmp_path / "checkpoint-10")
    links.rated(20, 0.4)
    links.saved(20, tmp_path / "checkpoint-20")
    links.rated(30, 0.7)
    links.saved(30, tmp_path / "checkpoint")

    def saved(step: int, name: str) -> tuple[object, ...]:
        return step, "checkpoint", f"{name} saved", {"path": name}

    def best(step: int, name: str, score: float) -> tuple[object, ...]:
        return step, "best", f"{name} is the best so far", {"path": name, "score": score}

    assert told == [
        saved(10, "checkpoint-10"),
        best(10, "checkpoint-10", 0.5),
        saved(20, "checkpoint-20"),
        saved(30, "checkpoint"),
        best(30, "checkpoint", 0.7),
    ]


def test_links_of_an_earlier_run_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "last").symlink_to("checkpoint-99")
    (tmp_path / ".last.new").symlink_to("half-made")
    CheckpointLinks(tmp_path).saved(1, tmp_path / "checkpoint-1")
    assert read(tmp_path) == {"last": "checkpoint-1"}

"""Options that the algorithm of a run has no use for."""

from typing import Any

import pytest
from pydantic import ValidationError

from configs.schema import RunConfig


def config(algorithm: str, model: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    teacher = {"teacher_model": "t"} if algorithm == "gkd" else {}
    needed = {
        "algorithm": algorithm,
        "model": {"model": "m", **teacher, **(model or {})},
        "data": {"dataset": "d"},
        "rewards": [{"function": "r"}] if algorithm == "grpo" else [],
    }
    return RunConfig.model_validate({**needed, **sections})


@pytest.mark.parametrize(
    ("algorithms", "sections", "option", "owner"),
    [
        (["grpo", "sft"], {"model": {"teacher_model": "t"}}, "model.teacher_model", "gkd"),
        (["grpo", "sft"], {"model": {"mcore_teacher_model": "t"}}, "model.mcore_teacher_model", "gkd"),
        (["gkd", "sft"], {"model": {"ref_model": "r"}}, "model.ref_model", "grpo"),
        (["gkd", "sft"], {"model": {"mcore_ref_model": "r"}}, "model.mcore_ref_model", "grpo"),
        (
            ["gkd", "sft"],
            {"tuner": {"tuner_type": "lora", "ref_adapters": "a"}},
            "tuner.ref_adapters",
            "grpo",
        ),
        (["gkd", "sft"], {"environment": {"function": "f.py:g"}}, "environment.function", "grpo"),
        (["grpo", "gkd"], {"sft": {"num_train_epochs": 2}}, "sft.num_train_epochs", "sft"),
    ],
)
def test_what_only_another_algorithm_would_use_is_refused(
    algorithms: list[str], sections: dict[str, Any], option: str, owner: str
) -> None:
    for algorithm in algorithms:
        with pytest.raises(
            ValidationError, match=f"{option}: is for {owner}, {algorithm} has no use for it.*; leave it out"
        ):
            config(algorithm, **sections)
    config(owner, **sections)


def test_what_contradicts_itself_in_the_section_of_another_algorithm_is_not_looked_at() -> None:
    settings = {"beta": 0.1, "sync_ref_model": True}
    assert config("sft", grpo=settings, tuner={"tuner_type": "lora"}).grpo.sync_ref_model


def test_options_of_an_environment_that_is_not_there_are_refused() -> None:
    with pytest.raises(
        ValidationError, match=r"environment\.max_turns: is not used without environment\.function"
    ):
        config("grpo", environment={"max_turns": 2})
    assert config("grpo", environment={"function": "f.py:g"}, rewards=[]).rewards == ()

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
        (["grpo", "gkd"], {"data": {"dataset": "d", "streaming": True}}, "data.streaming", "sft"),
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


@pytest.mark.parametrize(
    ("sections", "option"),
    [
        ({"model": {"teacher_model": "t"}}, "model.teacher_model"),
        ({"model": {"mcore_teacher_model": "t"}}, "model.mcore_teacher_model"),
        ({"teacher": {"teacher_model_server": "http://h"}}, "teacher.teacher_model_server"),
        ({"teacher": {"teacher_backend": "engine"}}, "teacher.teacher_backend"),
    ],
)
def test_a_teacher_that_nobody_asks_is_refused(sections: dict[str, Any], option: str) -> None:
    with pytest.raises(ValidationError, match=f"{option}: is for gkd and grpo; leave it out"):
        config("sft", **sections)
    with pytest.raises(ValidationError, match=f"{option}: is not used while grpo.teacher_kl_coef is 0"):
        config("grpo", **sections)


@pytest.mark.parametrize(
    ("grpo", "sections", "complaint"),
    [
        ({}, {}, r"grpo\.teacher_kl_coef needs a teacher in one place, there are 0"),
        (
            {"num_generations": 1},
            {"model": {"teacher_model": "t"}},
            r"grpo\.num_generations: a reward is compared",
        ),
        (
            {"dynamic_sample": True},
            {"model": {"teacher_model": "t"}},
            r"grpo\.dynamic_sample: .*teacher_kl_coef",
        ),
        (
            {"temperature": 0.8},
            {"model": {"teacher_model": "t"}, "teacher": {"teacher_backend": "engine"}},
            r"grpo\.temperature: a teacher's engine tells log-probabilities of temperature 1, not 0\.8",
        ),
        (
            {},
            {"model": {"mcore_teacher_model": "t"}, "teacher": {"teacher_backend": "engine"}},
            r"model\.mcore_teacher_model: engines read safetensors",
        ),
        (
            {},
            {"teacher": {"teacher_backend": "engine", "teacher_model_server": "http://h"}},
            r"teacher\.teacher_backend: a teacher behind a URL",
        ),
    ],
)
def test_a_teacher_of_grpo_that_cannot_be_asked_is_refused(
    grpo: dict[str, Any], sections: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValidationError, match=complaint):
        config("grpo", grpo={"teacher_kl_coef": 1.0, **grpo}, **sections)


def test_a_teacher_takes_the_place_of_rewards() -> None:
    settings = {"teacher_kl_coef": 1.0, "num_generations": 1}
    assert config("grpo", grpo=settings, model={"teacher_model": "t"}, rewards=[]).has_teacher
    with pytest.raises(
        ValidationError, match=r"grpo needs at least one reward function, or grpo\.teacher_kl_coef"
    ):
        config("grpo", rewards=[])


def test_what_contradicts_itself_in_the_section_of_another_algorithm_is_not_looked_at() -> None:
    settings = {"beta": 0.1, "sync_ref_model": True}
    assert config("sft", grpo=settings, tuner={"tuner_type": "lora"}).grpo.sync_ref_model


def test_options_of_an_environment_that_is_not_there_are_refused() -> None:
    with pytest.raises(
        ValidationError, match=r"environment\.max_turns: is not used without environment\.function"
    ):
        config("grpo", environment={"max_turns": 2})
    assert config("grpo", environment={"function": "f.py:g"}, rewards=[]).rewards == ()

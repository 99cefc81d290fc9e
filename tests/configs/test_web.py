"""Addresses of servers: a password is refused, and is not repeated by what says so."""

from typing import Any

import pytest

from configs.errors import ConfigError
from configs.load import load_config
from configs.web import without_passwords

GRPO = ("--model.model", "m", "--dataset", "d", "--output_dir", "o", "--rewards.0.function", "f.py:g")


@pytest.mark.parametrize(
    "words",
    [
        ("--rewards.1.url", "https://me:hunter2@host/score"),
        ("--rewards.1.url", "me:hunter2@host/score"),
        ("--rewards.1.url", "ftp://me:hunter2@host/score"),
        ("--teacher_model_server", "http://:hunter2@host:8000", "--teacher_kl_coef", "1"),
        ("--teacher_model_servers.a", "http://me:hunter2@host", "--teacher_kl_coef", "1"),
    ],
)
def test_a_password_in_an_address_is_refused_and_not_repeated(words: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, [*GRPO, *words], "grpo")
    said = str(refused.value)
    assert "holds a user or a password" in said or "should be http://HOST" in said
    assert words[0].removeprefix("--").split(".")[0] in said
    assert "hunter2" not in said


@pytest.mark.parametrize("url", ["http://host", "https://host:8000/v1?of=a", "http://[::1]:80/x@y"])
def test_other_addresses_are_taken_as_they_are(url: str) -> None:
    config = load_config(None, [*GRPO, "--rewards.1.url", url], "grpo")
    assert config.rewards[1].url == url


def test_a_key_without_a_server_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"api_key_env: is of a url; a function has none"):
        load_config(None, [*GRPO, "--rewards.0.api_key_env", "KEY"], "grpo")
    with pytest.raises(
        ConfigError, match=r"teacher_api_key_env: is not used while grpo.teacher_kl_coef is 0"
    ):
        load_config(None, [*GRPO, "--teacher_api_key_env", "KEY"], "grpo")


def test_texts_without_an_address_stay() -> None:
    for text in ("f.py:g at a@b", "'x:y'", "12:30 me@host"):
        assert without_passwords(text) == text

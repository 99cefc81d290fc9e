"""Episodes with a scripted model and environment, in words that are tokens."""

import asyncio
from typing import Any

import pytest

from actors.engine_episode import Player, between, check_template
from actors.tiny_model import train_tokenizer
from algorithms.data import Prompt, Rollout, SamplingSettings, float_row, int_row
from algorithms.environments.calling import EnvironmentFailedError, Reply
from configs.environment import EnvironmentConfig
from configs.errors import ConfigError

TOKENIZER = train_tokenizer()
END = TOKENIZER.eos_token_id
PROMPT = Prompt(id="p", tokens=int_row([1, 2, 3]), messages=(), columns={})
SAMPLING = SamplingSettings(n=1, max_tokens=40, temperature=1.0, seed=7)


def encode(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


def said(text: str, finish: Any = "stop", versions: tuple[int, int] = (0, 0)) -> Rollout:
    tokens = [*encode(text), *([END] if finish == "stop" else [])]
    return Rollout(
        tokens=int_row(tokens),
        logprobs=float_row([-0.5] * len(tokens)),
        text=text,
        finish=finish,
        loss_mask=int_row([1] * len(tokens)),
        versions=versions,
    )


def play(
    script: list[Rollout], replies: list[Reply], sampling: SamplingSettings = SAMPLING, **config: Any
) -> tuple[Rollout, list[tuple[Prompt, SamplingSettings]]]:
    """The episode, and what was sampled after."""
    asked: list[tuple[Prompt, SamplingSettings]] = []

    async def sample(prompt: Prompt, sampling: SamplingSettings) -> Rollout:
        asked.append((prompt, sampling))
        return script[len(asked) - 1]

    async def ask(turns: Any) -> Reply:
        return replies[len(asked) - 1]

    settings = EnvironmentConfig(function="f:g", role="user", **config)
    player = Player(tokenizer=TOKENIZER, config=settings, ask=ask)
    return asyncio.run(player.play(PROMPT, sampling, sample)), asked


def test_an_episode_is_one_row_whose_observations_are_masked() -> None:
    first, second = said("12*3", versions=(1, 2)), said("36", versions=(3, 4))
    done, asked = play([first, second], [Reply(observation="36", reward=0.25), Reply(done=True, reward=1.0)])
    user, assistant = TOKENIZER.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
    observed = [user, *encode("36"), assistant]
    assert done.tokens.tolist() == [*first.tokens, *observed, *second.tokens]
    assert done.loss_mask.tolist() == [1] * 5 + [0] * 4 + [1] * 3
    assert done.logprobs.tolist() == [-0.5] * 5 + [0] * 4 + [-0.5] * 3
    assert [(turn["role"], turn["content"]) for turn in done.turns] == [
        ("assistant", "12*3"),
        ("user", "36"),
        ("assistant", "36"),
    ]
    assert (done.text, done.finish, done.versions, done.environment_reward) == ("36", "stop", (1, 4), 1.25)
    assert asked[1][0].tokens.tolist() == [1, 2, 3, *first.tokens, *observed]
    assert asked[1][1].max_tokens == 40 - 5 - 4
    assert asked[0][1].seed == 7
    assert asked[1][1].seed not in (7, None)


def test_an_episode_ends_by_length_by_turns_and_by_a_turn_that_was_cut() -> None:
    long = Reply(observation="1" * 30)
    cut, asked = play([said("12*3")], [long], SamplingSettings(n=1, max_tokens=20, temperature=1.0))
    assert (cut.finish, cut.tokens.size, len(asked), cut.environment_reward) == ("length", 5, 1, None)
    for finish in ("length", "abort"):
        ended, _ = play([said("1"), said("2", finish)], [Reply(observation="0")] * 2)
        assert (ended.finish, ended.text) == (finish, "2")
    full, asked = play([said("1"), said("2")], [Reply(observation="0", reward=1.0)] * 2, max_turns=2)
    assert (full.finish, len(asked), full.environment_reward) == ("stop", 2, 2.0)
    assert full.loss_mask.tolist() == [1, 1, 0, 0, 0, 1, 1]
    short, _ = play([said("1"), said("2")], [long, Reply(done=True)], max_observation_tokens=4)
    assert short.turns[1]["content"] == "1111"


def test_a_failed_reply_ends_the_run_or_the_episode() -> None:
    with pytest.raises(EnvironmentFailedError, match="boom"):
        play([said("1")], [Reply(error="boom")])
    ended, _ = play([said("1")], [Reply(error="boom")], on_error="end")
    assert (ended.finish, ended.text) == ("stop", "1")


def test_what_is_between_two_turns_is_the_templates() -> None:
    message = {"role": "user", "content": "36"}
    dummy = [{"role": "user", "content": "5"}, {"role": "assistant", "content": "7"}, message]
    whole: Any = TOKENIZER.apply_chat_template(dummy, add_generation_prompt=True, return_dict=False)
    tail = list(whole)[list(whole).index(END) :]
    assert between(TOKENIZER, message, [*encode("7"), END]) == tail[1:]
    # A turn that a stop string ended: the token that ends a turn is put there.
    assert between(TOKENIZER, message, encode("7")) == tail
    plain: Any = train_tokenizer()
    plain.chat_template = None
    assert between(plain, message, [END]) == encode("36")


def test_a_template_without_a_place_for_the_role_is_noticed() -> None:
    deaf: Any = train_tokenizer()
    deaf.chat_template = (
        "{% for m in messages if m.role != 'tool' %}{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    check_template(deaf, "user")
    with pytest.raises(ConfigError, match="leaves out a message of role tool; set it to user"):
        check_template(deaf, "tool")
    deaf.chat_template = "{{ raise_exception('no tools') }}"
    with pytest.raises(ConfigError, match="refuses an observation of role tool: no tools"):
        check_template(deaf, "tool")

"""An episode: turns of the model with observations of an environment between them, as one row of tokens.

Tokens that were sampled stay what they are: only what comes between two turns is put into tokens, the way the
chat template does it.
"""

import asyncio
import uuid
import zlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from algorithms.data import Message, Prompt, Rollout, SamplingSettings, float_row, int_row
from algorithms.environments.calling import EnvironmentFailedError, Reply, Step
from configs.environment import EnvironmentConfig
from configs.errors import ConfigError
from configs.schema import RunConfig

Sample = Callable[[Prompt, SamplingSettings], Awaitable[Rollout]]
"""Samples one turn after these tokens."""
Ask = Callable[[tuple[Message, ...]], Awaitable[Reply]]
"""Gives the environment's reply to the last of these turns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Player:
    """What an episode is played with."""

    tokenizer: Any
    config: EnvironmentConfig
    ask: Ask

    async def play(self, prompt: Prompt, sampling: SamplingSettings, sample: Sample) -> Rollout:
        """Turns until the environment ends it, or a turn ends otherwise than by itself, or there are enough.

        `sampling.max_tokens` is for all turns and observations; when it is used up, `finish` is `length`. Raises
        EnvironmentFailedError for a failed reply unless `on_error` is `end`.
        """
        parts: list[Rollout] = []
        turns: tuple[Message, ...] = ()
        rewards: list[float] = []
        asked, left = sampling, sampling.max_tokens
        for number in range(1, self.config.max_turns + 1):
            last = await sample(_after(prompt, parts), asked)
            parts.append(last)
            left -= last.tokens.size
            turns = (*turns, {"role": "assistant", "content": last.text})
            if last.finish != "stop":
                break
            reply = await self.ask(turns)
            if reply.error is not None and self.config.on_error == "fail":
                raise EnvironmentFailedError(reply.error)
            rewards += [] if reply.reward is None else [reply.reward]
            if reply.observation is not None:
                turns = (*turns, self._message(reply))
            if reply.done or reply.error is not None or number == self.config.max_turns:
                break
            observed = between(self.tokenizer, turns[-1], last.tokens.tolist())
            left -= len(observed)
            if left <= 0:
                parts[-1] = replace(last, finish="length")
                break
            parts.append(_observation(observed, last.versions))
            asked = replace(sampling, max_tokens=left, seed=_seed_of(sampling.seed, number))
        return _joined(parts, turns, sum(rewards) if rewards else None)

    def _message(self, reply: Reply) -> Message:
        assert reply.observation is not None
        limit = self.config.max_observation_tokens
        text = shortened(self.tokenizer, reply.observation, limit)
        return {"role": reply.role or self.config.role, "content": text}


@asynccontextmanager
async def episode(worker: Any, prompt: Prompt, config: RunConfig) -> AsyncGenerator[Ask]:
    """How to ask the actor `worker` (EnvironmentWorker) in one episode, which ends with the `async with`.

    A worker that is gone, or late, is an EnvironmentFailedError whatever `on_error` says.
    """
    # No two episodes have the same, nor one that is played again after its engine was lost.
    key, timeout_s = uuid.uuid4().hex, config.cluster.step_timeout_s
    name = str(config.environment.function).rpartition(":")[2]

    async def ask(turns: tuple[Message, ...]) -> Reply:
        title = Step(number=0, episode=key, prompt=prompt, turns=turns).title(name)
        try:
            return await asyncio.wait_for(worker.step.remote(key, prompt, turns), timeout_s)
        except TimeoutError:
            raise EnvironmentFailedError(
                f"{title}: no answer from its worker within {timeout_s:g} s (cluster.step_timeout_s)"
            ) from None
        # Whatever Ray says of a worker that is gone.
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise EnvironmentFailedError(f"{title}: its worker failed: {reason}") from error

    try:
        yield ask
    finally:
        # Not waited for: an object that stays is of no consequence.
        worker.end.remote(key)


def between(tokenizer: Any, observation: Message, said: Sequence[int]) -> list[int]:
    """Tokens between a turn of the model, which ends with the sampled tokens `said`, and its next turn.

    By the chat template: what it puts after the words of a turn that this message follows, up to where the next
    turn begins, less what has been sampled of it, the token that ends a turn. Without a template the message's
    text. Raises ConfigError when the template refuses the message.
    """
    text = observation["content"]
    if tokenizer.chat_template is None:
        return list(tokenizer.encode(text, add_special_tokens=False))
    # Two dummies that differ in what the model says: what their ends have in common comes after that.
    one, other = (_rendered(tokenizer, word, observation) for word in ("0", "1"))
    same = next((n for n in range(len(one)) if one[-1 - n] != other[-1 - n]), len(one))
    tail = one[len(one) - same :]
    sampled = next((n for n in range(len(tail), 0, -1) if list(said[-n:]) == tail[:n]), 0)
    return tail[sampled:]


def check_template(tokenizer: Any, role: str) -> None:
    """Raises ConfigError when the chat template has no place for an observation of this role."""
    if tokenizer.chat_template is None:
        return
    word = "observation"
    tokens = between(tokenizer, {"role": role, "content": word}, ())
    if word not in tokenizer.decode(tokens):
        raise ConfigError(
            f"environment.role: the model's chat template leaves out a message of role {role}; set it to "
            f"{'user' if role == 'tool' else 'tool'}"
        )


def shortened(tokenizer: Any, text: str, limit: int) -> str:
    """The text, or as much of its beginning as `limit` tokens are."""
    tokens = tokenizer.encode(text, add_special_tokens=False)
    if len(tokens) <= limit:
        return text
    # A character may be cut in the middle.
    return tokenizer.decode(tokens[:limit], skip_special_tokens=False).rstrip("\ufffd")


def _rendered(tokenizer: Any, word: str, observation: Message) -> list[int]:
    dummy = [{"role": "user", "content": "0"}, {"role": "assistant", "content": word}, dict(observation)]
    try:
        return list(
            tokenizer.apply_chat_template(dummy, tokenize=True, add_generation_prompt=True, return_dict=False)
        )
    # Templates are foreign code: jinja's errors and raise_exception come in many types.
    except Exception as error:
        raise ConfigError(
            f"environment.role: the model's chat template refuses an observation of role {observation['role']}: "
            f"{error}"
        ) from error


def _after(prompt: Prompt, parts: Sequence[Rollout]) -> Prompt:
    tokens = int_row(np.concatenate([prompt.tokens, *(part.tokens for part in parts)]))
    return replace(prompt, tokens=tokens)


def _seed_of(seed: int | None, number: int) -> int | None:
    """Another seed for each turn, the same in each run."""
    return None if seed is None else zlib.crc32(f"{seed} turn {number}".encode())


def _observation(tokens: Sequence[int], versions: tuple[int, int]) -> Rollout:
    zeros = [0] * len(tokens)
    return Rollout(
        tokens=int_row(tokens),
        logprobs=float_row(zeros),
        text="",
        finish="stop",
        loss_mask=int_row(zeros),
        versions=versions,
    )


def _joined(parts: Sequence[Rollout], turns: tuple[Message, ...], reward: float | None) -> Rollout:
    return Rollout(
        tokens=int_row(np.concatenate([part.tokens for part in parts])),
        logprobs=float_row(np.concatenate([part.logprobs for part in parts])),
        text=parts[-1].text,
        finish=parts[-1].finish,
        loss_mask=int_row(np.concatenate([part.loss_mask for part in parts])),
        versions=(min(part.versions[0] for part in parts), max(part.versions[1] for part in parts)),
        turns=turns,
        environment_reward=reward,
    )

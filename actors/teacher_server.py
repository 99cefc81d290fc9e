"""Teachers behind OpenAI-compatible servers: what they think of every position of given sequences."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import httpx
import numpy as np

from algorithms.data import FloatRow, TopTokens, TrainSample, float_row, int_row
from configs.errors import BasculeError, ConfigError

# A server queues what it has no room for; more open connections than this help nobody.
_CONNECTIONS = 64
_PAUSE_S = 0.5

T = TypeVar("T")
_Entries = Sequence[Mapping[str, Any] | None]
"""What a server says at each token of a sequence: entries by token id; nothing at the first."""
_Read = Callable[[_Entries, TrainSample], T]


class TeacherServerError(BasculeError):
    """A teacher's server could not be asked, or answered something else. Names the server."""


class TeacherServers:
    """Servers by the name that samples ask for; implements algorithms.roles.TopTeacher and TokenTeacher.

    Asks `/v1/completions` for `prompt_logprobs`, as vLLM's server takes it, with the prompt as token ids.
    """

    def __init__(
        self,
        urls: Mapping[str, str],
        k: int,
        *,
        timeout_s: float,
        retries: int,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Finds out what each server calls its model. `timeout_s` is for one request; of those that fail with
        no answer, or one that says "later", each is made again up to `retries` times. `headers` go with each.
        Raises ConfigError for a server that does not answer."""
        self._urls = {name: url.rstrip("/").removesuffix("/v1") for name, url in urls.items()}
        self._k = k
        self._timeout_s = timeout_s
        self._retries = retries
        self._headers = headers
        self._models = {name: asyncio.run(self._find_model(url)) for name, url in self._urls.items()}

    def top_tokens(self, samples: Sequence[TrainSample]) -> list[TopTokens]:
        """For each sample its teacher's k likeliest tokens in place of each of its tokens.

        Raises TeacherServerError naming the server, once nothing of it was answered in time or at all.
        """
        return asyncio.run(self._ask_all(samples, self._k, partial(_top_tokens, self._k)))

    def token_logprobs(self, samples: Sequence[TrainSample]) -> list[FloatRow]:
        """For each sample its teacher's log-probability of each of its tokens, 0 for the first.

        Raises TeacherServerError as top_tokens does.
        """
        return asyncio.run(self._ask_all(samples, 0, _token_logprobs))

    async def _find_model(self, url: str) -> str:
        try:
            async with httpx.AsyncClient(headers=self._headers) as client:
                found = await self._request(client, "GET", f"{url}/v1/models", None)
            return str(found["data"][0]["id"])
        except (TeacherServerError, KeyError, IndexError, TypeError) as error:
            raise ConfigError(
                f"teacher.teacher_model_server: {url} does not say which model it has: {error}"
            ) from error

    async def _ask_all(self, samples: Sequence[TrainSample], k: int, read: _Read[T]) -> list[T]:
        room = asyncio.Semaphore(_CONNECTIONS)
        limits = httpx.Limits(max_connections=_CONNECTIONS)
        async with httpx.AsyncClient(limits=limits, headers=self._headers) as client:

            async def ask(sample: TrainSample) -> T:
                async with room:
                    return await self._ask(client, sample, k, read)

            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(ask(sample)) for sample in samples]
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _ask(self, client: httpx.AsyncClient, sample: TrainSample, k: int, read: _Read[T]) -> T:
        url = f"{self._urls[sample.teacher]}/v1/completions"
        body = {
            "model": self._models[sample.teacher],
            "prompt": sample.tokens.tolist(),
            # A server always samples a token too.
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": k,
        }
        answer = await self._request(client, "POST", url, body)
        try:
            entries = answer["choices"][0]["prompt_logprobs"]
            if len(entries) != sample.tokens.size:
                raise ValueError(f"{len(entries)} entries")
            return read(entries, sample)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise TeacherServerError(
                f"{url} did not answer with prompt_logprobs of {sample.tokens.size} tokens ({error!r}); vLLM's "
                "server does"
            ) from error

    async def _request(self, client: httpx.AsyncClient, method: str, url: str, body: Any) -> Any:
        """The JSON of an answer. Raises TeacherServerError."""
        problem = ""
        for attempt in range(self._retries + 1):
            await asyncio.sleep(_PAUSE_S * attempt)
            try:
                async with asyncio.timeout(self._timeout_s):
                    answer = await client.request(method, url, json=body, timeout=None)
            except TimeoutError:
                problem = f"no answer within {self._timeout_s:g} s"
                continue
            except httpx.HTTPError as error:
                problem = str(error) or repr(error)
                continue
            if answer.is_success:
                return answer.json()
            problem = f"status {answer.status_code}: {answer.text[:300]}"
            if answer.status_code < 500 and answer.status_code != httpx.codes.TOO_MANY_REQUESTS:
                raise TeacherServerError(f"{url} refused: {problem}")
        raise TeacherServerError(f"{url} failed {self._retries + 1} times, the last time with: {problem}")


def _token_logprobs(entries: _Entries, sample: TrainSample) -> FloatRow:
    """The tokens' own log-probabilities, 0 for the first."""
    pairs = zip(entries[1:], sample.tokens[1:].tolist(), strict=True)
    return float_row([0.0, *(float((entry or {})[str(token)]["logprob"]) for entry, token in pairs)])


def _top_tokens(k: int, entries: _Entries, sample: TrainSample) -> TopTokens:
    """Rows [L, k] from one mapping of token id to log-probability for each token but the first.

    A server adds the token that is there, if it is not among the k: that one is left out again.
    """
    ids_LK = np.full((sample.tokens.size, k), -1, np.int32)
    logprobs_LK = np.zeros((sample.tokens.size, k), np.float32)
    for position, entry in enumerate(entries):
        if entry is None:
            continue
        ranked = sorted(
            ((float(value["logprob"]), int(token)) for token, value in entry.items()), reverse=True
        )
        for place, (logprob, token) in enumerate(ranked[:k]):
            ids_LK[position, place], logprobs_LK[position, place] = token, logprob
    return TopTokens(ids=int_row(ids_LK), logprobs=float_row(logprobs_LK))

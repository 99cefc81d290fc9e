"""A reward behind an address: JSON over HTTP, one request for the completions of a prompt."""

from typing import Any

from algorithms.data import Group, jsonable
from configs.web import bearer


class RewardServer:
    """Asks a server (`url:` in a config). Called with a group, async.

    Request: `{"prompt", "messages", "completions", "token_ids", "finish_reasons", "columns"}`, see `request_of`.
    Answer: `{"rewards": [...]}`, one number, null, or object with `score` for each completion; or the list alone.
    An answer that is no 2xx, or no JSON, is an error of the call. One connection pool for all requests. The
    environment variable `api_key_env` of the process that asks holds the key, where the server wants one.
    """

    def __init__(self, url: str, api_key_env: str | None = None) -> None:
        self._url, self._api_key_env = url, api_key_env
        self._client: Any = None

    async def __call__(self, group: Group) -> Any:
        """Rewards by completion. Raises httpx's errors, ConfigError for a key that is not there, ValueError for an
        answer of another form."""
        response = await self._connected().post(self._url, json=request_of(group))
        response.raise_for_status()
        answer = response.json()
        if isinstance(answer, dict):
            if "rewards" not in answer:
                raise ValueError(f"{self._url} answered without `rewards`: {response.text[:200]}")
            return answer["rewards"]  # pyright: ignore[reportUnknownVariableType]
        return answer

    def _connected(self) -> Any:
        # A client belongs to the event loop of the child, and pickles to no other place.
        if self._client is None:
            import httpx

            # The deadline of the call is the caller's.
            headers = bearer(self._api_key_env, "rewards: api_key_env")
            self._client = httpx.AsyncClient(timeout=None, trust_env=False, headers=headers)
        return self._client


def request_of(group: Group) -> dict[str, Any]:
    """What is sent of a group. Columns that JSON does not have are sent as text."""
    prompt, rollouts = group.prompt, group.rollouts
    return {
        "prompt": prompt.text,
        "messages": [dict(message) for message in prompt.messages],
        "completions": [rollout.text for rollout in rollouts],
        "token_ids": [rollout.tokens.tolist() for rollout in rollouts],
        "finish_reasons": [rollout.finish for rollout in rollouts],
        "columns": jsonable(prompt.columns),
    }

"""What an engine thinks of given tokens: vLLM's log-probabilities of a prompt, as rows."""

from typing import TYPE_CHECKING, Any

import numpy as np

from algorithms.data import FloatRow, IntRow, TopTokens, float_row, int_row

if TYPE_CHECKING:
    from vllm import SamplingParams


def scoring_params(k: int) -> "SamplingParams":
    """What to ask vLLM for: the k likeliest tokens in place of each token of a prompt, and the token itself.

    vLLM takes nothing from cached prefixes when this is asked for, and always samples a token too.
    """
    from vllm import SamplingParams

    return SamplingParams(max_tokens=1, prompt_logprobs=k, detokenize=False, flat_logprobs=True)


def rows_of(prompt_logprobs: Any, k: int) -> tuple[IntRow, FloatRow]:
    """Ids and log-probabilities [L - 1, 1 + k] at each token but the first: what is there, then the likeliest."""
    # The flat form has no entries for the first token, and as many for each other.
    shape = (len(prompt_logprobs) - 1, 1 + k)
    ids = np.asarray(prompt_logprobs.token_ids, np.int32).reshape(shape)
    return int_row(ids), float_row(np.asarray(prompt_logprobs.logprobs, np.float32).reshape(shape))


def top_tokens(ids: IntRow, logprobs: FloatRow) -> TopTokens:
    """The likeliest tokens alone, with a row for the first token, which nothing predicts."""
    return TopTokens(
        ids=int_row(np.pad(ids[:, 1:], ((1, 0), (0, 0)), constant_values=-1)),
        logprobs=float_row(np.pad(logprobs[:, 1:], ((1, 0), (0, 0)))),
    )

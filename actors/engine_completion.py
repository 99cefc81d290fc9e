"""One completion out of one or several pieces: a pause that aborts cuts it, and the engine goes on from there."""

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from algorithms.data import Finish, Prompt, Rollout, SamplingSettings, float_row, int_row

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.outputs import CompletionOutput


def piece_params(
    sampling: SamplingSettings, index: int, before: "Sequence[CompletionOutput]"
) -> "SamplingParams":
    """What to ask vLLM for: the rest of completion `index` after the pieces that are there.

    Until the first token the seed is the same whether or not the completion was cut. After that it is made from
    seed, index and position, because vLLM cannot put a generator forward: a seeded completion that was cut is
    another sample of the same policy than one that was not, and the same again when it is cut at the same place.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    position = sum(len(piece.token_ids) for piece in before)
    seed = None if sampling.seed is None else sampling.seed + index
    if seed is not None and position:
        seed = zlib.crc32(f"{sampling.seed} {index} {position}".encode())
    return SamplingParams(
        max_tokens=sampling.max_tokens - position,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        stop=list(sampling.stop),
        seed=seed,
        logprobs=0,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def joined(
    pieces: "Sequence[CompletionOutput]",
    prompt: Prompt,
    sampling: SamplingSettings,
    tokenizer: Any,
    version: int,
) -> Rollout:
    """The whole completion. `version` is that of one that was aborted before its first token."""
    tokens = [token for piece in pieces for token in piece.token_ids]
    logprobs = [
        entry[token].logprob
        for piece in pieces
        for token, entry in zip(piece.token_ids, cast(list[Any], piece.logprobs or []), strict=True)
    ]
    versions = [
        int(span.version)
        for piece in pieces
        for span in piece.weight_versions or ()
        for _ in range(span.start, span.end)
    ]
    finish = cast(Finish, pieces[-1].finish_reason) if pieces else "abort"
    text = pieces[-1].text if pieces else ""
    if any(piece.token_ids for piece in pieces[:-1]):
        text, length, stopped = _detokenized(tokens, pieces[-1], prompt, sampling, tokenizer)
        tokens, logprobs, versions = tokens[:length], logprobs[:length], versions[:length]
        finish = "stop" if stopped else finish
    return Rollout(
        tokens=int_row(tokens),
        logprobs=float_row(logprobs),
        text=text,
        finish=finish,
        loss_mask=int_row([1] * len(tokens)),
        versions=(min(versions), max(versions)) if versions else (version, version),
    )


def _detokenized(
    tokens: Sequence[int],
    last: "CompletionOutput",
    prompt: Prompt,
    sampling: SamplingSettings,
    tokenizer: Any,
) -> tuple[str, int, bool]:
    """Text, number of tokens, and whether a stop string was found, as if there had been no cut.

    Each piece has its text alone, so a character or a stop string that lies across a cut is in neither.
    """
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer

    request = EngineCoreRequest(
        request_id=prompt.id,
        prompt_token_ids=prompt.tokens.tolist(),
        mm_features=None,
        sampling_params=piece_params(sampling, 0, ()),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    detokenizer = IncrementalDetokenizer.from_new_request(tokenizer, request)
    # The token that ends a sequence is no text. One that completed a stop string is known by that string.
    silent = last.finish_reason == "stop" and not isinstance(last.stop_reason, str)
    for position, token in enumerate(tokens):
        is_end = silent and position == len(tokens) - 1
        if detokenizer.update([token], is_end) is not None:
            return detokenizer.get_next_output_text(True, False), position + 1, True
    return detokenizer.get_next_output_text(True, False), len(tokens), False

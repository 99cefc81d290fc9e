"""One completion as it comes, from an engine outside of Ray."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from actors.engine import EngineError


async def stream_completion(
    arguments: Mapping[str, Any], row: Any, *, max_tokens: int, temperature: float, seed: int
) -> AsyncGenerator[tuple[str, Sequence[int]]]:
    """Text and tokens of one completion of `row` as they come, from an engine that lives for it alone.

    `row` makes a prompt of vLLM's once that is there (actors.engine_vision.engine_input). Tokens at the end that
    are no whole character have no text. Raises EngineError.
    """
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, seed=seed, output_kind=RequestOutputKind.DELTA
    )
    try:
        llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    except Exception as error:
        raise EngineError(
            f"vLLM did not start with {arguments['model']}: {error!r}; --backend transformers may take the model"
        ) from error
    try:
        async for answer in llm.generate(row(), params, "1"):
            yield answer.outputs[0].text, answer.outputs[0].token_ids
    except Exception as error:
        raise EngineError(f"vLLM failed with {arguments['model']}: {error!r}") from error
    finally:
        llm.shutdown()
        # Its destructor fails once the interpreter is going down, and this frame can live until then.
        del llm

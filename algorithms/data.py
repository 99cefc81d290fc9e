"""One frozen type per stage of a step. Rows are read-only numpy arrays, so they cross Ray without copies."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

IntRow = NDArray[np.int32]
FloatRow = NDArray[np.float32]
Message = Mapping[str, Any]
"""`role` and `content`, a text or a list of texts and pictures (algorithms.contents)."""
Finish = Literal["stop", "length", "abort"]


def int_row(values: Any) -> IntRow:
    """A read-only int32 copy of `values`."""
    row = np.array(values, dtype=np.int32)
    row.flags.writeable = False
    return row


def float_row(values: Any) -> FloatRow:
    """A read-only float32 copy of `values`."""
    row = np.array(values, dtype=np.float32)
    row.flags.writeable = False
    return row


def jsonable(value: Any) -> Any:
    """The same with what JSON does not have as text: what is read back from a file is then what was written."""
    return json.loads(json.dumps(value, default=str))


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt as the engine sees it (`tokens`) and as its author wrote it (`messages`, all `columns`)."""

    id: str
    tokens: IntRow
    messages: tuple[Message, ...]
    columns: Mapping[str, Any]
    vision: "Vision | None" = None

    @property
    def text(self) -> Any:
        """What the row has as `prompt`, or what the last message says."""
        return self.columns["prompt"] if "prompt" in self.columns else self.messages[-1]["content"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingSettings:
    """How completions are drawn. `seed` differs per prompt and step, so a run can be repeated."""

    n: int
    max_tokens: int
    temperature: float
    top_p: float = 1.0
    top_k: int = -1
    stop: tuple[str, ...] = ()
    seed: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One completion, or one episode: what came after the prompt.

    `tokens` and `logprobs` (natural logarithm, under the sampling distribution) have one entry per sampled token,
    the end-of-sequence or stop token included; `loss_mask` is 1 for tokens to train on. Tokens of observations,
    which were not sampled, are among them with a log-probability and a mask of 0. `text` is that of the last
    turn, `finish` how that ended. `versions` are the oldest and newest weight version that produced it.
    """

    tokens: IntRow
    logprobs: FloatRow
    text: str
    finish: Finish
    loss_mask: IntRow
    versions: tuple[int, int]
    turns: tuple[Message, ...] = ()
    """What model and environment said in turn; empty where there is no environment."""
    environment_reward: float | None = None
    """Sum of what the environment gave for the turns, None if it gave nothing."""

    @property
    def conversation(self) -> tuple[Message, ...]:
        """`turns`, or the completion as the only one."""
        return self.turns or ({"role": "assistant", "content": self.text},)

    @property
    def num_sampled(self) -> int:
        """Tokens that were sampled."""
        return int(self.loss_mask.sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """All completions of one prompt."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """A value for the sampled tokens `start` to `end` (not included) of a completion."""

    start: int
    end: int
    value: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What one reward said of one completion, or why it said nothing.

    `value` is None where the reward does not apply, and where there is an `error`. `parts` are further numbers,
    `notes` further texts to be looked at; neither is part of the reward. A call of a whole group counts its
    `seconds` for each completion.
    """

    value: float | None = None
    parts: Mapping[str, float | None] = field(default_factory=dict[str, float | None])
    notes: Mapping[str, str] = field(default_factory=dict[str, str])
    spans: tuple[Span, ...] = ()
    error: str | None = None
    timed_out: bool = False
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """A group with its rewards: the weighted sum, NaN where none applied, and by reward the values that count.

    `weights` are their factors in the sum, 1 where not named, `sources` the hashes of their files, where they have
    one; `verdicts` are what the rewards said, failures included; `credits` has what their spans add to the
    advantage of each sampled token, by completion, and is empty where there are no spans.
    """

    group: Group
    rewards: FloatRow
    parts: Mapping[str, tuple[float | None, ...]]
    weights: Mapping[str, float] = field(default_factory=dict[str, float])
    sources: Mapping[str, str] = field(default_factory=dict[str, str])
    verdicts: Mapping[str, tuple[Verdict, ...]] = field(default_factory=dict[str, tuple[Verdict, ...]])
    credits: tuple[FloatRow, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class TopTokens:
    """A teacher's likeliest tokens in place of each of L tokens, and their natural log-probabilities: [L, K]
    each. An id of -1 is no token; the first token of a sequence, which nothing predicts, has none."""

    ids: IntRow
    logprobs: FloatRow


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """A video of a row: its file's path, or its frames (paths, or what is in them), `fps` for each second."""

    sources: tuple[str | bytes, ...]
    is_file: bool
    fps: float | None = None


Source = str | bytes | Clip
"""A picture of a row: an image's path or what is in its file, or a video."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """An image or a video: its files, or what is in them, and its patches in time, height and width.

    An image has one file, a video one for each frame, or one of which `frames` are seen. `seconds` is the time
    between two steps of its grid, `times` is when they are, in seconds.
    """

    sources: tuple[str | bytes, ...]
    grid: tuple[int, int, int]
    video: bool = False
    seconds: float = 1.0
    frames: tuple[int, ...] = ()
    times: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Vision:
    """What a sequence, or a row, of T tokens shows.

    `slots_T` has for each token the number of the feature that takes its place, 0 for a token of text; features
    are counted from 1, picture after picture. `positions_3T` are in time, height and width (algorithms.vision).
    """

    pictures: tuple[Picture, ...]
    slots_T: IntRow
    positions_3T: IntRow


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSample:
    """A sequence to train on; every row has one entry per token of prompt and completion.

    `logprobs` are the engine's; those of the trainer before the first optimizer step on these samples (`old`)
    and of the reference are None where they are not needed. `policy_mask` is 0 for tokens without a policy
    term; None stands for ones.
    """

    tokens: IntRow
    loss_mask: IntRow
    advantages: FloatRow
    logprobs: FloatRow
    version: int
    old_logprobs: FloatRow | None = None
    ref_logprobs: FloatRow | None = None
    policy_mask: IntRow | None = None
    teacher: str = ""
    """Which teacher is asked, where there are several."""
    vision: Vision | None = None

    @property
    def num_loss_tokens(self) -> int:
        """Tokens to train on. Nothing predicts the first token of a sequence."""
        return int(self.loss_mask[1:].sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRecord:
    """What was thought of the tokens of one completion of a generation step; a row has one entry per token.

    `logprobs` are the engine's, the others the trainer's before the first optimizer step of the generation step
    and after its last; all are NaN for tokens of observations. `index` is the number of the completion in its
    group.
    """

    prompt_id: str
    index: int
    advantage: float
    tokens: IntRow
    logprobs: FloatRow
    trainer_logprobs: FloatRow
    updated_logprobs: FloatRow


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Samples packed into one row of T tokens.

    `starts_S` has the offset of each sequence and T at its end; padding is sequences of its own.
    `positions_T` count from 0 in every sequence. `samples_S` has for each sequence the number of its sample in
    what was packed, -1 for padding. The other rows belong to the *prediction* at t: `labels_T[t]` is the
    token after `tokens_T[t]`, `loss_mask_T[t]` is 1 where that label is trained on, `weights_T[t]` is what its
    term counts in the loss (1 on the loss mask when None), `logprobs_T` is the engine's log-probability of the
    label. For the other rows see TrainSample.
    """

    tokens_T: IntRow
    labels_T: IntRow
    positions_T: IntRow
    starts_S: IntRow
    loss_mask_T: IntRow
    advantages_T: FloatRow
    logprobs_T: FloatRow
    samples_S: tuple[int, ...] = ()
    weights_T: FloatRow | None = None
    old_logprobs_T: FloatRow | None = None
    ref_logprobs_T: FloatRow | None = None
    policy_mask_T: IntRow | None = None
    teacher_ids_TK: IntRow | None = None
    teacher_logprobs_TK: FloatRow | None = None
    vision: Vision | None = None

    @property
    def in_sample(self) -> NDArray[np.bool_]:
        """[T], whether a token is a sample's, or padding; without `samples_S` all are a sample's."""
        if not self.samples_S:
            return np.ones(self.tokens_T.size, np.bool_)
        return np.repeat(np.asarray(self.samples_S) >= 0, np.diff(self.starts_S))


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One optimizer step: micro-batches of each data-parallel rank, all of one length T, as many for each.

    The loss is a sum over tokens, each term times its weight, divided once by `denominator`. Metrics are
    means over `num_loss_tokens`. Both are counted over all ranks.
    """

    ranks: tuple[tuple[MicroBatch, ...], ...]
    num_loss_tokens: int
    denominator: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """Outcome of one optimizer step; metrics are means over the loss tokens of the global batch."""

    loss: float
    grad_norm: float
    learning_rate: float
    metrics: Mapping[str, float]

    @property
    def numbers(self) -> dict[str, float]:
        """All of it by name, as it is recorded."""
        own = {"loss": self.loss, "grad_norm": self.grad_norm, "learning_rate": self.learning_rate}
        return own | dict(self.metrics)

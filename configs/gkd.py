"""Options of generalized knowledge distillation."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from configs.section import Section


class GKDConfig(Section):
    """Generalized knowledge distillation: a student learns a teacher's distribution. Names are TRL's, or
    ms-swift's where TRL has none."""

    batch_size: int = Field(default=64, ge=1)
    """Samples per optimizer step."""
    beta: float = Field(default=0.5, ge=0, le=1)
    """Divergence: KL(teacher || student) at 0, KL(student || teacher) at 1, Jensen-Shannon between. The ends are
    no limits: towards them the middle form goes to zero, so 0.01 trains a hundred times slower than 0."""
    lmbda: float = Field(default=0.5, ge=0, le=1)
    """Probability that a step trains on the student's own completions; other steps take the dataset's. At 0 the
    run has no engines."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature of completions. TRL and ms-swift take 0.9."""
    loss_temperature: Literal["one", "same"] = "one"
    """Temperature of both distributions in the divergence: 1, as in TRL, or that of sampling, as in ms-swift."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling of completions."""
    top_k: int = Field(default=-1, ge=-1)
    """Sample among the k likeliest tokens; -1 for all."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion."""
    max_completion_length: int = Field(default=512, ge=1)
    """Longest sampled completion in tokens; longer ones are cut."""
    max_empty_steps: int = Field(default=10, ge=1)
    """End with an error after this many on-policy steps in a row whose completions were all aborted or empty."""
    seq_kd: bool = False
    """Take the teacher's own completions of the dataset's prompts in place of the dataset's completions."""
    sft_alpha: float = Field(default=0.0, ge=0)
    """Weight of the cross-entropy that is added on steps that are not on-policy."""
    gkd_logits_topk: int | None = Field(default=None, ge=1)
    """Compare only the teacher's k likeliest tokens; by default the whole vocabulary. A divergence with beta
    above 0 does not see what a student does outside of them. A server has to be asked for some k."""
    gkd_topk_tail: bool = False
    """Count all other tokens as one more outcome; by default both distributions are those among the k."""
    teacher_model_server: str | None = Field(default=None, min_length=1)
    """URL of an OpenAI-compatible server with the teacher, in place of model.teacher_model. It has to answer
    with `prompt_logprobs`, as vLLM's does, of gkd_logits_topk tokens."""
    teacher_model_servers: dict[str, str] = Field(default={})
    """Several teachers: a URL for each value of teacher_column."""
    teacher_column: str | None = Field(default=None, min_length=1)
    """Dataset column that says which of teacher_model_servers is asked about a row."""
    teacher_timeout_s: float = Field(default=240.0, gt=0)
    """How long a teacher's server may take for one request."""
    teacher_retries: int = Field(default=3, ge=0)
    """How often a request is made again that got no answer, or a status of 429 or 500 and above."""
    offload_teacher: bool = False
    """Keep the teacher's weights in host memory but for its own forward pass. Untested on a GPU."""

    @property
    def divergence_temperature(self) -> float:
        """What both models' logits are divided by in the loss."""
        return self.temperature if self.loss_temperature == "same" else 1.0

    @property
    def servers(self) -> dict[str, str]:
        """URLs of teachers by what samples call them; the only one has no name."""
        return {"": self.teacher_model_server} if self.teacher_model_server else self.teacher_model_servers


def check_gkd(gkd: GKDConfig, *, has_teacher_model: bool) -> None:
    """Raises ValueError naming the option that is missing, or that contradicts another."""
    places = [has_teacher_model, gkd.teacher_model_server is not None, bool(gkd.teacher_model_servers)]
    if sum(places) != 1:
        raise ValueError(
            f"model.teacher_model: gkd needs a teacher in one place, there are {sum(places)}; give that or "
            "model.mcore_teacher_model, gkd.teacher_model_server, or gkd.teacher_model_servers"
        )
    for problem in _contradictions(gkd):
        raise ValueError(f"gkd.{problem}")


def _contradictions(gkd: GKDConfig) -> Iterator[str]:
    if gkd.lmbda == 1:
        for name, given in (("sft_alpha", gkd.sft_alpha > 0), ("seq_kd", gkd.seq_kd)):
            if given:
                yield f"{name}: is not used while gkd.lmbda is 1, which makes every step on-policy"
    if gkd.servers and gkd.gkd_logits_topk is None:
        yield "gkd_logits_topk: has to say how many tokens a teacher's server is asked for"
    if gkd.servers and gkd.offload_teacher:
        yield "offload_teacher: a server's teacher is not in the trainer ranks; leave it out"
    if (gkd.teacher_column is None) != (not gkd.teacher_model_servers):
        yield "teacher_column: goes with gkd.teacher_model_servers; give both or none"
    if gkd.seq_kd:
        yield "seq_kd: there is no teacher engine to write completions with; write them to a dataset beforehand"
    if gkd.gkd_topk_tail and gkd.gkd_logits_topk is None:
        yield "gkd_topk_tail: is the tail of gkd.gkd_logits_topk, which is not given"
    if gkd.gkd_topk_tail and gkd.divergence_temperature != 1:
        yield (
            f"gkd_topk_tail: what a teacher's tail is at temperature {gkd.divergence_temperature:g} does not "
            "follow from k tokens; set gkd.loss_temperature to one"
        )

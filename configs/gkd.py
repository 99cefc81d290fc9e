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
    student has no engines."""
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
    """Let the teacher write the completions of steps that are not on-policy, in place of the dataset's. It needs
    teacher.teacher_backend engine."""
    sft_alpha: float = Field(default=0.0, ge=0)
    """Weight of the cross-entropy that is added on steps that are not on-policy."""
    gkd_logits_topk: int | None = Field(default=None, ge=1)
    """Compare only the teacher's k likeliest tokens; by default the whole vocabulary. A divergence with beta
    above 0 does not see what a student does outside of them. Servers and engines have to be asked for some k."""
    gkd_topk_tail: bool = False
    """Count all other tokens as one more outcome; by default both distributions are those among the k."""

    @property
    def divergence_temperature(self) -> float:
        """What both models' logits are divided by in the loss."""
        return self.temperature if self.loss_temperature == "same" else 1.0


def check_gkd(gkd: GKDConfig, teacher: Literal["trainer", "engine", "server"]) -> None:
    """Raises ValueError naming the option that contradicts another, or where the teacher is."""
    for problem in _contradictions(gkd, teacher):
        raise ValueError(f"gkd.{problem}")


def _contradictions(gkd: GKDConfig, teacher: str) -> Iterator[str]:
    if gkd.lmbda == 1:
        for name, given in (("sft_alpha", gkd.sft_alpha > 0), ("seq_kd", gkd.seq_kd)):
            if given:
                yield f"{name}: is not used while gkd.lmbda is 1, which makes every step on-policy"
    if teacher != "trainer" and gkd.gkd_logits_topk is None:
        yield f"gkd_logits_topk: has to say how many tokens a teacher's {teacher} is asked for"
    if gkd.seq_kd and teacher != "engine":
        yield "seq_kd: the teacher has to write completions, so it needs teacher.teacher_backend engine"
    if gkd.gkd_topk_tail and gkd.gkd_logits_topk is None:
        yield "gkd_topk_tail: is the tail of gkd.gkd_logits_topk, which is not given"
    if gkd.gkd_topk_tail and gkd.divergence_temperature != 1:
        yield (
            f"gkd_topk_tail: what a teacher's tail is at temperature {gkd.divergence_temperature:g} does not "
            "follow from k tokens; set gkd.loss_temperature to one"
        )

"""Options of a teacher: where it is, and how it is asked."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from configs.engines import EngineConfig
from configs.section import Section
from configs.web import Url, VariableName

if TYPE_CHECKING:
    from configs.schema import RunConfig


class TeacherConfig(Section):
    """The teacher of gkd, and of grpo with teacher_kl_coef: model.teacher_model, or one behind a URL."""

    teacher_backend: Literal["trainer", "engine"] = "trainer"
    """Where model.teacher_model runs: in the trainer ranks, in the student's layout, or in vLLM engines of its
    own, which never get weights and may have any model that vLLM takes."""
    offload_teacher: bool = False
    """Keep the weights of a teacher in the trainer ranks in host memory but for its own forward pass. Untested on
    a GPU."""
    teacher_model_server: Url | None = None
    """URL of an OpenAI-compatible server with the teacher, in place of model.teacher_model. It has to answer
    with `prompt_logprobs`, as vLLM's does."""
    teacher_model_servers: dict[str, Url] = Field(default={})
    """Several teachers: a URL for each value of teacher_column."""
    teacher_api_key_env: VariableName | None = None
    """Environment variable of the driver with the key that servers want (`Authorization: Bearer`)."""
    teacher_column: str | None = Field(default=None, min_length=1)
    """Dataset column that says which of teacher_model_servers is asked about a row."""
    teacher_timeout_s: float = Field(default=240.0, gt=0)
    """How long a teacher's server may take for one request."""
    teacher_retries: int = Field(default=3, ge=0)
    """How often a request is made again that got no answer, or a status of 429 or 500 and above."""
    engine: EngineConfig = EngineConfig()
    """With teacher_backend engine: how many, and of what size."""

    @property
    def servers(self) -> dict[str, str]:
        """URLs of teachers by what samples call them; the only one has no name."""
        return {"": self.teacher_model_server} if self.teacher_model_server else self.teacher_model_servers


def check_teacher(config: "RunConfig") -> None:
    """Raises ValueError naming the option that is missing, or that contradicts another."""
    for problem in _unused(config) if not config.has_teacher else _wrong(config):
        raise ValueError(problem)


def _unused(config: "RunConfig") -> Iterator[str]:
    why = (
        "is not used while grpo.teacher_kl_coef is 0" if config.algorithm == "grpo" else "is for gkd and grpo"
    )
    model, teacher = config.model, config.teacher
    given = {
        "model.teacher_model": model.teacher_model is not None,
        "model.mcore_teacher_model": model.mcore_teacher_model is not None,
        "teacher.teacher_model_server": teacher.teacher_model_server is not None,
        "teacher.teacher_model_servers": bool(teacher.teacher_model_servers),
        "teacher.teacher_api_key_env": teacher.teacher_api_key_env is not None,
        "teacher.teacher_backend": teacher.teacher_backend != "trainer",
    }
    for name in (name for name, is_given in given.items() if is_given):
        yield f"{name}: {why}; leave it out"


def _wrong(config: "RunConfig") -> Iterator[str]:
    model, teacher = config.model, config.teacher
    has_model = model.teacher_model is not None or model.mcore_teacher_model is not None
    places = [has_model, teacher.teacher_model_server is not None, bool(teacher.teacher_model_servers)]
    if sum(places) != 1:
        who = "gkd" if config.algorithm == "gkd" else "grpo.teacher_kl_coef"
        yield (
            f"model.teacher_model: {who} needs a teacher in one place, there are {sum(places)}; give that or "
            "model.mcore_teacher_model, teacher.teacher_model_server, or teacher.teacher_model_servers"
        )
    if (teacher.teacher_column is None) != (not teacher.teacher_model_servers):
        yield "teacher.teacher_column: goes with teacher.teacher_model_servers; give both or none"
    if config.teacher_place != "trainer" and teacher.offload_teacher:
        yield "teacher.offload_teacher: the teacher is not in the trainer ranks; leave it out"
    if config.algorithm == "grpo" and config.teacher_place != "trainer" and config.grpo.temperature != 1:
        yield (
            f"grpo.temperature: a teacher's {config.teacher_place} tells log-probabilities of temperature 1, "
            f"not {config.grpo.temperature:g}; set it to 1, or teacher.teacher_backend to trainer"
        )
    if teacher.teacher_api_key_env is not None and not teacher.servers:
        yield "teacher.teacher_api_key_env: is for teachers behind a URL; leave it out"
    if teacher.teacher_backend == "engine" and teacher.servers:
        yield "teacher.teacher_backend: a teacher behind a URL is in no engine of this run; leave one of them out"
    if teacher.teacher_backend == "engine" and model.mcore_teacher_model is not None:
        yield (
            "model.mcore_teacher_model: engines read safetensors; make them with `bascule export --to_hf true`, "
            "and give them as model.teacher_model"
        )

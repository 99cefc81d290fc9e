"""The teacher of a run: in the trainer ranks, in engines of its own, or behind URLs."""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.engine_support import check_routing, check_sight, check_workers, language_config
from actors.events import Event
from actors.model_check import check_model
from actors.model_source import ModelSize, ModelSource, find_model, load_tokenizer, model_size, read_contents
from actors.pictures import sight_of
from actors.placement import Reservation
from actors.teacher_server import TeacherServers
from algorithms.data import Prompt, TrainSample
from algorithms.datasets import Row
from algorithms.vision import Sight
from bridge.families import read_hf_config, spec_of
from configs.errors import ConfigError
from configs.schema import RunConfig
from configs.web import bearer

if TYPE_CHECKING:
    from actors.teacher_engines import TeacherEngines


@dataclass(frozen=True, kw_only=True, slots=True)
class Teacher:
    """A model that teaches, and how much it is."""

    source: ModelSource
    size: ModelSize


def find_teacher(config: RunConfig, student: ModelSource, sight: Sight | None = None) -> Teacher | None:
    """The model that teaches, unless there is none or it is behind a URL.

    `sight` is how the student sees, if it does. Raises ConfigError when the teacher does not fit the student's
    layout or vLLM, has not its tokenizer or sees otherwise, and when the key of servers is not there.
    """
    if not config.has_teacher or config.teacher_place == "server":
        if config.has_teacher and sight is not None:
            raise ConfigError(
                "teacher.teacher_model_server: no pictures are sent to servers; give the teacher of a model that "
                "sees as model.teacher_model"
            )
        bearer(config.teacher.teacher_api_key_env, "teacher.teacher_api_key_env")
        return None
    source = find_model(config.model.teacher_model, config.model.mcore_teacher_model, "model.teacher_model")
    if config.teacher_place == "trainer":
        contents = check_model(source, config, has_engines=False).contents
    else:
        _check_engine(source, config)
        contents = read_contents(source)
    check_same_tokens(load_tokenizer(student.directory), load_tokenizer(source.directory), source.directory)
    _check_sight(source, sight)
    return Teacher(source=source, size=model_size(source, contents.tensors))


def source_in_trainer(config: RunConfig, teacher: Teacher | None) -> ModelSource | None:
    """What trainer ranks have to load of it."""
    return teacher.source if teacher is not None and config.teacher_place == "trainer" else None


def _check_engine(source: ModelSource, config: RunConfig) -> None:
    """Raises ConfigError for what vLLM would compute wrongly, or could not."""
    hf_config = read_hf_config(source.directory)
    check_routing(source.directory, hf_config)
    check_sight(source.directory, hf_config)
    workers = config.teacher.engine.tensor_parallel_size
    check_workers(hf_config, workers, "teacher.engine.tensor_parallel_size")
    k = config.gkd.gkd_logits_topk
    vocab_size = language_config(hf_config)["vocab_size"]
    if config.algorithm == "gkd" and k is not None and k > vocab_size:
        raise ConfigError(f"gkd.gkd_logits_topk: {k} is more than the teacher's {vocab_size} tokens")


def check_teacher_room(
    config: RunConfig, teacher: Teacher | None, prompts: Sequence[Prompt], samples: Sequence[TrainSample]
) -> None:
    """Raises ConfigError unless a teacher's engine takes the longest of `samples`, and the longest prompt with the
    longest completion that may come."""
    if teacher is None or config.teacher_place != "engine":
        return
    own = language_config(read_hf_config(teacher.source.directory)).get("max_position_embeddings")
    limit = config.teacher.engine.max_model_len or own
    longest = max((prompt.tokens.size for prompt in prompts), default=None)
    needed = [sample.tokens.size for sample in samples]
    needed += [] if longest is None else [longest + config.max_completion_length]
    # vLLM always samples a token more than it is given.
    if limit is not None and max(needed, default=0) + 1 > limit:
        raise ConfigError(
            f"teacher.engine.max_model_len: {limit} is too short for {max(needed)} tokens and one of vLLM's; "
            f"set it to {max(needed) + 1} or more, if the teacher allows that, or shorten what it reads"
        )


def _check_sight(source: ModelSource, sight: Sight | None) -> None:
    """Raises ConfigError unless the teacher takes as many tokens for a picture, in the same places."""
    if sight is None:
        return
    vision = spec_of(source.directory)[1].vision
    theirs = None if vision is None else sight_of(vision)
    # What templates leave out is put in by the student's.
    sight = replace(sight, encode=None, around=None)
    if theirs is None or replace(theirs, around=None) != sight:
        how = "sees no pictures" if theirs is None else "sees otherwise"
        raise ConfigError(
            f"model.teacher_model: {source.directory} {how}; "
            "the teacher of a model that sees has to have its tokens of pictures, and as many of them for each "
            f"({theirs} is not {sight})"
        )


def check_same_tokens(student: Any, teacher: Any, teacher_directory: Path) -> None:
    """Raises ConfigError unless both tokenizers have the same ids for the same tokens."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    other = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    if other:
        token = other[0]
        raise ConfigError(
            f"model.teacher_model: the tokenizer of {teacher_directory} is not the student's: {len(other)} tokens "
            f"differ, for example {token!r}, which is {_number(ours.get(token))} for the student and "
            f"{_number(theirs.get(token))} for the teacher; a teacher has to have the student's tokenizer"
        )


def _number(token_id: int | None) -> str:
    return "unknown" if token_id is None else f"number {token_id}"


def check_column(rows: Sequence[Row], config: RunConfig) -> None:
    """Raises ConfigError naming a row whose teacher nobody is."""
    column, servers = config.teacher.teacher_column, config.teacher.teacher_model_servers
    if column is None or not config.has_teacher:
        return
    for row in rows:
        if str(row.columns.get(column)) not in servers:
            raise ConfigError(
                f"{row.place}: teacher.teacher_column {column} is {row.columns.get(column)!r} here; "
                f"teacher.teacher_model_servers has {', '.join(servers)}"
            )


def describe_teacher(config: RunConfig, teacher: Teacher | None) -> str:
    """One line: who it is, where, and what of it is compared."""
    k = config.gkd.gkd_logits_topk
    compared = "tokens that were sampled"
    if config.algorithm == "gkd":
        compared = "whole vocabulary" if k is None else f"{k} tokens"
    if teacher is None:
        return f"teacher: at {', '.join(config.teacher.servers.values())}, {compared}"
    name = teacher.source.mcore or teacher.source.directory
    where = "in the trainer ranks"
    if config.teacher_place == "engine":
        where = f"in {config.teacher.engine.num_engines} engine(s) of its own"
    return f"teacher: {name}, {where}, {compared}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """Who is asked outside of the trainer ranks: nobody, servers, or engines, which can write as well."""

    teacher: "TeacherServers | TeacherEngines | None" = None
    engines: "TeacherEngines | None" = None

    def ready(self, timeout_s: float) -> None:
        """Wait for engines that have begun to start. Raises BasculeError."""
        if self.engines is not None:
            self.engines.ready(timeout_s)

    def tracks(self) -> dict[str, Callable[[], Any]]:
        """How to ask engines for their spans (actors.trace)."""
        return {} if self.engines is None else self.engines.tracks()


@contextmanager
def open_teacher(
    config: RunConfig, teacher: Teacher | None, reservation: Reservation, event: Event
) -> Generator[Asked]:
    """Who is asked, until the end of the `with` statement; engines begin to start, and are to be waited for.

    Raises ConfigError when a server does not answer.
    """
    from actors.teacher_engines import create_teacher_engines

    settings, topk = config.teacher, config.gkd.gkd_logits_topk
    if not config.has_teacher or config.teacher_place == "trainer":
        yield Asked()
    elif teacher is None:
        headers = bearer(settings.teacher_api_key_env, "teacher.teacher_api_key_env")
        timeout_s, retries = settings.teacher_timeout_s, settings.teacher_retries
        servers = TeacherServers(
            settings.servers, topk or 0, timeout_s=timeout_s, retries=retries, headers=headers
        )
        yield Asked(teacher=servers)
    else:
        path = str(teacher.source.directory)
        with closing(create_teacher_engines(config, path, reservation, event)) as engines:
            yield Asked(teacher=engines, engines=engines)

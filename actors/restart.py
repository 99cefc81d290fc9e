"""A trainer rank that is lost: the group is started again and goes on from the newest state."""

import time
from collections.abc import Callable

from actors.deadline import ActorLostError, DeadlineExceededError
from actors.ending import EndedEarlyError
from actors.metrics import RunRecorder
from actors.resume import StateKeeper
from actors.stacks import describe_bundle, write_bundle
from actors.trainer import TrainerGroup
from configs.errors import BasculeError
from configs.schema import RunConfig

# Before the first restart, and twice as long before each that follows without a new step.
_BACKOFF_S = 1.0
_LONGEST_BACKOFF_S = 60.0
# For a state that only waits for its name; one that a lost rank was writing will never come.
_SETTLE_S = 20.0


def train_on(
    train: Callable[[], None],
    config: RunConfig,
    trainers: TrainerGroup,
    keeper: StateKeeper,
    recorder: RunRecorder,
    reconnect: Callable[[], None] = lambda: None,
) -> None:
    """Run `train`, a loop that begins after keeper.start; again when trainer ranks are lost on the way.

    Ranks that still live cannot go on: their groups are broken, and a step is done by all or by none. So all are
    ended and started, load the newest state (or, before there is one, the model), and the records are cut to it.
    Engines stay; `reconnect` is called before `train` begins anew, which sends weights first. Raises the error of
    the loop when no rank is lost, or when cluster.max_trainer_restarts are used up without a step that was not
    done before.
    """
    furthest, restarts = keeper.done, 0
    while True:
        try:
            train()
            return
        except EndedEarlyError:
            raise
        except BasculeError as error:
            lost = trainers.find_lost()
            if lost is None:
                raise
            if keeper.done > furthest:
                furthest, restarts = keeper.done, 0
            if restarts == config.cluster.max_trainer_restarts:
                raise type(lost)(_given_up(lost, error, restarts)) from error
            restarts += 1
            start = time.monotonic()
            time.sleep(min(_LONGEST_BACKOFF_S, _BACKOFF_S * 2 ** (restarts - 1)))
            why = _first_line(lost)
            if not isinstance(lost, ActorLostError):
                # It may only wait for a rank that has failed, which said so.
                why += f" (during: {_first_line(error)})"
            if isinstance(lost, DeadlineExceededError):
                # It hangs, and what it does is of interest.
                recorder.line(describe_bundle(write_bundle(keeper.directory, lost)))
            recorder.line(f"warning: {why}; the trainer ranks are started again")
            keeper.settle(_SETTLE_S)
            trainers.restart()
            state = keeper.go_back()
            recorder.go_back(state)
            reconnect()
            where = "from the beginning" if state is None else f"after step {state.step}"
            text = f"trainer ranks were started again in {time.monotonic() - start:.1f} s, the run goes on {where}"
            recorder.line(text)
            recorder.event(None, "restart", f"{text}: {why}", restarts=restarts)


def _first_line(error: BasculeError) -> str:
    return str(error).partition("\n")[0]


def _given_up(lost: BasculeError, error: BasculeError, restarts: int) -> str:
    if not restarts:
        return f"{lost}\n(during: {error})"
    return (
        f"{lost}\n(during: {error})\nThe trainer ranks were started again {restarts} times without getting "
        "further; see cluster.max_trainer_restarts, and events.jsonl"
    )

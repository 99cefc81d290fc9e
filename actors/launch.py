"""Trainers, engines and the bridge between them, started together."""

from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.bridge import WeightBridge
from actors.console import Console
from actors.engine_group import EngineGroup
from actors.engine_start import create_engines
from actors.events import Event
from actors.metrics import warn
from actors.placement import Reservation
from actors.trainer import TrainerGroup
from actors.trainer_rank import Sources
from algorithms.data import Prompt
from configs.schema import RunConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Launched:
    """What a run with engines consists of, holding the first weights."""

    trainers: TrainerGroup
    engines: EngineGroup
    weights: WeightBridge

    def tracks(self) -> dict[str, Callable[[], Any]]:
        """How to ask each process for its spans (actors.trace)."""
        return {**self.trainers.tracks(), **self.weights.tracks(), **self.engines.tracks()}

    def reconnect(self) -> None:
        """The trainers are other processes: what engines do is given up, and the bridge joins them anew."""
        self.engines.give_up()
        self.weights.trainers_restarted()


@contextmanager
def launch(
    config: RunConfig,
    sources: Sources,
    device: str,
    reservation: Reservation,
    directory: Path,
    console: Console,
    *,
    probe: Prompt,
    event: Event,
) -> Generator[Launched]:
    """Start them, at the same time; engines are watched until the end of the `with` statement.

    `probe` is the prompt that bridge.check_logprobs_every scores. Warnings of the trainers go to the console,
    checkpoints and losses to `event`.
    """
    source, adapter = sources.model, sources.adapter
    # What engines are sent in place of the model.
    sent = adapter if config.rollout.vllm_enable_lora else None
    engines = create_engines(
        config,
        str(source.directory),
        reservation.group,
        reservation.indices("engine"),
        with_weights=source.mcore is None,
        max_lora_rank=sent.largest_rank if sent is not None else None,
        lora_modules=sent.leaves if sent is not None else None,
        event=event,
    )
    # Watching engines ends before the run leaves Ray, whatever happens.
    with closing(engines):
        # Both take a good part of a minute on a small machine; neither needs the other.
        starting = engines.start()
        trainers = TrainerGroup(config, reservation, device, sources, directory, event)
        warn(trainers.warnings, console)
        engines.ready(starting, config.cluster.start_timeout_s)
        weights = WeightBridge(
            config,
            reservation,
            trainers,
            engines,
            # An adapter that has been trained before is not in the files that engines read.
            version=0 if source.mcore is None and (adapter is None or adapter.is_new) else None,
            probe=probe.tokens.tolist(),
            vision=probe.vision,
            event=event,
            adapter=None if sent is None else sent.peft_config(source.directory),
        )
        if source.mcore is not None:
            weights.sync(0)
        yield Launched(trainers=trainers, engines=engines, weights=weights)

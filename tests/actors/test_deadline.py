"""Waits for real actors that are late, fail, or die."""

import os
import time
from typing import Any

import pytest
import ray

from actors.deadline import ActorLostError, DeadlineExceededError, get_all
from configs.errors import BasculeError

pytestmark = pytest.mark.e2e
pytest_plugins = ("tests.actors.engine_fixtures",)


@ray.remote(num_cpus=0)
class Actor:
    def wait(self, seconds: float, then: str) -> str:
        time.sleep(seconds)
        match then:
            case "die":
                os._exit(1)
            case "foreign":
                raise RuntimeError("connection closed by peer")
            case "transport":
                # Not above: it brings torch, which the other actors need not import.
                from bridge.transport.gloo import TransportError

                raise TransportError("connection closed by peer")
            case "own":
                raise ComponentError("tensor x does not fit")
        return then


class ComponentError(BasculeError):
    """What a component says of itself."""


def call(*plans: tuple[float, str], timeout_s: float = 60) -> list[Any]:
    actors: list[Any] = [Actor.remote() for _ in plans]
    # Their start takes seconds on a busy machine, and is not what is waited for.
    ray.get([actor.wait.remote(0, "up") for actor in actors])
    names = [f"actor {number}" for number in range(len(plans))]
    refs = [actor.wait.remote(*plan) for actor, plan in zip(actors, plans, strict=True)]
    return get_all(refs, names, timeout_s=timeout_s, phase="test")


def test_results_come_in_order(ray_cluster: str) -> None:
    assert call((0.5, "a"), (0, "b")) == ["a", "b"]


def test_who_is_late_is_named_and_who_is_not_is_not(ray_cluster: str) -> None:
    with pytest.raises(DeadlineExceededError, match=r"test: no answer within 4 s from actor 1$"):
        call((0, "a"), (60, "b"), timeout_s=4)


@pytest.mark.parametrize("peer", ["foreign", "transport"])
def test_the_actor_that_died_is_named_not_the_peer_that_noticed(ray_cluster: str, peer: str) -> None:
    with pytest.raises(ActorLostError, match="actor 1 is gone"):
        call((0, peer), (1, "die"))


def test_a_components_own_error_comes_before_broken_connections(ray_cluster: str) -> None:
    with pytest.raises(ComponentError, match="tensor x does not fit"):
        call((0, "transport"), (0, "foreign"), (1, "own"))


def test_foreign_errors_keep_phase_owner_and_message(ray_cluster: str) -> None:
    with pytest.raises(BasculeError, match=r"test: actor 0 failed with RuntimeError\('connection closed"):
        call((0, "foreign"), (0, "a"))

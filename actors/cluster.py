"""Joining a Ray cluster, or starting one on this machine for the time of a run."""

import logging
import os
import re
import socket
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private.authentication.authentication_utils import is_token_auth_enabled

from actors.env import resolve_device
from configs.errors import BasculeError, ConfigError
from configs.schema import ClusterConfig, RunConfig

# Workers of a busy two-core machine need longer than Ray's 30 s to register.
_PATIENCE = {"RAY_raylet_start_wait_time_s": "180", "RAY_worker_register_timeout_seconds": "180"}
_PROBE_S = 15.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """What the run is connected to."""

    local: bool
    """Started by this process: it will not grow, and it ends with the run."""
    address: str
    """Where other processes find it."""
    job: str
    """What Ray calls the run."""
    wants_token: bool
    """Whether it answers only those who show its token."""
    logs: Path
    """Where Ray keeps what the actors print, on each node."""


def device_of(config: RunConfig) -> str:
    """`cpu` or `cuda` of the run's ranks and engines; see resolve_device. Raises ConfigError."""
    return resolve_device(config.model.device, elsewhere=address_of(config.cluster) is not None)


def address_of(cluster: ClusterConfig) -> str | None:
    """Where the Ray is that a run joins; None when it starts its own."""
    return cluster.address or os.environ.get("RAY_ADDRESS")


@contextmanager
def connect(cluster: ClusterConfig) -> Generator[Cluster]:
    """Connected while the body runs. Everything the run started is gone afterwards, also after an error.

    Raises BasculeError when the address does not answer.
    """
    address = address_of(cluster)
    if address and address.startswith("ray://"):
        raise ConfigError(
            f"cluster.address: {address} is a Ray client's; submit the run with `ray job submit`"
        )
    try:
        if address:
            _probe(address)
            context: Any = ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            for name, value in _PATIENCE.items():
                os.environ.setdefault(name, value)
            context = ray.init(
                address="local",
                num_cpus=cluster.num_cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    # Ray raises errors of every type, a bare Exception where its own processes do not come up in time.
    except Exception as error:
        where = f"at {address}" if address else "on this machine"
        raise BasculeError(f"Ray {where} does not answer: {error}") from error
    try:
        info = context.address_info
        logs = Path(info["session_dir"]) / "logs"
        yield Cluster(
            local=not address,
            address=info["gcs_address"],
            job=ray.get_runtime_context().get_job_id(),
            wants_token=is_token_auth_enabled(),
            logs=logs,
        )
    finally:
        ray.shutdown()


def _probe(address: str) -> None:
    """Raises OSError when nothing listens there; Ray itself would go on trying for minutes."""
    match = re.fullmatch(r"\[?([^/\]]+?)\]?:(\d+)", address)
    if match:
        socket.create_connection((match[1], int(match[2])), timeout=_PROBE_S).close()

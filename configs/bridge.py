"""The way of weights from trainers to engines."""

from typing import Literal

from pydantic import Field

from configs.section import Section


class BridgeConfig(Section):
    """The way of weights from trainers to engines; see docs/weight-sync.md."""

    bucket_size_mb: float = Field(default=64.0, gt=0)
    """Tensors travel in buckets of at most this size; a larger tensor is cut."""
    transport: Literal["gloo", "cupy_nccl"] = "gloo"
    """From the bridge to engines: through host memory, or from GPU to GPU, which is untested on a GPU."""
    placement: Literal["dedicated", "trainer"] = "dedicated"
    """An actor of its own, or inside trainer rank 0, which needs no further device."""
    offload_bridge: bool = False
    """Keep the last complete version in the bridge's host memory: a lost engine gets it without the trainers."""
    pause_mode: Literal["keep", "abort"] = "keep"
    """What completions in flight do at a sync: go on with the new weights, or start over from what they have."""
    hash_every: int = Field(default=1, ge=1)
    """Hash the content of one bucket of this many in each sync, another one each time; 1 proves all of them."""
    skip_unchanged: bool = False
    """Send only modules whose content changed, found by a second pass over the trainers' weights. What is not
    trained is sent once anyway."""
    check_logprobs_every: int = Field(default=0, ge=0)
    """Every this many syncs compare a prompt's log-probabilities in trainer and engine, and log it; 0 never."""
    stall_timeout_s: float = Field(default=60.0, gt=0)
    """A sync in which nothing moves for this long is ended, and made again without the one who is late."""
    max_recoveries: int = Field(default=3, ge=0)
    """How often in a run lost engines or a lost bridge are replaced before the run ends with an error."""


def check_bridge(bridge: BridgeConfig, collective_timeout_s: float) -> None:
    """Raises ValueError naming the option that contradicts another."""
    if bridge.hash_every > 1 and (bridge.offload_bridge or bridge.skip_unchanged):
        raise ValueError(
            "bridge.hash_every: must be 1 with offload_bridge or skip_unchanged, which rely on every hash"
        )
    if bridge.stall_timeout_s >= collective_timeout_s:
        raise ValueError(
            f"bridge.stall_timeout_s: {bridge.stall_timeout_s:g} has to be below cluster.collective_timeout_s "
            f"{collective_timeout_s:g}, at which transfers end without a word on who was late"
        )

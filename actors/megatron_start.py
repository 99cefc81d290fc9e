"""How a process becomes a Megatron rank, under Ray or without. Imports Megatron only when it is called."""

from typing import cast

from actors.heavy_imports import uncollected
from configs.schema import LayoutConfig


def start_rank(
    layout: LayoutConfig,
    *,
    rank: int,
    world_size: int,
    address: str,
    timeout_s: float,
    seed: int,
    device: str,
) -> None:
    """Install what Megatron needs on a CPU, then join the group at `address`; every rank must call it.

    Nothing may have imported Megatron before. `address` is an init_method of torch.distributed. Raises
    BasculeError when the sizes do not fit, or when the ranks do not all come within `timeout_s`.
    """
    with uncollected():
        if device == "cpu":
            from actors.megatron_cpu import install

            install()
        from actors.megatron_setup import Device, initialize_megatron

    initialize_megatron(
        layout,
        rank=rank,
        world_size=world_size,
        init_method=address,
        timeout_s=timeout_s,
        seed=seed,
        device=cast("Device", device),
    )

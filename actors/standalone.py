"""Megatron without Ray: this process alone, or the processes that torchrun started."""

import os
from typing import TYPE_CHECKING, Any, cast

import torch

from actors.env import resolve_device
from actors.megatron_start import start_rank
from bridge.model_bridge import ModelBridge
from configs.schema import LayoutConfig

if TYPE_CHECKING:
    from actors.megatron_setup import Device

_TIMEOUT_S = 600.0


def start_megatron(layout: LayoutConfig, *, device: str = "auto", seed: int = 42) -> str:
    """Set up torch.distributed and Megatron's process groups; returns the device, `cpu` or `cuda`.

    Under torchrun every process calls it, and the layout's sizes multiply to their number. Call it before
    anything imports megatron.core. Raises BasculeError when the sizes do not fit.
    """
    device = resolve_device(device)
    alone = "RANK" not in os.environ
    if device == "cuda" and not alone:
        # NCCL takes the current device, which is the first one on every rank. Not yet run on GPUs.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    start_rank(
        layout,
        rank=0 if alone else int(os.environ["RANK"]),
        world_size=1 if alone else int(os.environ["WORLD_SIZE"]),
        # Port 0: any that is free, since nobody else has to find it.
        address="tcp://127.0.0.1:0" if alone else "env://",
        timeout_s=_TIMEOUT_S,
        seed=seed,
        device=device,
    )
    return device


def build_model(bridge: ModelBridge, layout: LayoutConfig, *, device: str = "auto") -> list[Any]:
    """This rank's part of the bridge's model: one GPTModel, or one for each virtual pipeline stage.

    In the checkpoint's type; parameters hold whatever the memory held. Raises ConfigError when the model does
    not fit the layout.
    """
    from actors.megatron_setup import build_chunks, transformer_config
    from bridge.fit import check_layout

    check_layout(bridge.spec, layout, training=False)
    config = transformer_config(layout, bridge.dtype, bridge.spec, cast("Device", resolve_device(device)))
    return list(build_chunks(config, bridge.spec, mtp=bridge.has_mtp))

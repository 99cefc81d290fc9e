"""AdamW in the shape Megatron's optimizers expect, on torch's own kernels."""

from typing import Any

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw


class FusedAdamW(torch.optim.Optimizer):
    """Adam with `step` in the parameter group, as Apex and Transformer Engine keep it.

    Megatron's checkpoints of the distributed optimizer rely on that place. With `adam_w_mode` weight decay is
    decoupled (AdamW), otherwise it is added to the gradient.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": True,
        }
        super().__init__(params, defaults)
        self._update = adamw if adam_w_mode else adam

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            done = group.get("step", 0)
            group["step"] = done + 1
            trained = [param for param in group["params"] if param.grad is not None]
            if trained:
                self._update_group(group, trained, done)

    def _update_group(self, group: dict[str, Any], params: list[torch.Tensor], done: int) -> None:
        for param in params:
            state = self.state[param]
            if not state:
                state["exp_avg"] = torch.zeros_like(param)
                state["exp_avg_sq"] = torch.zeros_like(param)
        self._update(
            params,
            [param.grad for param in params if param.grad is not None],
            [self.state[param]["exp_avg"] for param in params],
            [self.state[param]["exp_avg_sq"] for param in params],
            [],
            # The kernel counts one step up itself.
            [torch.tensor(float(done)) for _ in params],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

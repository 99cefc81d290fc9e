"""How evenly the tokens of an optimizer step are spread over experts: measured, and made part of the loss.

For a layer with E experts of which a token gets k,

    load-balancing loss = E sum_i f_i P_i        z-loss = mean over tokens of logsumexp(logits)^2

f_i is the share of the T k choices that fell on expert i, P_i the mean of its scores among all experts. Both are
of the T tokens of the samples of the whole optimizer step, prompts included. Sources: Fedus et al. 2021 (Switch),
Qiu et al. 2025 (shares of the global batch), Zoph et al. 2022 (z-loss).

No gradient flows through f_i. So once it is counted, in a forward pass over the step, the rest is a sum over
tokens, and its gradient does not depend on micro-batches. Megatron's own losses take f_i from a micro-batch, or
from those that came before.

On a machine without CUDA, actors.megatron_cpu.install() must have run before this module is imported.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

from configs.schema import TrainerConfig

Routing = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class ExpertBalance:
    """The experts' load in a step, of a model whose layers have some; without experts nothing happens."""

    def __init__(
        self, chunks: Sequence[GPTModel], config: TransformerConfig, settings: TrainerConfig
    ) -> None:
        """Takes its place in front of every router's `routing`."""
        self._config = config
        self._coefficients = settings.moe_aux_loss_coeff, settings.moe_z_loss_coeff
        routers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, TopKRouter)]
        self._layers = [_Layer(router) for router in routers]

    @contextmanager
    def of_step(self, forward: Callable[[], None]) -> Generator[dict[str, float]]:
        """While it lasts, the training passes of one optimizer step; every rank must enter.

        Metrics of the step are there at its end, the same on every rank. With coefficients, `forward` is called
        first: a pass over all micro-batches of the step.
        """
        found: dict[str, float] = {}
        if self._config.num_moe_experts is None:
            yield found
            return
        try:
            if any(self._coefficients):
                self._measure(True)
                forward()
                self._measure(False)
                found |= self._settle()
                yield found
            else:
                self._measure(True)
                yield found
                found |= self._settle()
        finally:
            for layer in self._layers:
                layer.reset()

    def _measure(self, on: bool) -> None:
        for layer in self._layers:
            layer.measuring = on

    def _settle(self) -> dict[str, float]:
        """Add up what all ranks have measured; with coefficients, layers know from now on what to add."""
        experts, topk = self._config.num_moe_experts, self._config.moe_router_topk
        assert experts is not None, "there are experts"
        device = next(iter(self._layers)).sums.device if self._layers else _device()
        table = torch.zeros(self._config.num_layers, 2 * experts + 2, dtype=torch.float64, device=device)
        for layer in self._layers:
            table[layer.number] = layer.sums
        dist.all_reduce(table)
        counts_LE, scores_LE, squares_L1, tokens_L1 = table.split([experts, experts, 1, 1], dim=1)
        shares_LE = counts_LE / (topk * tokens_L1)
        if any(self._coefficients):
            for layer in self._layers:
                layer.weigh(shares_LE[layer.number], tokens_L1[layer.number], *self._coefficients)
        mixed = tokens_L1[:, 0] > 0
        load_LE = experts * shares_LE[mixed]
        means = scores_LE[mixed] / tokens_L1[mixed]
        return {
            "moe/load_balancing_loss": float((load_LE * means).sum(dim=1).mean()),
            "moe/z_loss": float((squares_L1[mixed] / tokens_L1[mixed]).mean()),
            "moe/expert_load_max": float(load_LE.max()),
            "moe/expert_load_min": float(load_LE.min()),
        }


class _Layer:
    """A router, and what is counted and added where it routes."""

    def __init__(self, router: TopKRouter) -> None:
        number: Any = router.layer_number
        self.number = int(number) - 1
        self.measuring = False
        self._router = router
        self._routing: Routing = router.routing
        self._weights_E: torch.Tensor | None = None
        self._z_weight = 0.0
        self.reset()
        # An attribute of this object, in front of its class's method.
        router.routing = self.routing  # pyright: ignore[reportAttributeAccessIssue]

    def reset(self) -> None:
        """Forget the step."""
        experts = self._router.weight.shape[0]
        self.measuring = False
        self._weights_E = None
        # Per expert the tokens that chose it and the sum of its scores; the sum of squares; tokens.
        self.sums = torch.zeros(2 * experts + 2, dtype=torch.float64, device=self._router.weight.device)

    def weigh(self, shares_E: torch.Tensor, tokens: torch.Tensor, aux_coeff: float, z_coeff: float) -> None:
        """From now on the loss has this layer's terms, given the shares of a step of as many tokens."""
        self._weights_E = (aux_coeff * len(shares_E) * shares_E / tokens).float()
        self._z_weight = z_coeff / float(tokens)

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the router's own."""
        # Without the mask: 0.16.1 cannot take it with an expert bias, and needs it for its own losses only.
        probs, chosen_TE = self._routing(logits)
        is_trained = self._weights_E is not None and self._router.training and torch.is_grad_enabled()
        if not (self.measuring or is_trained):
            return probs, chosen_TE
        assert padding_mask is not None, "the schedule passes it on to models with experts"
        kept_T = ~padding_mask.reshape(-1)
        logits_TE = logits.reshape(-1, logits.shape[-1]).float()[kept_T]
        scores_TE, squares_T = self._scores(logits_TE), torch.logsumexp(logits_TE, dim=1).square()
        if self.measuring:
            with torch.no_grad():
                parts = [chosen_TE[kept_T].sum(dim=0), scores_TE.sum(dim=0), squares_T.sum()[None]]
                self.sums += torch.cat([*(part.double() for part in parts), kept_T.sum()[None].double()])
        if is_trained:
            assert self._weights_E is not None
            terms = (scores_TE * self._weights_E).sum() + self._z_weight * squares_T.sum()
            # Gives the terms a gradient of 1 where the probabilities get theirs, also in recomputed layers.
            probs = MoEAuxLossAutoScaler.apply(probs, terms)
        return probs, chosen_TE

    def _scores(self, logits_TE: torch.Tensor) -> torch.Tensor:
        """What the router makes of the logits, so that the scores of a token add up to 1."""
        if self._router.score_function == "softmax":
            return torch.softmax(logits_TE, dim=1)
        scores_TE = torch.sigmoid(logits_TE)
        return scores_TE / scores_TE.sum(dim=1, keepdim=True)


def _device() -> torch.device:
    cuda = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")

"""What LoRA on Megatron is compared with: peft, and where peft has no adapter W + s B A by hand.

peft cannot adapt an expert of transformers' packed ones, nor a router.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import megatron_vision
import peft
import torch
import transformers as hf
from megatron_families import CONFIGS, SIGHTED, build
from megatron_worker_reference import (
    BETAS,
    EPS,
    LR,
    WEIGHT_DECAY,
    make_sequences,
    num_loss_tokens,
    reference_logprobs,
    row_loss,
)

from bridge.adapter_config import AdapterConfig
from tests.bridge.family_models import megatron_tensors

CLIP_GRAD = 0.02
PREFIX = "base_model.model."
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
RANKS = {"k_proj": 2, r"layers\.1\.self_attn\.q_proj": 5, "up_proj": 4}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model, and what of it is adapted."""

    family: str
    config: AdapterConfig
    with_peft: bool


def _case(family: str, *targets: str, with_peft: bool = True, **settings: Any) -> Case:
    config = AdapterConfig(**{"r": 3, "lora_alpha": 5, "target_modules": targets, **settings})
    return Case(family=family, config=config, with_peft=with_peft)


CASES = {
    "llama": _case("llama", *ATTENTION, *MLP, "embed_tokens", "lm_head", rank_pattern=RANKS),
    "llama-qv": _case("llama", "q_proj", "v_proj", use_rslora=True),
    "llama-up": _case("llama", "k_proj", "up_proj", "lm_head"),
    "llama-saved": _case("llama", "q_proj", "down_proj", modules_to_save=("embed_tokens", "lm_head")),
    "qwen2-last": _case("qwen2-tied", "q_proj", "down_proj", layers_to_transform=(3,)),
    "one-group": _case("qwen3-1-group", *ATTENTION),
    "latent": _case("deepseek_v3", *LATENT, alpha_pattern={"o_proj": 9}),
    "qwen3_moe": _case("qwen3_moe", "q_proj", "gate", *MLP, with_peft=False, rank_pattern=RANKS),
    "deepseek_v3": _case("deepseek_v3", *LATENT, "gate", *MLP, with_peft=False),
    # Tower, aligner and language model; "0" and "2" are their last names in a list.
    "qwen2_5_vl": _case("qwen2_5_vl", *ATTENTION, *MLP, "qkv", "attn.proj", "mlp.0", "mlp.2"),
    "internvl": _case("internvl", "q_proj", "fc1", "projection_layer", "linear_1"),
}


def hf_model(family: str) -> hf.PreTrainedModel:
    """transformers' model without layers for multi-token prediction, which it does not build."""
    config = type(CONFIGS[family]).from_dict(CONFIGS[family].to_dict())
    if "num_nextn_predict_layers" in config.to_dict():
        config.num_nextn_predict_layers = 0
    return build(config)


@cache
def weights(family: str) -> dict[str, torch.Tensor]:
    """Whole Megatron tensors of the base model."""
    model = hf_model(family)
    return {name: value.detach().clone() for name, value in megatron_tensors(model, model.config).items()}


def value(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of the adapter before the first step, the same in every process."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:6])
    return 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class ByHand:
    """The model with W + s B A for every adapted W, as a function of A and B."""

    def __init__(self, model: hf.PreTrainedModel, config: AdapterConfig) -> None:
        self.model, self.config = model.requires_grad_(False), config
        self.linears = {
            module: weight for module, weight in _linears(model).items() if config.targets(module)
        }
        self.factors: dict[str, torch.Tensor] = {}
        for module, weight in self.linears.items():
            out, inside = weight.shape[::-1] if module.endswith("embed_tokens") else weight.shape
            rank = config.rank_of(module)
            for key, shape in zip(_keys(module), ((rank, inside), (out, rank)), strict=True):
                self.factors[key] = value(key, shape).requires_grad_()

    def __call__(self, tokens: torch.Tensor) -> Any:
        adapted = {module: weight + self._delta(module) for module, weight in self.linears.items()}
        everything = _linears(self.model) | adapted
        changed: dict[str, torch.Tensor] = {}
        for name, _ in self.model.named_parameters():
            if ".experts." in name:
                changed[name] = _packed(name, everything)
            elif name.removesuffix(".weight") in adapted:
                changed[name] = adapted[name.removesuffix(".weight")]
        return torch.func.functional_call(self.model, changed, (tokens,))

    def _delta(self, module: str) -> torch.Tensor:
        key_A, key_B = _keys(module)
        delta = self.config.scale_of(module) * self.factors[key_B] @ self.factors[key_A]
        return delta.T if module.endswith("embed_tokens") else delta


def _keys(module: str) -> tuple[str, str]:
    if module.endswith("embed_tokens"):
        return f"{PREFIX}{module}.lora_embedding_A", f"{PREFIX}{module}.lora_embedding_B"
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def _linears(model: hf.PreTrainedModel) -> dict[str, torch.Tensor]:
    """Every matrix by the name of its module on disk; packed experts one by one."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        path, _, kind = name.rpartition(".")
        if kind in ("gate_up_proj", "down_proj"):
            for number, matrix in enumerate(parameter):
                parts = matrix.chunk(2) if kind == "gate_up_proj" else (matrix,)
                names = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
                found |= {f"{path}.{number}.{leaf}": part for leaf, part in zip(names, parts, strict=True)}
        elif parameter.ndim == 2:
            found[path] = parameter
    return found


def _packed(name: str, linears: dict[str, torch.Tensor]) -> torch.Tensor:
    path, _, kind = name.rpartition(".")
    leaves = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    count = sum(module.startswith(f"{path}.") and module.endswith(".down_proj") for module in linears)
    return torch.stack(
        [torch.cat([linears[f"{path}.{number}.{leaf}"] for leaf in leaves]) for number in range(count)]
    )


def by_peft(model: hf.PreTrainedModel, config: AdapterConfig) -> tuple[Any, dict[str, torch.Tensor]]:
    """peft's model, and its trainable parameters by the names in its files."""
    settings = {name: getattr(config, name) for name in ("r", "lora_alpha", "use_rslora")}
    layers = config.layers_to_transform
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(
            **settings,
            target_modules=list(config.target_modules),
            rank_pattern=dict(config.rank_pattern),
            alpha_pattern=dict(config.alpha_pattern),
            layers_to_transform=list(layers) if layers else None,
            modules_to_save=list(config.modules_to_save) or None,
        ),
    ).eval()
    factors: dict[str, torch.Tensor] = {
        name.replace(".modules_to_save", "").replace(".default", ""): parameter
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }
    with torch.no_grad():
        for key, parameter in factors.items():
            parameter.copy_(value(key, tuple(parameter.shape)))
    return adapted, factors


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Of one optimizer step: the loss, the norm before clipping, the clipped gradients, the factors after it."""

    loss: float
    norm: float
    grads: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]


@cache
def reference(name: str) -> SimpleNamespace:
    """`steps` (three) of torch's AdamW, and `logprobs` of every sequence before the first."""
    case = CASES[name]
    model: Any = hf_model(case.family)
    forward: Any
    if case.with_peft:
        forward, factors = by_peft(model, case.config)
    else:
        forward = ByHand(model, case.config)
        factors = forward.factors
    sighted = case.family in SIGHTED
    rows = (
        megatron_vision.make_sequences(CONFIGS[case.family])
        if sighted
        else make_sequences(model.config.vocab_size)
    )
    optimizer = torch.optim.AdamW(
        list(factors.values()), lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY
    )
    with torch.no_grad():
        logprobs = [reference_logprobs(forward, row) for row in rows]
    first = {key: factor.detach().clone() for key, factor in factors.items()}
    steps = [_step(forward, factors, optimizer, rows) for _ in range(3)]
    return SimpleNamespace(rows=rows, steps=steps, logprobs=logprobs, first=first)


def _step(forward: Any, factors: dict[str, torch.Tensor], optimizer: Any, rows: list[Any]) -> Step:
    optimizer.zero_grad()
    parts = [row_loss(reference_logprobs(forward, row), row)[0] for row in rows]
    loss = torch.stack(parts).sum() / num_loss_tokens(rows)
    loss.backward()
    grads: dict[str, torch.Tensor] = {}
    for key, factor in factors.items():
        # Of an expert without a token there is none; Megatron's is zero.
        grads[key] = torch.zeros_like(factor) if factor.grad is None else factor.grad
        factor.grad = grads[key]
    norm = float(torch.nn.utils.clip_grad_norm_(list(factors.values()), CLIP_GRAD))
    optimizer.step()
    return Step(
        loss=float(loss.detach()),
        norm=norm,
        grads={key: grad.clone() for key, grad in grads.items()},
        after={key: factor.detach().clone() for key, factor in factors.items()},
    )

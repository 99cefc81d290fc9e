"""A model family is a table of rules and the translation of its config; the tables are made of this."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bridge.layouts import Layout
from configs.errors import BasculeError, ConfigError
from configs.schema import TrainerConfig


class RuleError(BasculeError):
    """Parameters without a rule, or tensors that no rule reads. Names them."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A Megatron parameter, the HF tensors it is made of, and how. `{L}` is the global layer number."""

    mcore: str
    hf: tuple[str, ...]
    layout: Layout


@dataclass(frozen=True, kw_only=True, slots=True)
class MegatronSpec:
    """What Megatron needs to know to build the model.

    `transformer` are keyword arguments of TransformerConfig; the rest goes to GPTModel.
    `rope_scaling_factor` is the factor of Llama 3's scaling, None without it.
    """

    transformer: Mapping[str, Any]
    vocab_size: int
    max_sequence_length: int
    rotary_base: float
    rope_scaling_factor: float | None
    tie_word_embeddings: bool

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return self.transformer["num_layers"]

    @property
    def num_query_groups(self) -> int:
        """Key-value heads."""
        return self.transformer["num_query_groups"]

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.transformer["kv_channels"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """All there is to know about a model family."""

    model_types: tuple[str, ...]
    rules: tuple[Rule, ...]
    megatron: Callable[[Mapping[str, Any]], MegatronSpec]
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    """Endings of HF names that hold nothing to train."""

    def rule_for(self, mcore_name: str) -> tuple[Rule, tuple[str, ...]] | None:
        """The rule of a parameter with its global name, and the HF names with the layer filled in."""
        for rule in self.rules:
            pattern = re.escape(rule.mcore).replace(r"\{L\}", r"(?P<L>\d+)")
            match = re.fullmatch(pattern, mcore_name)
            if match:
                layer = match.groupdict().get("L", "")
                return rule, tuple(name.replace("{L}", layer) for name in rule.hf)
        return None

    def to_read(self, spec: MegatronSpec, hf_names: Iterable[str]) -> list[str]:
        """HF names that must be read: no buffers, and not a tied model's copy of its embedding."""
        names = [name for name in hf_names if not name.endswith(self.ignored)]
        return [name for name in names if not (spec.tie_word_embeddings and name == "lm_head.weight")]


def check_layout(spec: MegatronSpec, trainer: TrainerConfig) -> None:
    """Raises ConfigError when the parallel layout does not divide the model, listing all that is wrong."""
    tp, pp = trainer.tensor_model_parallel_size, trainer.pipeline_model_parallel_size
    shape = spec.transformer
    parts = (
        ("attention heads", shape["num_attention_heads"], "tensor_model_parallel_size", tp),
        ("query groups (key-value heads)", spec.num_query_groups, "tensor_model_parallel_size", tp),
        ("feed-forward size", shape["ffn_hidden_size"], "tensor_model_parallel_size", tp),
        ("layers", spec.num_layers, "pipeline_model_parallel_size", pp),
    )
    wrong = [
        f"trainer.{option} {size} does not divide the model's {count} {what}"
        for what, count, option, size in parts
        if count % size
    ]
    if wrong:
        raise ConfigError("; ".join(wrong))

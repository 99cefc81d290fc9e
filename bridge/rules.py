"""A model family is a table of rules and the translation of its config; the tables are made of this."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bridge.layouts import Layout, Replicated
from configs.errors import ConfigError


class RuleError(ConfigError):
    """Parameters without a rule, or tensors that no rule reads. Names them."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A Megatron parameter, the HF tensors it is made of, and how.

    Placeholders stand for numbers: `{L}` the global layer, `{E}` the global expert, `{M}` the
    multi-token-prediction layer, and in HF names also `{N}`, the number of decoder layers plus `{M}`.
    Several rules for one parameter are alternatives, for checkpoints that name or pack the same weights
    differently; the first whose HF tensors are all there is used, and the first one where there is none yet.
    A rule whose parameter a model does not have is simply not used.
    """

    mcore: str
    hf: tuple[str, ...]
    layout: Layout


@dataclass(frozen=True, slots=True)
class Copy:
    """An HF tensor that repeats another: not read on load (but compared), and written again on save."""

    hf: str
    original: str


@dataclass(frozen=True, slots=True)
class HfModule:
    """A module that is Hugging Face's in Megatron's model too: whole on every rank that has it, its names kept.

    `mcore` and `hf` are what comes before its own names; several in `hf` are alternatives, as for rules.
    """

    mcore: str
    hf: tuple[str, ...]

    def matches(self, mcore_name: str) -> list["Match"]:
        """The alternatives for one of its parameters."""
        names = [prefix + mcore_name.removeprefix(self.mcore) for prefix in self.hf]
        return [
            Match(rule=Rule(mcore_name, (name,), Replicated()), hf_names=(name,), expert=None)
            for name in names
        ]


@dataclass(frozen=True, slots=True)
class Match:
    """A rule that fits a parameter: its HF names filled in, and the global expert number if it has one."""

    rule: Rule
    hf_names: tuple[str, ...]
    expert: int | None


class _Pattern:
    """A rule made ready to be filled in often: its HF names have positions in place of placeholders."""

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        placeholders = [part for part in rule.mcore.split(".") if part in _NUMBERS]
        self._expert = placeholders.index("{E}") if "{E}" in placeholders else None
        self._mtp_layer = placeholders.index("{M}") if "{M}" in placeholders else None
        positions = {name: f"{{{number}}}" for number, name in enumerate([*placeholders, "{N}"])}
        self._names = [_fill(name, positions) for name in rule.hf]

    def match(self, numbers: Sequence[int], num_layers: int) -> Match:
        """With the numbers of a parameter's name."""
        values = numbers if self._mtp_layer is None else [*numbers, numbers[self._mtp_layer] + num_layers]
        return Match(
            rule=self._rule,
            hf_names=tuple([name.format(*values) for name in self._names]),
            expert=None if self._expert is None else numbers[self._expert],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionSpec:
    """Vision tower and aligner of a model that sees, and how their features get into the language model.

    `tower` is the class, with its module, and `config` what it is built from. A grid of T x H x W patches becomes
    T x H x W / spatial_merge_size^2 tokens, in place of `image_token_id` or `video_token_id`. Features of
    `deepstack` layers of the tower are added after as many first layers of the decoder. `aligner` are the names in
    the tower of what translates its features, `hf_modules` what transformers calls it all. Tokens have three
    positions where `mrope_section` says how a head's frequencies are shared among them, else one. Frames of a
    video are `tokens_per_second` positions apart for each second, or 1 where it is None; with `timestamps` each is
    a picture of its own behind a text, between tokens `marks`. `tile`: pixels of a tile (height, width), for a
    model that sees an image as tiles of one size; None where it sees patches of the whole.
    """

    tower: str
    config: Mapping[str, Any]
    image_token_id: int
    video_token_id: int
    spatial_merge_size: int
    aligner: tuple[str, ...]
    hf_modules: tuple[str, ...] = ("visual",)
    mrope_section: tuple[int, int, int] | None = None
    mrope_interleaved: bool = False
    deepstack: int = 0
    tokens_per_second: float | None = None
    timestamps: bool = False
    marks: tuple[int, int] | None = None
    tile: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class MegatronSpec:
    """What Megatron needs to know to build the model.

    `transformer` are keyword arguments of TransformerConfig (of MLATransformerConfig where
    `multi_latent_attention` is among them), with `activation` ("silu" or "quick_gelu") for the function; the
    rest goes to GPTModel. `rope_scaling_factor` is the factor of Llama 3's scaling, None without it. `yarn`
    are the yarn_* values of a model whose attention is not MLA, None without YaRN (MLA has its own, in
    `transformer`). `post_norms`: norms also after attention and MLP (GLM-4). `mtp_layers`: the checkpoint's
    multi-token-prediction layers. `vision`: what a model has that sees images.
    """

    transformer: Mapping[str, Any]
    vocab_size: int
    max_sequence_length: int
    rotary_base: float
    tie_word_embeddings: bool
    rope_scaling_factor: float | None = None
    rotary_percent: float = 1.0
    yarn: Mapping[str, Any] | None = None
    post_norms: bool = False
    mtp_layers: int = 0
    vision: VisionSpec | None = None

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

    @property
    def num_experts(self) -> int:
        """Routed experts of a layer; 0 in a dense model."""
        return self.transformer.get("num_moe_experts") or 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """All there is to know about a model family."""

    model_types: tuple[str, ...]
    rules: tuple[Rule, ...]
    megatron: Callable[[Mapping[str, Any]], MegatronSpec]
    copies: tuple[Copy, ...] = ()
    """Besides the head of a tied model, which is one everywhere."""
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    """Endings of HF names that hold nothing to train; a save carries them over from the source."""
    modules: tuple[HfModule, ...] = ()
    """Those that Megatron's model has as they are."""

    _by_shape: dict[str, list[_Pattern]] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Sort the rules by name without numbers: there are many parameters to look up."""
        for rule in self.rules:
            shape = ".".join("#" if part in _NUMBERS else part for part in rule.mcore.split("."))
            self._by_shape.setdefault(shape, []).append(_Pattern(rule))

    def matches(self, mcore_name: str, num_layers: int) -> list[Match]:
        """The alternatives for a parameter with its global name; none when no rule fits."""
        for module in self.modules:
            if mcore_name.startswith(module.mcore):
                return module.matches(mcore_name)
        shape, numbers = _without_numbers(mcore_name)
        return [pattern.match(numbers, num_layers) for pattern in self._by_shape.get(shape, ())]

    def copies_in(self, spec: MegatronSpec, hf_names: Iterable[str]) -> dict[str, str]:
        """Names among `hf_names` that repeat another tensor, and the name of that one."""
        present = set(hf_names)
        embedding = self._embedding(present)
        heads = [rule.hf[0] for rule in self.rules if rule.mcore == _HEAD]
        possible = dict.fromkeys(heads, embedding) if spec.tie_word_embeddings else {}
        possible |= self._mtp_copies(spec)
        return {
            name: embedding if original not in present or original in possible else original
            for name, original in possible.items()
            if name in present
        }

    def implied_copies(self, spec: MegatronSpec, hf_names: Iterable[str]) -> dict[str, str]:
        """The copies that a checkpoint with `hf_names` should have besides, where it has MTP layers."""
        present = set(hf_names)
        return {
            name: original if original in present else self._embedding(present)
            for name, original in self._mtp_copies(spec).items()
            if any(other.startswith(f"model.layers.{spec.num_layers}.") for other in present)
        }

    def _embedding(self, present: Collection[str]) -> str:
        """What the checkpoint calls the embedding."""
        names = [rule.hf[0] for rule in self.rules if rule.mcore == _EMBEDDING]
        return next((name for name in names if name in present), names[0])

    def _mtp_copies(self, spec: MegatronSpec) -> dict[str, str]:
        return {
            _fill(copy.hf, {"{N}": spec.num_layers + layer}): copy.original
            for copy in self.copies
            for layer in range(spec.mtp_layers)
        }

    def is_extra_layer(self, spec: MegatronSpec, hf_name: str) -> bool:
        """Whether the tensor is of a multi-token-prediction layer, which a model may be built without."""
        numbers = _without_numbers(hf_name)[1]
        return spec.mtp_layers > 0 and bool(numbers) and numbers[0] >= spec.num_layers

    def stays_float32(self, hf_name: str) -> bool:
        """Whether Megatron keeps the tensor in float32 whatever the model's type: expert biases of routers."""
        shape = _without_numbers(hf_name)[0]
        return any(
            shape == _without_numbers(_fill(name, dict.fromkeys((*_NUMBERS, "{N}"), 0)))[0]
            for rule in self.rules
            if rule.mcore.endswith("router.expert_bias")
            for name in rule.hf
        )

    def is_ignored(self, hf_name: str) -> bool:
        """Whether the tensor holds nothing to train."""
        return hf_name.endswith(self.ignored)


_EMBEDDING = "embedding.word_embeddings.weight"
_HEAD = "output_layer.weight"


_NUMBERS = ("{L}", "{E}", "{M}")


def _without_numbers(name: str) -> tuple[str, list[int]]:
    parts = name.split(".")
    numbers: list[int] = []
    for position, part in enumerate(parts):
        if part.isdigit():
            numbers.append(int(part))
            parts[position] = "#"
    return ".".join(parts), numbers


def _fill(name: str, values: Mapping[str, int | str]) -> str:
    for placeholder, number in values.items():
        name = name.replace(placeholder, str(number))
    return name

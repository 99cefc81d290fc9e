"""Which models go round under which layouts: a list of products, and draws at random."""

import random
from dataclasses import asdict, dataclass, field
from typing import Any

import transformers as hf

from bridge.families import family_of
from bridge.fit import check_layout
from configs.errors import ConfigError
from configs.schema import LayoutConfig
from tests.bridge.family_models import CONFIGS, text_of
from tests.bridge.round_trip_models import resized

DRAWS = 24
_TRIES = 600

_TP, _PP, _DP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "data_parallel_size"
_CP = "context_parallel_size"
_EP, _ETP, _VPP = (
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "virtual_pipeline_model_parallel_size",
)
_FIRST, _LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
_STAGES, _SP = "pipeline_model_parallel_layout", "sequence_parallel"

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2": {_TP: 2},
    "tp2-sp-etp1": {_TP: 2, _SP: True, _ETP: 1},
    "tp2-ep2-etp1": {_TP: 2, _EP: 2, _ETP: 1},
    "pp2": {_PP: 2},
    "pp2-first1": {_PP: 2, _FIRST: 1},
    "pp2-last1": {_PP: 2, _LAST: 1},
    "pp2-vpp2": {_PP: 2, _VPP: 2},
    "pp2-layout": {_PP: 2, _STAGES: "Et|t*3L"},
    "pp2-layout-mtp": {_PP: 2, _STAGES: "Et*3|tmL"},
    "pp2-vpp2-layout": {_PP: 2, _STAGES: "E|t*2|t,|t,L"},
    "dp2": {_DP: 2},
    "ep2": {_DP: 2, _EP: 2},
    "tp4": {_TP: 4, _SP: True},
    "tp4-ep4-etp1": {_TP: 4, _EP: 4, _ETP: 1},
    "tp4-ep2-etp2": {_TP: 4, _SP: True, _EP: 2, _ETP: 2},
    "tp2-pp2": {_TP: 2, _PP: 2},
    "tp2-pp2-vpp2": {_TP: 2, _PP: 2, _SP: True, _VPP: 2},
    "tp2-pp2-ep2-etp1": {_TP: 2, _PP: 2, _EP: 2, _ETP: 1},
    "tp2-dp2": {_TP: 2, _DP: 2},
    "tp2-cp2": {_TP: 2, _CP: 2},
    "tp2-dp2-ep2-etp1": {_TP: 2, _DP: 2, _SP: True, _EP: 2, _ETP: 1},
    "tp2-dp2-ep2-etp2": {_TP: 2, _DP: 2, _EP: 2, _ETP: 2},
    "pp2-dp2-ep2": {_PP: 2, _DP: 2, _EP: 2},
    "pp4": {_PP: 4},
    "pp4-layout": {_PP: 4, _STAGES: "E|tt|t|tL"},
    "dp4": {_DP: 4},
    "ep4": {_DP: 4, _EP: 4},
}

ALL = tuple(CONFIGS)
MOE = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "gpt_oss",
    "qwen3_vl_moe",
)
EIGHT_EXPERTS = ("deepseek_v3", "deepseek_v3 without mtp")
DENSE = tuple(name for name in ALL if name.split()[0] not in MOE)

FAMILIES_UNDER: dict[str, tuple[str, ...]] = {
    "one": ALL,
    "tp2": (*DENSE, "deepseek_v2", "deepseek_v3", "glm4_moe"),
    "tp2-sp-etp1": ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "qwen3_vl_moe"),
    "tp2-ep2-etp1": MOE,
    "pp2": ("llama", "qwen3", "glm4", "qwen2_moe", "deepseek_v3", "gpt_oss", "qwen2_vl"),
    "pp2-first1": ("llama tied", "mistral", "mixtral", "deepseek_v3 without mtp"),
    "pp2-last1": ("qwen2", "seed_oss", "glm4_moe"),
    "pp2-vpp2": ("llama tied", "qwen3", "deepseek_v2", "qwen3_moe", "gpt_oss", "qwen3_vl"),
    "pp2-layout": ("llama with biases", "qwen3_moe", "deepseek_v3"),
    "pp2-layout-mtp": ("deepseek_v3", "glm4_moe"),
    "pp2-vpp2-layout": ("qwen3", "mixtral", "glm4_moe"),
    "dp2": ("llama tied", "seed_oss", "deepseek_v3", "qwen2_5_vl"),
    "ep2": MOE,
    "tp4": tuple(name for name in DENSE if name != "llama with biases"),
    "tp4-ep4-etp1": EIGHT_EXPERTS,
    "tp4-ep2-etp2": ("mixtral", "qwen3_moe", "deepseek_v3", "qwen3_vl_moe"),
    "tp2-pp2": DENSE,
    "tp2-pp2-vpp2": ("llama tied", "deepseek_v3"),
    "tp2-pp2-ep2-etp1": ("qwen2_moe", "deepseek_v2", "deepseek_v3", "gpt_oss"),
    "tp2-dp2": ("llama", "glm4"),
    "tp2-cp2": ("qwen3",),
    "tp2-dp2-ep2-etp1": ("gpt_oss", "qwen2_moe"),
    "tp2-dp2-ep2-etp2": ("mixtral", "glm4_moe"),
    "pp2-dp2-ep2": ("qwen3_moe", "deepseek_v3"),
    "pp4": ("mistral", "qwen3"),
    "pp4-layout": ("llama tied", "deepseek_v3"),
    "dp4": ("qwen2", "mixtral"),
    "ep4": EIGHT_EXPERTS,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model, by the name of its checkpoint, a layout, and what is done. See round_trip_worker.py.

    `dtype` is the model's. `expected` is the checkpoint to compare with, by default the source itself;
    `partial` what an interrupted save has left.
    """

    source: str
    layout: dict[str, Any]
    kind: str = "round trip"
    dtype: str = "float32"
    expected: str | None = None
    by_hand: bool = False
    mtp: bool = True
    torch_dtype: str | None = None
    max_shard_size: int = 5 << 30
    bucket_bytes: int = 10_000
    key: str | None = None
    partial: str | None = None

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return LayoutConfig(**self.layout).world_size

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


@dataclass(kw_only=True, slots=True)
class Draws:
    """What was drawn: configs and cases by name."""

    configs: dict[str, hf.PretrainedConfig] = field(default_factory=dict)
    cases: dict[str, Case] = field(default_factory=dict)


def deep(name: str) -> hf.PretrainedConfig:
    """Four layers, and two query groups where the family has groups."""
    config = CONFIGS[name]
    if "kv_lora_rank" not in text_of(config).to_dict():
        return resized(config, num_hidden_layers=4, num_key_value_heads=2)
    # transformers rotates a part of each head, and needs an even size before that part.
    return resized(config, num_hidden_layers=4, qk_nope_head_dim=6)


def matrix() -> dict[str, Case]:
    """Every family under its layouts."""
    cases: dict[str, Case] = {}
    for layout, names in FAMILIES_UNDER.items():
        for name in names:
            source = name if layout == "one" else f"{name}-deep"
            cases[f"{layout}/{name}"] = Case(source=source, layout=LAYOUTS[layout], by_hand=True)
    return cases


def draw(seed: int) -> Draws:
    """A third of the draws for each number of processes; layouts that do not fit their model are drawn again.

    Raises AssertionError when hardly any fits.
    """
    chance = random.Random(seed)
    draws = Draws()
    left = dict.fromkeys((1, 2, 4), DRAWS // 3)
    for _ in range(_TRIES):
        if not any(left.values()):
            return draws
        name = chance.choice(ALL)
        config = draw_config(chance, CONFIGS[name])
        values = text_of(config).to_dict()
        ranks = chance.choice([ranks for ranks, count in left.items() if count])
        layout = draw_layout(chance, ranks, values)
        try:
            whole = config.to_dict()
            check_layout(family_of(whole).megatron(whole), LayoutConfig(**layout), training=False)
        except ConfigError:
            continue
        left[ranks] -= 1
        source = f"draw-{len(draws.cases)}-{name}"
        draws.configs[source] = config
        draws.cases[source] = Case(
            source=source, layout=layout, by_hand=True, bucket_bytes=chance.choice([1000, 3000, 1 << 20])
        )
    raise AssertionError(f"of {_TRIES} drawn layouts too few fit their models: {left} are missing")


def draw_config(chance: random.Random, base: hf.PretrainedConfig) -> hf.PretrainedConfig:
    """Other sizes for a family."""
    values = text_of(base).to_dict()
    latent = "kv_lora_rank" in values
    groups = chance.choice([1, 2, 3, 4])
    heads, head_dim = groups * chance.choice([1, 2, 3]), chance.choice([4, 8])
    layers = chance.randint(1, 6)
    sizes: dict[str, Any] = {
        "num_attention_heads": heads,
        "num_key_value_heads": heads if latent else groups,
        "head_dim": head_dim,
        "hidden_size": heads * head_dim,
        "num_hidden_layers": layers,
        "vocab_size": chance.randint(11, 60),
        "intermediate_size": chance.choice([8, 12, 20]),
        "moe_intermediate_size": chance.choice([4, 6, 12]),
        "shared_expert_intermediate_size": chance.choice([4, 8]),
        "tie_word_embeddings": chance.random() < 0.5,
        # A multi-token-prediction layer has experts; Megatron gives it what the last layer of the decoder has.
        "first_k_dense_replace": chance.randint(0, layers - 1),
        "mlp_only_layers": chance.sample(range(layers), chance.randint(0, layers - 1)),
        "num_nextn_predict_layers": chance.randint(0, 2),
        "kv_lora_rank": chance.choice([6, 10]),
        "v_head_dim": chance.choice([3, 6]),
        "qk_nope_head_dim": chance.choice([2, 5]),
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
    }
    experts = chance.choice([3, 4, 6, 8])
    sizes |= dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), experts)
    if latent:
        # There it is another name of the rotated part's size.
        del sizes["head_dim"]
    if values.get("q_lora_rank"):
        sizes["q_lora_rank"] = chance.choice([5, 9])
    return resized(base, **{name: size for name, size in sizes.items() if values.get(name) is not None})


def draw_layout(chance: random.Random, ranks: int, values: dict[str, Any]) -> dict[str, Any]:
    """A product of parallel sizes, and some way of spreading the layers."""
    divisors = {1: [1], 2: [1, 2], 4: [1, 2, 4]}
    tensor = chance.choice(divisors[ranks])
    pipeline = chance.choice(divisors[ranks // tensor])
    data = ranks // tensor // pipeline
    layout: dict[str, Any] = {
        _TP: tensor,
        _PP: pipeline,
        _DP: data,
        _SP: tensor > 1 and chance.random() < 0.5,
    }
    if "num_experts_per_tok" in values:
        layout |= {_EP: chance.choice(divisors[tensor * data]), _ETP: chance.choice([None, 1, 2])}
    if pipeline > 1:
        layout |= _draw_stages(chance, pipeline, values)
    return layout


def _draw_stages(chance: random.Random, pipeline: int, values: dict[str, Any]) -> dict[str, Any]:
    layers = values["num_hidden_layers"]
    match chance.choice(["even", "virtual", "first", "last", "both", "explicit"]):
        case "virtual":
            return {_VPP: 2}
        case "first":
            return {_FIRST: chance.randint(1, layers)}
        case "last":
            return {_LAST: chance.randint(1, layers)}
        case "both":
            return {_FIRST: chance.randint(1, layers), _LAST: chance.randint(1, layers)}
        case "explicit":
            return {_STAGES: _draw_explicit(chance, pipeline * chance.choice([1, 2]), values)}
        case _:
            return {}


def _draw_explicit(chance: random.Random, stages: int, values: dict[str, Any]) -> str:
    """Some layers on each stage; the first may have only the embedding, the last only the loss."""
    letters = [""] * stages
    for stage in sorted(chance.choices(range(stages), k=values["num_hidden_layers"])):
        letters[stage] += "t"
    letters[0] = f"E{letters[0]}"
    extra = values.get("num_nextn_predict_layers") or 0
    letters[-1] += "m" * (extra if chance.random() < 0.5 else 0) + "L"
    return "|".join(letters)

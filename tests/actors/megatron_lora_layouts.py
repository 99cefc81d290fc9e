"""What is adapted under which layouts; read by the test and by its workers."""

from tests.actors.megatron_families_layouts import LAYOUTS

SIZES = LAYOUTS | {"etp2": {"data_parallel_size": 2, "expert_tensor_parallel_size": 2}}
# The frozen layers are computed again, which has to leave the adapters their gradients.
SIZES["one-recompute"] = {"recompute_granularity": "full"}
STEPS: dict[str, tuple[str, ...]] = {
    "one": (
        "llama",
        "llama-qv",
        "llama-up",
        "llama-saved",
        "qwen2-last",
        "one-group",
        "latent",
        "qwen3_moe",
        "deepseek_v3",
        "qwen2_5_vl",
        "internvl",
    ),
    "one-recompute": ("llama", "llama-saved"),
    "tp2": ("llama", "one-group"),
    "tp2-sp": ("llama", "llama-up", "llama-saved", "latent", "qwen3_moe", "deepseek_v3", "qwen2_5_vl"),
    "tp2-sp-etp1": ("qwen3_moe",),
    "tp2-sp-ep2": ("qwen3_moe", "deepseek_v3"),
    "ep2": ("qwen3_moe", "deepseek_v3"),
    "etp2": ("qwen3_moe",),
    "cp2": ("llama", "qwen3_moe", "deepseek_v3"),
    "pp2": ("llama", "qwen2-last", "deepseek_v3", "internvl"),
    "pp2-vpp2": ("llama", "qwen2-last"),
}
"""Names of megatron_lora_reference.CASES."""
SPLIT = ("one", "tp2-sp", "tp2-sp-ep2", "etp2", "pp2-vpp2")
"""Where the first case is also run under the distributed optimizer, for three steps."""
TRIPS = (
    ("tp2-sp", "pp2", "llama"),
    ("cp2", "tp2", "llama"),
    ("tp2-sp-ep2", "ep2", "qwen3_moe"),
    ("pp2", "tp2", "qwen2-last"),
    ("tp2", "pp2", "qwen2-last"),
    ("tp2-sp", "pp2", "llama-saved"),
    ("tp2-sp", "pp2", "qwen2_5_vl"),
)
"""A checkpoint's layout, that of a run that goes on from it, and what is trained."""


def steps_of(layout: str) -> list[tuple[str, bool]]:
    """Cases under the layout, each with whether the optimizer is the distributed one."""
    first = [(STEPS[layout][0], True)] if layout in SPLIT else []
    return first + [(name, False) for name in STEPS[layout]]

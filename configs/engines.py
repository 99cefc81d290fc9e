"""Options of vLLM engines."""

from pydantic import Field

from configs.section import Section


class EngineConfig(Section):
    """vLLM engines. Names are vLLM's."""

    num_engines: int = Field(default=1, ge=1)
    """Independent engines; each takes the next prompt when it has room."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Workers of one engine that share its matrices."""
    max_model_len: int | None = Field(default=None, ge=1)
    """Longest prompt plus completion in tokens; by default the model's own limit."""
    max_num_seqs: int = Field(default=64, ge=1)
    """Sequences one engine works on at the same time."""
    gpu_memory_utilization: float = Field(default=0.8, gt=0, le=1)
    """Share of GPU memory an engine may take. GPU only, untested."""
    kv_cache_memory_bytes: int = Field(default=256 << 20, ge=1 << 20)
    """Size of the key-value cache of one engine on CPU."""
    enforce_eager: bool = True
    """Run without torch.compile and graphs; on CPU compilation costs more than it saves on small models."""
    enable_prefix_caching: bool = True
    """Reuse the key-value cache of common prefixes; it is cleared after every weight sync."""
    heartbeat_timeout_s: float = Field(default=120.0, gt=0)
    """An engine that is silent for this long is replaced; it has to be longer than the longest step."""


class RolloutConfig(EngineConfig):
    """The vLLM engines. Names are vLLM's."""

    vllm_enable_lora: bool = False
    """Send only the adapter to the engines, which apply it as they go; else they get merged weights."""

"""What `bascule export` and `bascule infer` are told. Imports pydantic only, like the options of a run."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from configs.data import Names
from configs.schema import ClusterConfig, LayoutConfig
from configs.section import Section
from configs.sizes import ShardSize


class ExportConfig(Section):
    """A conversion between Hugging Face safetensors and a Megatron torch_dist checkpoint."""

    model: str | None = Field(default=None, min_length=1)
    """Hugging Face directory. Needed for to_mcore; for to_hf only when mcore_model has no config.json."""
    mcore_model: Path | None = None
    """Directory of a torch_dist checkpoint, the source of to_hf."""
    adapters: Path | None = None
    """PEFT adapter of the model: with to_mcore it is what is converted, unless merge_lora says otherwise."""
    mcore_adapter: Path | None = None
    """The same as a torch_dist checkpoint that this project has written; to_hf makes a PEFT adapter of it."""
    merge_lora: bool = False
    """Convert the model with the adapter merged into it, instead of the adapter."""
    to_mcore: bool = False
    """Write a torch_dist checkpoint of `model`."""
    to_hf: bool = False
    """Write safetensors of `mcore_model`."""
    output_dir: Path
    """Directory to write; it appears when it is complete."""
    exist_ok: bool = False
    """Allow an output directory that exists: an empty one or a checkpoint is replaced, anything else never."""
    torch_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the written tensors; by default each tensor keeps the type that it has in the source."""
    max_shard_size: ShardSize = "5GB"
    """Largest safetensors file: 5GB, 500MB or 512MiB. A tensor above it gets a file of its own."""
    test_convert_precision: bool = False
    """Compare the converted model's logits with transformers', and every tensor after a round trip. What failed
    the test replaces nothing; if there is nothing to replace, it is put in place all the same."""
    precision_threshold: float = Field(default=0.1, gt=0)
    """Largest mean_diff on the tokens that have a loss (the `mean_diff (with loss)` that is printed); at or
    above it the exit code is 1."""
    seed: int = Field(default=42, ge=0)
    """Seed of the random tokens of the test, when the model has no tokenizer."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the ranks run. Only cpu has been run by this project so far."""
    layout: LayoutConfig = LayoutConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _rules_between_options(self) -> Self:
        if self.to_mcore == self.to_hf:
            raise ValueError(
                "give exactly one of --to_mcore true (safetensors to torch_dist) and --to_hf true"
            )
        self._check_adapter()
        adapted = self.adapters is not None or self.mcore_adapter is not None
        if self.to_mcore and self.model is None:
            raise ValueError("model: --to_mcore true needs the Hugging Face directory to convert")
        if self.to_mcore and self.mcore_model is not None:
            raise ValueError("mcore_model: is the source of --to_hf true; --to_mcore true reads only model")
        if self.to_hf and self.mcore_model is None and not adapted:
            raise ValueError("mcore_model: --to_hf true needs the torch_dist directory to convert")
        if self.to_hf and self.mcore_model is None and self.model is None:
            raise ValueError("model: give the model that the adapter is for, or --mcore_model")
        if self.layout.sequence_parallel and self.layout.tensor_model_parallel_size == 1:
            raise ValueError("layout.sequence_parallel: needs tensor_model_parallel_size of 2 or more")
        return self

    def _check_adapter(self) -> None:
        if self.adapters is not None and self.mcore_adapter is not None:
            raise ValueError("mcore_adapter: give it or adapters, not both")
        if self.merge_lora:
            if self.adapters is None and self.mcore_adapter is None:
                raise ValueError("merge_lora: there is nothing to merge; give --adapters or --mcore_adapter")
        elif self.to_mcore and self.mcore_adapter is not None:
            raise ValueError("mcore_adapter: is torch_dist already; use --to_hf true, or --merge_lora true")
        elif self.test_convert_precision and self.mcore_adapter is not None and self.mcore_model is not None:
            raise ValueError(
                "test_convert_precision: an adapter's needs the model in safetensors; give --model"
            )
        elif self.to_hf and self.adapters is not None:
            raise ValueError("adapters: is safetensors already; use --to_mcore true, or --merge_lora true")


class InferConfig(Section):
    """One prompt, one answer: to look at a model."""

    model: str = Field(min_length=1)
    """Directory with a Hugging Face checkpoint, or a hub name on a machine that reaches the hub."""
    prompt: str
    """What the model is asked."""
    image: Names = ()
    """Pictures that are put before it, of a model that sees; with vllm alone."""
    system_prompt: str | None = None
    """Put before it as a system message; needs a chat template."""
    backend: Literal["vllm", "transformers"] = "vllm"
    """Who computes."""
    stream: bool = False
    """Print the answer as it comes."""
    max_new_tokens: int = Field(default=512, ge=1)
    """Longest answer in tokens; the model's own limit ends it as well."""
    temperature: float = Field(default=0.0, ge=0)
    """0 takes the likeliest token each time; above it tokens are sampled."""
    seed: int = Field(default=42, ge=0)
    """Seed of sampling."""
    torch_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type to compute in; by default the one that config.json names."""
    chat: bool | None = None
    """Put the prompt into the tokenizer's chat template; by default when it has one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it runs. Only cpu has been run by this project so far."""

    @model_validator(mode="after")
    def _rules_between_options(self) -> Self:
        if not self.prompt.strip():
            raise ValueError("prompt: is empty")
        if self.image and (self.backend != "vllm" or self.chat is False):
            raise ValueError("image: needs --backend vllm and the model's chat template")
        if self.system_prompt is not None and self.chat is False:
            raise ValueError(
                "system_prompt: has no place without the chat template; remove it or --chat false"
            )
        return self

"""Tiny models, a sender of weights, and what transformers says: for tests of engines."""

import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from algorithms.data import Group, Prompt, SamplingSettings, int_row
from bridge.plan import Bucket, Plan, TensorInfo
from bridge.transport.gloo import GlooGroup, TransportError, bucket_views, connect, free_port
from configs.schema import RunConfig

EOS = 2
VOCABULARY = 300  # not a multiple of 64: vLLM pads the vocabulary
WORDS = ("<pad>", "<bos>", "<eos>", *(f"w{index}" for index in range(3, VOCABULARY)))


def save_tokenizer(path: Path) -> None:
    """A tokenizer whose token i is the word `wi`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    fast.save_pretrained(path)


def make_model(family: str, seed: int) -> Any:
    """A random float32 model of transformers: `llama` (own lm_head), `qwen3` (tied lm_head) or `moe`."""
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": EOS,
        "pad_token_id": 0,
    }
    experts = {
        "moe_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    }
    torch.manual_seed(seed)
    if family == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=True))
    else:
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts, tie_word_embeddings=False))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.3 if "embed" in name else 0.1)
    return model.to(torch.float32).eval()


def hf_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The model's tensors as a checkpoint names them, a tied one once, in layer order."""
    with tempfile.TemporaryDirectory() as folder:
        from safetensors.torch import load_file

        model.save_pretrained(folder)
        tensors = load_file(Path(folder) / "model.safetensors")

    def layer(name: str) -> tuple[int, int]:
        parts = name.split(".")
        if parts[1] == "layers":
            return 1, int(parts[2])
        return (0, 0) if "embed" in name else (2, 0)

    return dict(sorted(tensors.items(), key=lambda item: layer(item[0])))


def buckets_of(tensors: dict[str, torch.Tensor], bucket_bytes: int) -> tuple[Bucket, ...]:
    """The tensors in buckets."""
    infos = tuple(
        TensorInfo(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape))
        for name, tensor in tensors.items()
    )
    return Plan(tensors=infos, pieces={}).buckets(bucket_bytes)


class Sender:
    """Rank 0 of the weights' group, in a thread of the test: sends every bucket, or only the first few."""

    def __init__(self, engines: Any, tensors: dict[str, torch.Tensor], bucket_bytes: int = 40_000) -> None:
        self.buckets = buckets_of(tensors, bucket_bytes)
        self._engines = engines
        self._tensors = tensors
        port = free_port("127.0.0.1")
        refs = engines.init_weights("127.0.0.1", port, 60, self.buckets)
        self.group: GlooGroup = connect("127.0.0.1", port, 0, len(engines) + 1, 60)
        engines.wait(refs, "connect")

    def push(self, version: int, stop_before: int | None = None) -> None:
        """Send one version while the engines receive it. With `stop_before`, die before that bucket."""
        refs = self._engines.receive(version)
        thread = threading.Thread(target=self._send, args=(stop_before,))
        thread.start()
        try:
            self._engines.wait(refs, "receive")
        finally:
            thread.join()

    def _send(self, stop_before: int | None) -> None:
        for number, bucket in enumerate(self.buckets):
            if number == stop_before:
                self.group.close()
                return
            buffer = torch.empty(bucket.nbytes, dtype=torch.uint8)
            for name, view in bucket_views(buffer, bucket):
                view.copy_(self._tensors[name])
            try:
                self.group.broadcast(buffer, 0)
            except TransportError:
                return


def prompt(index: int, length: int = 5) -> Prompt:
    """A prompt of random words, the same for the same index."""
    tokens = np.random.default_rng(index).integers(3, VOCABULARY, length)
    return Prompt(id=f"p{index}", tokens=int_row(tokens), messages=(), columns={})


def settings(n: int = 1, max_tokens: int = 12, temperature: float = 1.0, **others: Any) -> SamplingSettings:
    """Sampling settings with defaults for tests."""
    return SamplingSettings(n=n, max_tokens=max_tokens, temperature=temperature, **others)


def reference_logprobs(model: Any, group: Group, index: int, temperature: float = 1.0) -> np.ndarray:
    """What transformers says about the sampled tokens of one rollout."""
    start = len(group.prompt.tokens)
    tokens = torch.tensor(
        np.concatenate([group.prompt.tokens, group.rollouts[index].tokens]), dtype=torch.long
    )
    with torch.no_grad():
        logits = model(tokens[None]).logits[0, start - 1 : -1].float() / temperature
    return torch.log_softmax(logits, dim=-1).gather(1, tokens[start:, None])[:, 0].numpy()


def reference_greedy(model: Any, tokens: Any, length: int) -> list[int]:
    """The likeliest continuation, token by token, up to the end-of-sequence token."""
    row = [int(token) for token in tokens]
    for _ in range(length):
        with torch.no_grad():
            row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
        if row[-1] == EOS:
            break
    return row[len(tokens) :]


@dataclass(frozen=True)
class Rig:
    """An engine group of one engine and the model it started with."""

    engines: Any
    model: Any
    config: RunConfig


def run_config(path: Path) -> RunConfig:
    """A small run on CPU with the model at `path`."""
    return RunConfig.model_validate(
        {
            "algorithm": "sft",
            "model": {"model": str(path), "torch_dtype": "float32", "device": "cpu"},
            "data": {"dataset": "none.jsonl"},
            "rollout": {"max_model_len": 128, "max_num_seqs": 64, "kv_cache_memory_bytes": 32 << 20},
            "cluster": {"cpus_per_engine": 0.5, "step_timeout_s": 120, "start_timeout_s": 300},
        }
    )

"""Tiny models, a sender of weights, and what transformers says: for tests of engines."""

import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors import deadline
from actors.bridge_host import Meeting
from actors.engine_group import EngineGroup
from algorithms.data import Group, Prompt, SamplingSettings, int_row
from bridge import sender as weights
from bridge.layouts import region_of
from bridge.plan import Piece, Plan, TensorInfo
from bridge.sync_plan import cut_plan, to_wire
from bridge.sync_protocol import SyncOrder, WorkerReport, decode_report, empty_report, encode_header
from bridge.transport.errors import TransportError
from bridge.transport.gloo import free_port
from configs.errors import BasculeError
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


def plan_of(tensors: dict[str, torch.Tensor], ranks: int = 1) -> Plan:
    """Trainer ranks that own the rows of every tensor in equal parts, the parameters named like the tensors."""
    infos: list[TensorInfo] = []
    pieces: dict[str, tuple[Piece, ...]] = {}
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        infos.append(TensorInfo(name=name, dtype=tensor.dtype, shape=shape))
        cuts = [shape[0] * rank // ranks for rank in range(ranks + 1)]
        regions = [((start, stop), *region_of(shape[1:])) for start, stop in pairwise(cuts) if start < stop]
        pieces[name] = tuple(
            Piece(tensor=name, region=region, rank=rank, parameter=name, local_region=region)
            for rank, region in enumerate(regions)
        )
    return Plan(tensors=tuple(infos), pieces=pieces)


class Sender:
    """Bridge and trainer in a thread of the test: sends every bucket, or only the first few.

    `spoil` may change a bucket's bytes on the way.
    """

    def __init__(
        self,
        engines: Any,
        tensors: dict[str, torch.Tensor],
        bucket_bytes: int = 40_000,
        ranks: int = 1,
        spoil: Callable[[int, torch.Tensor], None] = lambda number, buffer: None,
        partial: bool = False,
        adapter: dict[str, Any] | None = None,
    ) -> None:
        plan = plan_of(tensors, ranks)
        self.plan = cut_plan(plan, bucket_bytes)
        self.tensors = tensors
        self._engines = engines
        self._members = engines.pool.members("up")
        self._senders = [weights.Sender(tensors, plan, self.plan, rank) for rank in range(ranks)]
        self._spoil = spoil
        peers = ("bridge", *engines.worker_names(self._members))
        meeting = Meeting(host="127.0.0.1", port=free_port("127.0.0.1"), peers=peers, timeout_s=60)
        refs = engines.meet(self._members, meeting, to_wire(self.plan), partial, adapter)
        self.group = meeting.join(0)
        try:
            engines.wait(self._members, refs, "connect")
        except BasculeError:
            self.group.close()
            raise
        self.reports: list[WorkerReport] = []

    def push(
        self, version: int, stop_before: int | None = None, units: Sequence[str] | None = None
    ) -> list[float]:
        """Send one version while the engines receive it; their seconds. Dies before bucket `stop_before`."""
        refs = self._engines.receive(self._members, version)
        thread = threading.Thread(target=self._send, args=(version, stop_before, units))
        thread.start()
        try:
            return self._engines.wait(self._members, refs, "receive")
        finally:
            thread.join()

    def _send(self, version: int, stop_before: int | None, units: Sequence[str] | None) -> None:
        units = self.plan.units if units is None else units
        self.reports = []
        try:
            self.group.broadcast(encode_header(SyncOrder(version=version), self.plan.units, units), 0)
            for number in self.plan.buckets_of(units):
                if number == stop_before:
                    self.group.close()
                    return
                bucket = self.plan.buckets[number]
                buffer = torch.empty(bucket.nbytes, dtype=torch.uint8)
                for message in bucket.messages:
                    buffer[message.start : message.stop] = self._senders[message.rank].pack(number)
                self._spoil(number, buffer)
                self.group.broadcast(buffer, 0)
            for worker in range(len(self._members) * self._engines.workers):
                report = empty_report()
                self.group.recv(report, worker + 1)
                self.reports.append(decode_report(report))
        except TransportError:
            self.group.close()


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


def reference_score(model: Any, tokens: Any) -> np.ndarray:
    """What transformers says about each token but the first."""
    row = torch.tensor([[int(token) for token in tokens]])
    with torch.no_grad():
        logprobs = torch.log_softmax(model(row).logits[0, :-1].float(), dim=-1)
    return logprobs.gather(1, row[0, 1:, None])[:, 0].numpy()


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

    def beside(self) -> "Rig":
        """The same engine through a group of its own: a group is for one thread."""
        return replace(self, engines=EngineGroup(self.engines.pool, room=16, timeout_s=60))


@contextmanager
def started(
    family: str, path: Path, workers: int, *, max_model_len: int | None = None, **lora: Any
) -> Generator[Rig]:
    """One engine of several workers, in room of its own, on a model that is made in `path`."""
    from ray.util.placement_group import placement_group, remove_placement_group

    from actors.engine_start import create_engines

    model = make_model(family, seed=1)
    model.save_pretrained(path)
    save_tokenizer(path)
    config = run_config(path)
    more = {} if max_model_len is None else {"max_model_len": max_model_len}
    rollout = config.rollout.model_copy(update={"tensor_parallel_size": workers, **more})
    config = config.model_copy(update={"rollout": rollout})
    group = placement_group([{"CPU": 0.5 * workers}])
    engines = create_engines(config, str(path), group, [0], **lora)
    engines.ready(engines.start(), config.cluster.start_timeout_s)
    yield Rig(engines=engines, model=model, config=config)
    engines.kill()
    remove_placement_group(group)


def ask(rig: Rig, method: str, *arguments: Any) -> Any:
    """What the rig's engine answers, past the group and its pool."""
    (member,) = rig.engines.members
    ref = getattr(member.actor, method).remote(*arguments)
    return deadline.get(ref, member.name, timeout_s=60, phase=method)


def gone(pid: int, seconds: float = 10) -> bool:
    """Whether the process has ended, or ends in time. A zombie has."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


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

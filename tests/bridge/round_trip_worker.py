"""The processes of the round-trip tests: many models under many layouts, loaded, exported and saved.

python round_trip_worker.py WORLD_SIZE DIRECTORY...; the ranks are forked, so that they share the imports, once
for each directory. DIRECTORY/cases.json has the cases (round_trip_cases.Case), DIRECTORY/.. their checkpoints;
outputs go to DIRECTORY, and RANK.json (a case's Outcome), RANK.log and codes.json (how the ranks ended).
"""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from actors import megatron_cpu

megatron_cpu.install()

from megatron.core import parallel_state  # noqa: E402

from actors.megatron_setup import (  # noqa: E402
    build_chunks,
    initialize_megatron,
    shutdown_megatron,
    transformer_config,
)
from bridge import exchange  # noqa: E402
from bridge.claims import gather_claims  # noqa: E402
from bridge.layouts import region_numel  # noqa: E402
from bridge.megatron import named_parameters  # noqa: E402
from bridge.model_bridge import ModelBridge  # noqa: E402
from bridge.partial_directory import partial_of  # noqa: E402
from configs.errors import BasculeError  # noqa: E402
from configs.schema import LayoutConfig  # noqa: E402
from tests.bridge.family_models import megatron_shard  # noqa: E402
from tests.bridge.round_trip_cases import Case  # noqa: E402
from tests.bridge.round_trip_models import by_hand  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Tensors = Mapping[str, torch.Tensor]


@dataclass(kw_only=True, slots=True)
class Outcome:
    """What a case did on this rank."""

    wrong: list[str] = field(default_factory=list)
    read: int = 0
    needed: int = 0
    written: int = 0
    not_finite: list[str] = field(default_factory=list)
    error: str = ""


@dataclass(kw_only=True, slots=True)
class Writes:
    """Counts what os.pwrite writes, and lets it fail or end the process after a number of calls."""

    nbytes: int = 0
    calls: int = 0
    fail_after: int | None = None
    die_after: int | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        pwrite = os.pwrite

        def write(descriptor: int, data: memoryview, offset: int) -> int:
            self.calls += 1
            if self.fail_after is not None and self.calls > self.fail_after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self.die_after is not None and self.calls > self.die_after:
                os.kill(os.getpid(), signal.SIGKILL)
            count = pwrite(descriptor, data, offset)
            self.nbytes += count
            return count

        with mock.patch("os.pwrite", write):
            yield


def on_disk(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by the safetensors library."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def differences(got: Tensors, want: Tensors) -> list[str]:
    """Names that only one side has, and names whose types, shapes or bytes differ."""
    wrong = [f"only one has {name}" for name in got.keys() ^ want.keys()]
    for name in got.keys() & want.keys():
        a, b = got[name], want[name]
        if a.dtype != b.dtype or a.shape != b.shape:
            wrong.append(f"{name}: {a.dtype} {a.shape}, not {b.dtype} {b.shape}")
        elif not torch.equal(
            a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
        ):
            wrong.append(f"{name}: other bytes")
    return wrong


def build(bridge: ModelBridge, case: Case) -> list[Any]:
    """A model full of NaN."""
    layout = LayoutConfig(**case.layout)
    config = transformer_config(layout, DTYPES[case.dtype], bridge.spec, "cpu")
    chunks = build_chunks(config, bridge.spec, mtp=case.mtp)
    for parameter in named_parameters(chunks).values():
        parameter.data.fill_(float("nan"))
    return chunks


def bytes_needed(bridge: ModelBridge, parameters: Tensors) -> int:
    """Size on disk of what this rank's parameters hold."""
    assert bridge.tensors is not None
    everyone = gather_claims(bridge.family, bridge.spec, parameters, bridge.tensors, bridge.directory)
    claims = everyone[dist.get_rank()]
    return sum(
        region_numel(piece.region) * bridge.tensors[piece.tensor].dtype.itemsize for piece in claims.pieces
    )


def unlike_by_hand(parameters: Tensors, whole: Tensors) -> list[str]:
    """Parameters that are not what a conversion by hand makes of the model."""
    dense = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    # Declared as if there might be no groups.
    expert: Any = (
        parallel_state.get_expert_tensor_parallel_rank(),
        parallel_state.get_expert_tensor_parallel_world_size(),
    )
    wrong: list[str] = []
    for name, parameter in parameters.items():
        full = whole["embedding.word_embeddings.weight" if name not in whole else name]
        # Megatron has some of the column-parallel linears whole on every rank.
        shard = full
        if parameter.numel() != full.numel():
            shard = megatron_shard(name, full, *(expert if ".mlp.experts." in name else dense))
        if not torch.equal(parameter.detach(), shard.reshape(parameter.shape)):
            wrong.append(f"{name} is not as converted by hand")
    return wrong


def cast_as_saved(want: Tensors, held: set[str], case: Case) -> Tensors:
    """What a save with `torch_dtype` is to write: carried tensors and expert biases stay as they are."""
    if case.torch_dtype is None:
        return want
    kept = "e_score_correction_bias"
    return {
        name: tensor.to(DTYPES[case.torch_dtype]) if name in held and not name.endswith(kept) else tensor
        for name, tensor in want.items()
    }


def save(bridge: ModelBridge, chunks: list[Any], case: Case, output: Path, writes: Writes) -> None:
    """Save as the case says."""
    dtype = DTYPES[case.torch_dtype] if case.torch_dtype else None
    with writes.watched(), mock.patch.object(exchange, "_COMMIT_BYTES", 1):
        bridge.save(chunks, output, torch_dtype=dtype, max_shard_size=case.max_shard_size, key=case.key)


def round_trip(bridge: ModelBridge, chunks: list[Any], case: Case, paths: tuple[Path, Path]) -> Outcome:
    """Load, export, save, and compare each with the source."""
    root, output = paths
    parameters = named_parameters(chunks)
    loaded = bridge.load(chunks)
    want = on_disk(root / (case.expected or case.source))
    outcome = Outcome(
        not_finite=list(loaded.not_finite), read=loaded.bytes_read, needed=bytes_needed(bridge, parameters)
    )
    outcome.wrong += [
        f"still NaN: {name}" for name, p in parameters.items() if not loaded.not_finite and p.isnan().any()
    ]
    held_not_finite = bridge.not_finite(chunks)
    if held_not_finite != loaded.not_finite:
        outcome.wrong.append(f"NaN or infinities in the model: {held_not_finite}")
    if case.by_hand:
        outcome.wrong += unlike_by_hand(parameters, load_file(by_hand(root / case.source)))
    dtype = DTYPES[case.torch_dtype] if case.torch_dtype else None
    exported = {name: tensor.clone() for name, tensor in bridge.export(chunks, dtype)}
    held = set(want) if case.mtp else {name for name in want if name in exported}
    want = cast_as_saved(want, held, case)
    kept = {name: tensor for name, tensor in want.items() if name in held}
    outcome.wrong += [f"export: {text}" for text in differences(exported, kept)]
    if case.partial is not None and dist.get_rank() == 0:
        shutil.copytree(root / case.partial, partial_of(output))
    writes = Writes()
    save(bridge, chunks, case, output, writes)
    outcome.written = writes.nbytes
    if dist.get_rank() == 0:
        outcome.wrong += [f"save: {text}" for text in differences(on_disk(output), want)]
    return outcome


def refused(bridge: ModelBridge, chunks: list[Any], case: Case, paths: tuple[Path, Path]) -> Outcome:
    """A load that is to fail; nothing of the file is to be read for a misfit."""
    return Outcome(error=error_of(lambda: bridge.load(chunks)))


def failing_save(bridge: ModelBridge, chunks: list[Any], case: Case, paths: tuple[Path, Path]) -> Outcome:
    """The last rank's disk is full in the middle of a save: once with nothing before it, once with an old one."""
    output = paths[1]
    bridge.load(chunks)
    last = dist.get_rank() == dist.get_world_size() - 1
    outcome = Outcome()
    for before in (None, on_disk(paths[0] / case.source)):
        if before is not None:
            save(bridge, chunks, case, output, Writes())
            dist.barrier()
        for parameter in named_parameters(chunks).values():
            parameter.data.add_(1)
        writes = Writes(fail_after=3 if last else None)
        outcome.error = error_of(lambda writes=writes: save(bridge, chunks, case, output, writes))
        if before is None and output.exists():
            outcome.wrong.append("something is at the target")
        if before is not None:
            got = on_disk(output)
            same = all(torch.equal(got[name], before[name] + 1) for name in before)
            outcome.wrong += [] if same else ["the old checkpoint has changed"]
        dist.barrier()
    return outcome


def trained(bridge: ModelBridge, chunks: list[Any], case: Case, paths: tuple[Path, Path]) -> Outcome:
    """Weights that have changed since they were loaded are saved, and load again."""
    bridge.load(chunks)
    for parameter in named_parameters(chunks).values():
        parameter.data.add_(1)
    want = {name: value.clone() for name, value in named_parameters(chunks).items()}
    save(bridge, chunks, case, paths[1], Writes())
    dist.barrier()
    again = ModelBridge(paths[1])
    reloaded = build(again, case)
    again.load(reloaded)
    got = named_parameters(reloaded)
    # The rows that pad the vocabulary are in no file; the two tensors that have them are looked at below.
    padded = ("embedding.word_embeddings.weight", "output_layer.weight")
    wrong = [name for name, value in want.items() if name not in padded and not torch.equal(got[name], value)]
    saved, source = on_disk(paths[1]), on_disk(paths[0] / case.source)
    embedding = saved["model.embed_tokens.weight"]
    wrong += [
        name
        for name, tensor in saved.items()
        if name.endswith(".embed_tokens.weight") and not torch.equal(tensor, embedding)
    ]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if not torch.equal(saved[name], source[name] + 1):
            wrong.append(f"{name} is the old one")
    return Outcome(wrong=wrong)


def killed(bridge: ModelBridge, chunks: list[Any], case: Case, paths: tuple[Path, Path]) -> Outcome:
    """The last rank is killed in the middle of a save."""
    bridge.load(chunks)
    last = dist.get_rank() == dist.get_world_size() - 1
    save(bridge, chunks, case, paths[1], Writes(die_after=40 if last else None))
    return Outcome(wrong=["a save without one rank came to its end"])


def error_of(action: Callable[[], object]) -> str:
    """Type and message of the error that the action raises."""
    try:
        action()
    except BasculeError as error:
        return f"{type(error).__name__}: {error}"
    return ""


KINDS = {
    "round trip": round_trip,
    "trained": trained,
    "refused": refused,
    "failing save": failing_save,
    "killed": killed,
}


def run_case(name: str, case: Case, root: Path, outputs: Path) -> Outcome:
    """The outcome of one case on this rank."""
    bridge = ModelBridge(root / case.source, bucket_bytes=case.bucket_bytes)
    output = outputs / name.replace("/", "-").replace(" ", "-")
    outcome = KINDS[case.kind](bridge, build(bridge, case), case, (root, output))
    dist.barrier()
    return outcome


def by_layout(cases: Mapping[str, Case]) -> Mapping[str, Sequence[str]]:
    """Case names by their layout as JSON."""
    found: dict[str, list[str]] = {}
    for name, case in cases.items():
        found.setdefault(json.dumps(case.layout), []).append(name)
    return found


def run_rank(rank: int, world_size: int, directory: Path) -> None:
    """All cases of a directory on one rank."""
    log = os.open(directory / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    results: dict[str, Any] = {}
    content = json.loads((directory / "cases.json").read_text())
    cases = {name: Case(**fields) for name, fields in content.items()}
    for number, (layout, names) in enumerate(by_layout(cases).items()):
        initialize_megatron(
            LayoutConfig.model_validate_json(layout),
            rank=rank,
            world_size=world_size,
            init_method=f"file://{directory}/store-{number}",
            timeout_s=60,
            seed=1,
            device="cpu",
        )
        for name in names:
            outcome = run_case(name, cases[name], directory.parent, directory)
            results[name] = {key: getattr(outcome, key) for key in Outcome.__slots__}
        shutdown_megatron()
    (directory / f"{rank}.json").write_text(json.dumps(results))


def main(world_size: int, directories: Sequence[Path]) -> None:
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")
    for directory in directories:
        ranks = [
            fork.Process(target=run_rank, args=(rank, world_size, directory)) for rank in range(world_size)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        (directory / "codes.json").write_text(json.dumps([rank.exitcode for rank in ranks]))


if __name__ == "__main__":
    main(int(sys.argv[1]), [Path(argument) for argument in sys.argv[2:]])

"""One rank of the family tests: every family under many layouts in one process; writes the errors it measured.

python megatron_families_worker.py RANK WORLD_SIZE DIRECTORY; test_megatron_families.py starts it.
"""

import json
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import megatron_vision
import torch
from megatron_families import CLIP_GRAD, Reference, mtp_reference, reference
from megatron_families_layouts import BFLOAT16, CHECKPOINTS, LAYOUTS, READS, STEPS

# Installs what Megatron needs on CPU, and so comes before everything that imports megatron.
from megatron_worker import join, run_under, split_rows, worst
from megatron_worker_reference import TEMPERATURE, num_loss_tokens, token_loss

from actors.trainer_rank import freeze
from bridge.families import family_of
from bridge.frozen import frozen_parts
from bridge.vision import part_of
from configs.schema import LayoutConfig, RunConfig
from tests.bridge.family_models import megatron_shard

from megatron.core import parallel_state  # isort: skip
from megatron.core.packed_seq_params import PackedSeqParams  # isort: skip

from actors.megatron_model import FrozenModel, MegatronModel  # isort: skip
from actors.megatron_setup import shutdown_megatron  # isort: skip


def make_run(layout: str, distributed_optimizer: bool, dtype: str = "float32") -> RunConfig:
    return run_under(LAYOUTS[layout], distributed_optimizer, dtype, clip_grad=CLIP_GRAD)


def global_name(chunk: Any, name: str) -> str:
    """The name with the layer's number in the model and the expert's number in the layer."""
    layer = re.match(r"decoder\.layers\.(\d+)\.", name)
    if layer is None:
        return name
    number = chunk.decoder.layers[int(layer[1])].layer_number - 1
    name = f"decoder.layers.{number}.{name[layer.end() :]}"
    expert = re.search(r"local_experts\.(\d+)\.", name)
    if expert is None:
        return name
    held = chunk.decoder.layers[int(layer[1])].mlp.num_local_experts
    first = held * parallel_state.get_expert_model_parallel_rank()
    return name[: expert.start(1)] + str(first + int(expert[1])) + name[expert.end(1) :]


def mine(chunks: list[Any]) -> Iterator[tuple[str, Any]]:
    """This rank's parameters with their global names."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            yield global_name(chunk, name), parameter


def shard(name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """This rank's part of a Megatron tensor; the output layer of a tied model is the embedding."""
    whole = tensors.get(name)
    if whole is None:
        assert name == "output_layer.weight", name
        whole = tensors["embedding.word_embeddings.weight"]
    if re.search(r"linear_\w+_down_proj", name):
        return whole
    if "local_experts" in name:
        group: Any = parallel_state.get_expert_tensor_parallel_group()
    else:
        group = parallel_state.get_tensor_model_parallel_group()
    return megatron_shard(name, whole, group.rank(), group.size())


def loader(tensors: dict[str, torch.Tensor]) -> Any:
    def load(chunks: list[Any]) -> None:
        with torch.no_grad():
            for name, parameter in mine(chunks):
                if name.startswith("mtp.") and name not in tensors:
                    # No logit may depend on it.
                    parameter.fill_(float("nan"))
                    continue
                value = shard(name, tensors)
                assert parameter.shape == value.shape, (name, parameter.shape, value.shape)
                parameter.copy_(value)
            for chunk in chunks:
                for name, buffer in chunk.named_buffers():
                    if name.endswith("expert_bias") and global_name(chunk, name) in tensors:
                        buffer.copy_(tensors[global_name(chunk, name)])

    return load


def as_tensor(row: Any) -> torch.Tensor:
    return row if torch.is_tensor(row) else torch.tensor(row)


def value_error(want: Reference, got: list[Any] | None, groups: list[list[Any]], field: str) -> float | None:
    """Largest absolute difference of logits or log-probabilities."""
    if got is None:
        return None
    known = {id(row): values for row, values in zip(want.rows, getattr(want, field), strict=True)}
    errors = []
    for row, group in zip(got, groups, strict=True):
        values = torch.cat([known[id(sequence)] for sequence in group])
        errors.append(float((as_tensor(row)[: len(values)] - values).abs().max()))
    return max(errors)


def run_case(layout: str, family: str, *, distributed_optimizer: bool) -> dict[str, Any]:
    want = reference(family)
    spec = family_of(want.config).megatron(want.config)
    run = make_run(layout, distributed_optimizer)
    model = MegatronModel(run, spec, device="cpu", load=loader(want.weights), look=megatron_vision.look)
    # Three micro-batches for two pipeline stages: the interleaved schedule has to fill up.
    micro_batches = 3 if "vpp" in layout else 1
    batches, groups = split_rows(want.rows, micro_batches)
    errors: dict[str, Any] = {
        "logprobs": value_error(want, model.logprobs(batches, TEMPERATURE), groups, "logprobs")
    }
    result = model.step(batches, num_loss_tokens(want.rows), token_loss, TEMPERATURE)
    errors["loss"] = abs(result.loss - want.loss) / abs(want.loss)
    errors["grad_norm"] = abs(result.grad_norm - want.grad_norm) / want.grad_norm
    if not distributed_optimizer:
        # The distributed optimizer keeps only this rank's part of the summed gradient.
        errors["grads"] = worst_named(
            (name, p.main_grad, shard(name, want.grads)) for name, p in mine(model.chunks)
        )
    errors["weights"] = worst_named(
        (name, p.detach(), shard(name, want.weights_after)) for name, p in mine(model.chunks)
    )
    return errors


def worst_named(triples: Iterator[tuple[str, torch.Tensor, torch.Tensor]]) -> tuple[float, str]:
    """Largest difference relative to the largest entry of its tensor, and the tensor."""
    return max((worst(iter([(got, want)])), name) for name, got, want in triples)


def run_logits(layout: str, family: str) -> dict[str, Any]:
    """Logits of a model that is only read, with room for the multi-token prediction that the family has."""
    want = reference(family)
    spec = family_of(want.config).megatron(want.config)
    settings = LayoutConfig.model_validate(LAYOUTS[layout])
    load = loader(want.weights)
    model = FrozenModel(settings, torch.float32, spec, device="cpu", load=load, mtp=True)
    batches, groups = split_rows(want.rows, 2)
    shapes = {
        name: list(parameter.shape)
        for name, parameter in mine(model.chunks)
        if name.startswith("mtp.") and "experts" not in name
    }
    return {"logits": value_error(want, model.logits(batches), groups, "logits"), "mtp": shapes}


def run_bfloat16(family: str) -> dict[str, Any]:
    """How far loss and gradient norm are from float32's."""
    want = reference(family)
    spec = family_of(want.config).megatron(want.config)
    model = MegatronModel(make_run("one", True, "bfloat16"), spec, device="cpu", load=loader(want.weights))
    batches, _ = split_rows(want.rows, 1)
    result = model.step(batches, num_loss_tokens(want.rows), token_loss, TEMPERATURE)
    return {
        "loss": abs(result.loss - want.loss) / abs(want.loss),
        "grad_norm": abs(result.grad_norm - want.grad_norm) / want.grad_norm,
        "biases": [str(b.dtype) for n, b in model.chunks[0].named_buffers() if n.endswith("expert_bias")],
    }


def run_mtp() -> dict[str, Any]:
    """Largest difference of a multi-token-prediction layer's output."""
    want = mtp_reference()
    spec = family_of(want.config).megatron(want.config)
    load = loader(want.weights)
    model = FrozenModel(LayoutConfig(), torch.float32, spec, device="cpu", load=load, mtp=True)
    chunk: Any = model.chunks[0]
    tokens = len(want.tokens_T)
    starts = torch.tensor([0, tokens], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts, max_seqlen_q=tokens, max_seqlen_kv=tokens
    )
    chunk.eval()
    with torch.no_grad():
        output = chunk.mtp(
            input_ids=want.tokens_T[None],
            position_ids=torch.arange(tokens)[None],
            hidden_states=want.hidden_TH[:, None],
            attention_mask=None,
            packed_seq_params=packed,
            embedding=chunk.embedding,
        )
    return {"output": float((output[tokens:, 0] - want.output_TH).abs().max())}


def checkpoint_keys(family: str) -> list[str]:
    """Names of the tensors in a distributed checkpoint."""
    want = reference(family)
    spec = family_of(want.config).megatron(want.config)
    load = loader(want.weights)
    model = FrozenModel(LayoutConfig(), torch.float32, spec, device="cpu", load=load, mtp=True)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state: dict[str, Any] = {}
    for chunk in model.chunks:
        state |= chunk.sharded_state_dict(metadata={"dp_cp_group": group})
    return sorted({value.key for value in state.values() if "_extra_state" not in value.key})


def run_parts(**vision: Any) -> dict[str, Any]:
    """How far a step moves the parts of a model that sees, one sequence at a time: the first has no picture."""
    want = reference("qwen3_vl")
    spec = family_of(want.config).megatron(want.config)
    assert spec.vision is not None
    run = RunConfig.model_validate({**make_run("one", False).model_dump(), "vision": vision})
    frozen = partial(freeze, frozen_parts(spec, run.vision))
    model = MegatronModel(
        run, spec, device="cpu", load=loader(want.weights), adapt=frozen, look=megatron_vision.look
    )
    batches, _ = split_rows(want.rows, len(want.rows))
    model.step(batches, num_loss_tokens(want.rows), token_loss, TEMPERATURE)
    moved = {"llm": 0.0, "vit": 0.0, "aligner": 0.0}
    for name, parameter in mine(model.chunks):
        part = part_of(spec.vision, name)
        moved[part] = max(moved[part], float((parameter - shard(name, want.weights)).abs().max()))
    return moved


def cases_of(layout: str) -> Iterator[tuple[str, Any]]:
    for family in STEPS.get(layout, ()):
        yield f"{layout}/{family}", run_case(layout, family, distributed_optimizer=layout.endswith("-split"))
    for family in READS.get(layout, ()):
        yield f"{layout}/{family}/read", run_logits(layout, family)
    if layout == "one":
        yield "one/mtp", run_mtp()
        yield "one/rates", run_parts(freeze_vit=False, freeze_aligner=False, vit_lr=1e-4, aligner_lr=4e-4)
        yield "one/aligner", run_parts(freeze_llm=True, freeze_aligner=False)
        yield "one/default", run_parts()
        for family in BFLOAT16:
            yield f"one/{family}/bfloat16", run_bfloat16(family)
        for family in CHECKPOINTS:
            yield f"one/{family}/keys", checkpoint_keys(family)


def main(rank: int, world_size: int, directory: Path) -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for layout in LAYOUTS:
        settings = LayoutConfig.model_validate(LAYOUTS[layout])
        if settings.world_size != world_size:
            continue
        join(settings, rank, world_size, directory / layout)
        results |= cases_of(layout)
        shutdown_megatron()
    (directory / f"{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))

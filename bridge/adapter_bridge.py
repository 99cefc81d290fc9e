"""Load, export and save the LoRA adapters of a live Megatron model as PEFT does, on every rank together.

The model must have the adapters already (actors.megatron_lora); what is called what is in bridge.lora.
"""

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from bridge.adapter_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterConfig
from bridge.checkpoint import CheckpointError, CheckpointReader
from bridge.checkpoint_writer import CheckpointWriter
from bridge.claims import try_to_claim
from bridge.exchange import load_pieces, reading_threads, save_pieces
from bridge.layouts import Shape, region_of
from bridge.lora import PREFIX, Target, adapter_claims, targets_of
from bridge.megatron import (
    Claims,
    adapter_parameters,
    all_parameters,
    hf_order,
    named_parameters,
    place_of_this_rank,
)
from bridge.merged import MergedParameters
from bridge.model_bridge import BUCKET_BYTES, Loaded, Model, ModelBridge, chunks_of
from bridge.parameters import ALONE, parameters_of
from bridge.partial_directory import partial_of, put_in_place
from bridge.plan import Piece, Plan, TensorInfo, build_plan
from bridge.rules import RuleError
from bridge.together import (
    GuardedReader,
    GuardedWriter,
    all_everywhere,
    exported,
    on_first_rank,
    raise_everywhere,
)
from configs.errors import ConfigError, WriteError, naming

_BASE_LAYER = ".base_layer.weight"


class AdapterBridge:
    """The way between PEFT adapters and the adapters of models that have the shape of `base`."""

    def __init__(
        self,
        base: ModelBridge,
        config: AdapterConfig,
        *,
        tensors: Mapping[str, TensorInfo] | None = None,
        source: Path | None = None,
    ) -> None:
        """`tensors` are those of an adapter that there is; it decides which modules are adapted.

        `source` is its directory.
        """
        self.base = base
        self.config = config
        self.source = source
        self._tensors = tensors

    def targets(self, model: Model) -> tuple[Target, ...]:
        """What of this rank's part of the model is adapted. Raises ConfigError like bridge.lora.targets_of."""
        return targets_of(
            self.base.family,
            self.base.spec,
            named_parameters(chunks_of(model)),
            place_of_this_rank(),
            self.config,
            None if self._tensors is None else adapted_modules(self._tensors),
        )

    def saved(self, model: Model) -> frozenset[str]:
        """Global names of this rank's base parameters that modules_to_save has trained."""
        return frozenset(piece.parameter for piece in self._saved(named_parameters(chunks_of(model))).pieces)

    def merged(self, model: Model) -> MergedParameters:
        """The base parameters with the adapters in them."""
        chunks = chunks_of(model)
        return MergedParameters(named_parameters(chunks), adapter_parameters(chunks), self.targets(model))

    def load(self, model: Model, directory: Path | None = None) -> Loaded:
        """Fill adapters and saved modules, by default from `source`; all ranks together.

        Raises AdapterMisfitError naming the file and listing every tensor that is missing, has another shape or
        belongs to nothing, before a byte of weights is read.
        """
        directory = directory or self.source
        assert directory is not None, "an adapter that was not read has no directory"
        chunks = chunks_of(model)
        parameters = all_parameters(chunks)
        claims = self._claims(model)
        with CheckpointReader(directory, ADAPTER_WEIGHTS) as reader:
            _check(directory / ADAPTER_WEIGHTS, reader.tensors, claims.shapes)
            self._check_base_layers(directory, reader)
            guarded = GuardedReader(reader)
            device = next(iter(parameters.values())).device
            for parameter in adapter_parameters(chunks).values():
                # Columns of A that stand for padding of the vocabulary are in no file.
                parameter.detach().zero_()
            load_pieces(parameters, guarded, claims.pieces, reading_threads(device))
            bytes_read, not_finite = reader.bytes_read, sorted(reader.not_finite)
        failures, not_finite = all_everywhere(guarded.failures, not_finite)
        if failures:
            raise CheckpointError("; ".join(failures))
        return Loaded(bytes_read=bytes_read, not_finite=not_finite)

    def plan(self, model: Model, torch_dtype: torch.dtype | None = None) -> Plan:
        """Who owns what of the adapter's tensors, under PEFT's names, in order of layers; the same on every rank.

        In the types of the adapter that was read or, where given, `torch_dtype`; of a new adapter in the types
        that it is trained in.
        """
        parameters = all_parameters(chunks_of(model))
        claims = self._claims(model)
        dtypes = {piece.tensor: parameters[piece.parameter].dtype for piece in claims.pieces}
        everyone: list[tuple[tuple[Piece, ...], Mapping[str, Shape], Mapping[str, torch.dtype]]]
        everyone = [((), {}, {})] * dist.get_world_size()
        dist.all_gather_object(everyone, (claims.pieces, claims.shapes, dtypes))
        pieces = [piece for found, _, _ in everyone for piece in found]
        shapes = {name: shape for _, found, _ in everyone for name, shape in found.items()}
        dtypes = {name: dtype for _, _, found in everyone for name, dtype in found.items()}
        if self._tensors is not None:
            dtypes |= {name: info.dtype for name, info in self._tensors.items()}
        infos = [
            TensorInfo(name=name, dtype=torch_dtype or dtypes[name], shape=shapes[name])
            for name in hf_order(pieces)
        ]
        return build_plan(infos, pieces)

    def export(
        self, model: Model, torch_dtype: torch.dtype | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """PEFT's names and whole tensors in host memory, on every rank, which must all go through to the end."""
        yield from exported(self.plan(model, torch_dtype), all_parameters(chunks_of(model)), BUCKET_BYTES)

    def save(
        self,
        model: Model,
        directory: Path,
        *,
        torch_dtype: torch.dtype | None = None,
        publish: bool = True,
    ) -> None:
        """Write a PEFT adapter, every rank its own ranges. The directory appears whole, by rename, or not at all.

        What is replaced and what is not is as in ModelBridge.save, and so is `publish`. Raises WriteError naming
        the file.
        """
        plan = self.plan(model, torch_dtype)
        carried = self._carried()
        rank = dist.get_rank()
        infos = [*plan.tensors, *carried]
        size = sum(info.nbytes for info in infos)
        writer = CheckpointWriter(directory, infos, max_shard_size=size, rank=rank, file=ADAPTER_WEIGHTS)
        on_first_rank(writer.prepare)
        guarded = GuardedWriter(writer)
        save_pieces(all_parameters(chunks_of(model)), guarded, plan.buckets(BUCKET_BYTES), plan, rank)
        with guarded:
            if rank == 0 and carried:
                self._carry_over(guarded, carried)
            writer.close()
        raise_everywhere(guarded.failures, WriteError)
        leaves = leaf_names(adapted_modules(plan.pieces))
        on_first_rank(lambda: self._finish(Path(os.path.realpath(directory)), leaves, publish))

    def _finish(self, directory: Path, leaves: Sequence[str], publish: bool) -> None:
        path = partial_of(directory) / ADAPTER_CONFIG
        with naming(path):
            content = self.config.to_json(str(self.base.directory), leaves)
            path.write_text(json.dumps(content, indent=2) + "\n")
        if publish:
            put_in_place(directory)

    def _saved(self, base: Mapping[str, torch.Tensor]) -> Claims:
        """What this rank holds of modules_to_save, under PEFT's names."""
        if not self.config.modules_to_save:
            # Most have none, and a claim goes through the whole model.
            return Claims(pieces=(), shapes={}, full_precision=frozenset())
        found = try_to_claim(self.base.family, self.base.spec, base, self.base.tensors, place_of_this_rank())
        assert isinstance(found, Claims), "the base model was loaded"
        wanted = {
            name: shape for name, shape in found.shapes.items() if self.config.saves(name.rpartition(".")[0])
        }
        return Claims(
            pieces=tuple(
                replace(piece, tensor=PREFIX + piece.tensor)
                for piece in found.pieces
                if piece.tensor in wanted and not piece.copy
            ),
            shapes={PREFIX + name: shape for name, shape in wanted.items()},
            full_precision=frozenset(),
        )

    def _claims(self, model: Model) -> Claims:
        adapters = adapter_claims(self.targets(model), place_of_this_rank().rank)
        saved = self._saved(named_parameters(chunks_of(model)))
        return Claims(
            pieces=(*adapters.pieces, *saved.pieces),
            shapes={**adapters.shapes, **saved.shapes},
            full_precision=frozenset(),
        )

    def _check_base_layers(self, directory: Path, reader: CheckpointReader) -> None:
        """PEFT stores an adapted embedding's own weights with it: they must be those of the base model."""
        names = [name for name in reader.tensors if name.endswith(_BASE_LAYER)]

        def compare() -> None:
            with CheckpointReader(self.base.directory) as base:
                for name in names:
                    original = f"{name.removeprefix(PREFIX).removesuffix(_BASE_LAYER)}.weight"
                    info = reader.tensors[name]
                    same = original in base.tensors and base.tensors[original].shape == info.shape
                    whole = region_of(info.shape)
                    if not same or not torch.equal(
                        reader.read(name, whole), base.read(original, whole).to(info.dtype)
                    ):
                        raise CheckpointError(
                            f"{directory / ADAPTER_WEIGHTS}: {name} is not {original} of {self.base.directory}: "
                            "the adapter changed it as well; merge the two with peft, and start from that"
                        )

        if names and self.base.tensors is not None:
            on_first_rank(compare)

    def _carried(self) -> list[TensorInfo]:
        """Weights of adapted embeddings, which PEFT has in its file."""
        return [info for name, info in (self._tensors or {}).items() if name.endswith(_BASE_LAYER)]

    def _carry_over(self, writer: GuardedWriter, carried: Sequence[TensorInfo]) -> None:
        assert self.source is not None
        with CheckpointReader(self.source, ADAPTER_WEIGHTS) as reader:
            for info in carried:
                whole = region_of(info.shape)
                writer.write(info.name, whole, reader.read(info.name, whole))


def adapted_modules(keys: Mapping[str, object]) -> frozenset[str]:
    """The modules that the tensors of a PEFT adapter belong to."""
    endings = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
    return frozenset(
        key.removeprefix(PREFIX).removesuffix(ending)
        for key in keys
        for ending in endings
        if key.startswith(PREFIX) and key.endswith(ending)
    )


def leaf_names(modules: Iterable[str]) -> list[str]:
    """Last names of modules, each once, in order."""
    return sorted({module.rpartition(".")[2] for module in modules})


def target_names(base: ModelBridge, config: AdapterConfig, modules: Collection[str]) -> list[str]:
    """Ends of paths that name exactly these modules for PEFT, in order, where `config` excludes what it does.

    Last names are enough for those of a language model. In a vision tower other modules may have them, which PEFT
    would adapt too, or not know what to do with: numbers in a list, a convolution.
    """
    family, layers = base.family, base.spec.num_layers
    paths: set[str] = set()
    for name in parameters_of(base.spec, mtp=False):
        path = family.matches(name, layers)[0].hf_names[0]
        while path := path.rpartition(".")[0]:
            paths.add(path)
    others = {end for path in paths - set(modules) if not config.is_excluded(path) for end in _ends(path)}
    return sorted({next((end for end in _ends(module) if end not in others), module) for module in modules})


def _ends(path: str) -> Iterator[str]:
    """The shortest first."""
    names = path.split(".")
    return (".".join(names[start:]) for start in reversed(range(len(names))))


def check_adapter(
    base: ModelBridge, config: AdapterConfig, tensors: Mapping[str, TensorInfo] | None, where: str
) -> frozenset[str]:
    """What AdapterBridge would say once its ranks are up, by names and shapes alone; returns the modules adapted.

    `tensors` are those of an adapter that there is, `where` what to call it. Raises AdapterMisfitError, or
    ConfigError naming an option that no module of the model has the name of.
    """
    shapes = parameters_of(base.spec, mtp=False)
    parameters = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    modules = None if tensors is None else adapted_modules(tensors)
    targets = targets_of(base.family, base.spec, parameters, ALONE, config, modules)
    wanted = adapter_claims(targets, 0).shapes
    model = base.tensors or {}
    owners = {name: name.rpartition(".")[0] for name in model}
    saved = {PREFIX + name: info.shape for name, info in model.items() if config.saves(owners[name])}
    if tensors is not None:
        _raise_misfits(where, tensors, {**wanted, **saved})
    found = frozenset(part.module for target in targets for part in target.parts)
    if tensors is None:
        _check_names("target_modules", config.target_modules, found)
        if base.tensors is not None:
            _check_names("modules_to_save", config.modules_to_save, frozenset(owners.values()))
    return found


def _check_names(option: str, names: str | Sequence[str], modules: Collection[str]) -> None:
    unused = [
        name
        for name in ([] if isinstance(names, str) else names)
        if not any(module == name or module.endswith(f".{name}") for module in modules)
    ]
    if unused or not modules:
        raise ConfigError(f"{option}: no module of the model is called {', '.join(unused) or names}")


def _check(path: Path, tensors: Mapping[str, TensorInfo], mine: Mapping[str, Shape]) -> None:
    """Raises AdapterMisfitError, on every rank, unless the tensors are those that all ranks hold together."""
    everyone: list[Mapping[str, Shape]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, dict(mine))
    _raise_misfits(str(path), tensors, {name: shape for found in everyone for name, shape in found.items()})


def _raise_misfits(where: str, tensors: Mapping[str, TensorInfo], wanted: Mapping[str, Shape]) -> None:
    problems = [f"the adapter has no {name}, {list(wanted[name])}" for name in wanted if name not in tensors]
    problems += [
        f"{name} is {list(tensors[name].shape)}; with this config and model it is {list(shape)}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    problems += [
        f"{name} belongs to no module of the model that can be adapted"
        for name in tensors
        if name not in wanted and not name.endswith(_BASE_LAYER)
    ]
    if problems:
        raise AdapterMisfitError(where, tuple(sorted(problems)))


class AdapterMisfitError(RuleError):
    """An adapter that is not of this model. Lists the tensors."""

    def __init__(self, where: str, problems: tuple[str, ...]) -> None:
        super().__init__(where, problems)
        self.where = where
        self.problems = problems

    def __str__(self) -> str:
        return f"{self.where}: the adapter does not fit the model:\n  " + "\n  ".join(self.problems)

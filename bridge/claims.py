"""What all ranks hold together, and the plan that follows."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bridge.megatron import Claims, MisfitError, Place, claim_pieces, hf_order, place_of_this_rank
from bridge.plan import TORCH_DTYPES, Plan, TensorInfo, build_plan
from bridge.rules import Family, MegatronSpec, RuleError
from configs.errors import ConfigError


def gather_claims(
    family: Family,
    spec: MegatronSpec,
    parameters: Mapping[str, torch.Tensor],
    tensors: Mapping[str, TensorInfo] | None,
    directory: Path,
) -> list[Claims]:
    """What every rank holds, by rank, of the checkpoint in `directory`.

    Raises MisfitError on every rank when one has something that does not fit; it then also lists the tensors
    that no rule reads.
    """
    found = try_to_claim(family, spec, parameters, tensors, place_of_this_rank())
    everyone, with_mtp = _exchange(found, parameters)
    return merge_claims(family, spec, tensors, everyone, directory, with_mtp=with_mtp)


def claim_together(
    family: Family,
    spec: MegatronSpec,
    parameters: Mapping[str, torch.Tensor],
    tensors: Mapping[str, TensorInfo],
    directory: Path,
) -> Claims:
    """What this rank holds of the checkpoint in `directory`, when all ranks together hold all of it.

    Raises like gather_claims and check_all_read, on every rank.
    """
    found = try_to_claim(family, spec, parameters, tensors, place_of_this_rank())
    # A load needs the others' names, and their many pieces take their time on the way.
    everyone, with_mtp = _exchange(
        replace(found, pieces=()) if isinstance(found, Claims) else found, parameters
    )
    claims = merge_claims(family, spec, tensors, everyone, directory, with_mtp=with_mtp)
    check_all_read(family, spec, tensors, claims, directory, with_mtp=with_mtp)
    assert isinstance(found, Claims), "a misfit has been raised"
    return found


def _exchange(
    found: Claims | MisfitError, parameters: Iterable[str]
) -> tuple[list[Claims | MisfitError], bool]:
    """What all ranks found, by rank, and whether some have layers for multi-token prediction."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (found, any(name.startswith("mtp.") for name in parameters)))
    return [found for found, _ in everyone], any(with_mtp for _, with_mtp in everyone)


def try_to_claim(
    family: Family,
    spec: MegatronSpec,
    parameters: Mapping[str, torch.Tensor],
    tensors: Mapping[str, TensorInfo] | None,
    place: Place,
) -> Claims | MisfitError:
    """Like claim_pieces, but what does not fit is returned, so that other ranks can be asked as well."""
    try:
        return claim_pieces(family, spec, parameters, tensors, place)
    except MisfitError as error:
        return error


def merge_claims(
    family: Family,
    spec: MegatronSpec,
    tensors: Mapping[str, TensorInfo] | None,
    found: Sequence[Claims | MisfitError],
    directory: Path,
    *,
    with_mtp: bool,
) -> list[Claims]:
    """The claims that all ranks together `found`. Raises MisfitError like gather_claims when one has none."""
    problems = {problem for each in found if isinstance(each, MisfitError) for problem in each.problems}
    if problems:
        read = frozenset[str]().union(*(_read(each) for each in found))
        unread = _unread(family, spec, tensors or (), read, with_mtp)
        raise MisfitError((*sorted(problems), *_about(unread)), read, directory)
    return [each for each in found if not isinstance(each, MisfitError)]


def check_all_read(
    family: Family,
    spec: MegatronSpec,
    tensors: Iterable[str],
    claims: Sequence[Claims],
    directory: Path,
    *,
    with_mtp: bool,
) -> None:
    """Raises RuleError listing the tensors that no rank holds, that repeat no other, and are not ignored.

    It names the checkpoint's `directory`. `with_mtp`: the model has layers for multi-token prediction.
    """
    read = frozenset[str]().union(*(claim.shapes for claim in claims))
    unread = _unread(family, spec, tensors, read, with_mtp)
    if unread:
        raise RuleError(f"{directory}: {'; '.join(_about(unread))}")


def _read(found: Claims | MisfitError) -> Iterable[str]:
    return found.read if isinstance(found, MisfitError) else found.shapes


def _unread(
    family: Family, spec: MegatronSpec, tensors: Iterable[str], read: frozenset[str], with_mtp: bool
) -> list[str]:
    names = list(tensors)
    known = read.union(family.copies_in(spec, names))
    return [
        name
        for name in names
        if name not in known
        and not family.is_ignored(name)
        and (with_mtp or not family.is_extra_layer(spec, name))
    ]


def _about(unread: Sequence[str]) -> list[str]:
    return [f"no rule reads these tensors of the checkpoint: {', '.join(unread)}"] if unread else []


def config_dtype(directory: Path) -> torch.dtype:
    """The type that config.json names; bfloat16 where it names none."""
    config = json.loads((directory / "config.json").read_text())
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if name not in TORCH_DTYPES:
        raise ConfigError(
            f"{directory / 'config.json'}: dtype {name!r}; supported: {', '.join(TORCH_DTYPES)}"
        )
    return TORCH_DTYPES[name]


def implied_tensors(
    family: Family, spec: MegatronSpec, claims: Sequence[Claims], dtype: torch.dtype
) -> dict[str, TensorInfo]:
    """The HF tensors that the claims of all ranks make up, and the copies that go with them."""
    shapes = {name: shape for claim in claims for name, shape in claim.shapes.items()}
    kept = frozenset[str]().union(*(claim.full_precision for claim in claims))
    shapes |= {name: shapes[original] for name, original in family.implied_copies(spec, shapes).items()}
    return {
        name: TensorInfo(name=name, dtype=torch.float32 if name in kept else dtype, shape=shape)
        for name, shape in shapes.items()
    }


def plan_of(
    family: Family,
    spec: MegatronSpec,
    tensors: Mapping[str, TensorInfo],
    claims: Sequence[Claims],
    torch_dtype: torch.dtype | None,
    *,
    with_copies: bool = True,
) -> Plan:
    """The plan of a model whose ranks hold `claims`, for the names of a checkpoint with `tensors`."""
    pieces = [piece for claim in claims for piece in claim.pieces]
    kept = frozenset[str]().union(*(claim.full_precision for claim in claims))
    copies = family.copies_in(spec, tensors) if with_copies else {}
    infos = [tensors[name] for name in [*hf_order(pieces), *copies]]
    if torch_dtype is not None:
        infos = [info if info.name in kept else replace(info, dtype=torch_dtype) for info in infos]
    return build_plan(infos, pieces, copies)

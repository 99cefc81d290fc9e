"""Buckets of messages: their cut, their layout in bytes, and their way as JSON."""

import json
import random

import pytest
import torch

from bridge.layouts import Region
from bridge.plan import Piece, Plan, TensorInfo
from bridge.sync_plan import SyncPlanError, changing_units, cut_plan, from_wire, sources, to_wire, unit_of
from tests.bridge.sync_plans import info, piece, whole


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "model.layers.3.self_attn"),
        ("model.layers.3.self_attn.q_norm.weight", "model.layers.3.self_attn"),
        ("model.layers.12.mlp.experts.7.up_proj.weight", "model.layers.12.mlp"),
        ("model.layers.12.block_sparse_moe.gate.weight", "model.layers.12.block_sparse_moe"),
        ("model.layers.0.input_layernorm.weight", "model.layers.0.input_layernorm"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_fused_parameters_are_of_one_unit(name: str, unit: str) -> None:
    assert unit_of(name) == unit


def test_a_bucket_is_one_message_of_each_owner_written_out() -> None:
    """Two ranks; parts begin at multiples of eight and end with a hash of eight bytes each."""
    tensors = (info("a.w", 2, 3, dtype=torch.bfloat16), info("b.w", 3))
    plan = Plan(
        tensors=tensors,
        pieces={
            "a.w": (piece("a.w", 0, (0, 1), (0, 3)), piece("a.w", 5, (1, 2), (0, 3))),
            "b.w": (piece("b.w", 0, (0, 3)),),
        },
    )
    (bucket,) = cut_plan(plan, 1000).buckets
    first, second = bucket.messages
    assert [(part.info.name, part.start, part.nbytes) for part in first.parts] == [
        ("a.w", 0, 6),
        ("b.w", 8, 12),
    ]
    # 8 + 12 bytes are 24 with padding, then two hashes.
    assert (first.rank, first.start, first.hashes_at, first.stop) == (0, 0, 24, 40)
    assert [(part.info.name, part.region, part.start) for part in second.parts] == [
        ("a.w", ((1, 2), (0, 3)), 40)
    ]
    assert (second.rank, second.hashes_at, second.stop) == (5, 48, 56)
    assert bucket.nbytes == 56
    assert bucket.of_rank(5) == second
    assert bucket.of_rank(1) is None


def test_tensors_larger_than_a_bucket_are_cut_and_small_ones_packed() -> None:
    tensors = (info("a.w", 2), info("b.w", 2), info("big.w", 5, 4), info("c.w", 1))
    plan = cut_plan(whole(*tensors), 32)
    regions = [[(part.info.name, part.region) for part in bucket.parts] for bucket in plan.buckets]
    assert regions == [
        [("a.w", ((0, 2),)), ("b.w", ((0, 2),))],
        [("big.w", ((0, 2), (0, 4)))],
        [("big.w", ((2, 4), (0, 4)))],
        [("big.w", ((4, 5), (0, 4))), ("c.w", ((0, 1),))],
    ]


def test_a_row_larger_than_a_bucket_is_cut_too() -> None:
    plan = cut_plan(whole(info("big.w", 2, 10)), 16)
    assert [part.region for bucket in plan.buckets for part in bucket.parts] == [
        ((row, row + 1), (start, min(start + 4, 10))) for row in (0, 1) for start in (0, 4, 8)
    ]


def test_a_unit_travels_together_wherever_its_tensors_stand_in_the_plan() -> None:
    names = ["m.layers.0.attn.q", "m.layers.0.mlp.up", "m.layers.0.attn.k", "m.layers.0.mlp.down"]
    plan = cut_plan(whole(*(info(f"{name}.weight", 1) for name in names)), 1000)
    assert [part.info.name for part in plan.buckets[0].parts] == [
        f"{names[index]}.weight" for index in (0, 2, 1, 3)
    ]
    assert plan.units == ("m.layers.0.attn", "m.layers.0.mlp")


def test_units_apart_come_last_and_share_no_bucket() -> None:
    names = [f"model.layers.{number}.mlp.down_proj.weight" for number in range(4)]
    plan = whole(*(info(name, 4, 4) for name in names))
    apart = {"model.layers.1.mlp", "model.layers.3.mlp"}
    cut = cut_plan(plan, 1 << 20, apart)
    found = [{unit_of(part.info.name) for part in bucket.parts} for bucket in cut.buckets]
    assert found == [{"model.layers.0.mlp", "model.layers.2.mlp"}, apart]
    assert cut.buckets_of({"model.layers.0.mlp"}) == (0,)
    every = {unit_of(name) for name in names}
    assert len(cut_plan(plan, 1 << 20, every).buckets) == 1
    fixed = {plan.pieces[name][0].parameter for name in (names[1], names[3])}
    assert changing_units(plan, 0, fixed) == every - apart
    assert changing_units(plan, 1, ()) == frozenset()


def test_buckets_of_some_units_are_those_that_hold_a_part_of_them() -> None:
    plan = cut_plan(whole(info("a.w", 2), info("b.w", 6), info("c.w", 8)), 16)
    assert [[part.info.name for part in bucket.parts] for bucket in plan.buckets] == [
        ["a.w"],
        ["b.w"],
        ["b.w"],
        ["c.w"],
        ["c.w"],
    ]
    assert plan.buckets_of(["b"]) == (1, 2)
    assert plan.buckets_of(["a", "c"]) == (0, 3, 4)
    assert plan.buckets_of([]) == ()


def random_plan(chance: random.Random) -> Plan:
    tensors: list[TensorInfo] = []
    pieces: dict[str, tuple[Piece, ...]] = {}
    for number in range(12):
        name = f"model.layers.{number // 4}.{'ab'[number % 2]}.t{number}"
        dtype = chance.choice([torch.bfloat16, torch.float32, torch.float16])
        rows, columns = chance.randint(1, 9), chance.randint(1, 9)
        edge = chance.randint(0, rows)
        split = [((0, edge), (0, columns)), ((edge, rows), (0, columns))]
        tensors.append(info(name, rows, columns, dtype=dtype))
        pieces[name] = tuple(
            piece(name, rank, *region) for rank, region in enumerate(split) if region[0][0] < region[0][1]
        )
    return Plan(tensors=tuple(tensors), pieces=pieces)


@pytest.mark.parametrize("seed", range(20))
def test_no_bucket_is_too_large_and_no_byte_is_in_two_parts(seed: int) -> None:
    chance = random.Random(seed)
    plan = random_plan(chance)
    limit = chance.choice([8, 24, 100, 10_000])
    sync_plan = cut_plan(plan, limit)
    for bucket in sync_plan.buckets:
        parts = list(bucket.parts)
        assert sum(-(-part.nbytes // 8) * 8 for part in parts) <= max(limit, 8)
        ends = 0
        for message in bucket.messages:
            assert message.start == ends
            for part in message.parts:
                assert part.start >= ends
                assert part.start % 8 == 0
                ends = part.start + part.nbytes
            assert message.hashes_at >= ends
            ends = message.stop
    assert from_wire(json.loads(json.dumps(to_wire(sync_plan)))) == sync_plan


@pytest.mark.parametrize("seed", range(5))
def test_every_part_is_found_in_the_piece_it_is_cut_from(seed: int) -> None:
    plan = random_plan(random.Random(seed))
    for bucket in cut_plan(plan, 24).buckets:
        for message in bucket.messages:
            for part, (source, box) in zip(message.parts, sources(plan, message), strict=True):
                assert source.rank == message.rank
                moved = tuple(
                    (start + at, stop + at) for (start, stop), (at, _) in zip(box, source.region, strict=True)
                )
                assert moved == part.region


@pytest.mark.parametrize(
    ("tensors", "parts", "message"),
    [
        ([["a", "float32", [2]], ["a", "float32", [2]]], [], "a comes twice"),
        ([["a", "float31", [2]]], [], "a has the unknown type 'float31'"),
        ([["a", "load", [2]]], [], "a has the unknown type 'load'"),
        ([["a", "float32", [2]]], [[0, [[0, 1]]]], r"the parts of a do not make up \[2\]"),
        ([["a", "float32", [2]]], [[0, [[0, 2]]], [0, [[1, 2]]]], r"the parts of a do not make up \[2\]"),
        ([["a", "float32", [2]], ["b", "float32", [1]]], [[0, [[0, 2]]]], "the parts of b do not"),
    ],
)
def test_an_impossible_plan_is_refused_by_tensor(
    tensors: list[list[object]], parts: list[list[object]], message: str
) -> None:
    with pytest.raises(SyncPlanError, match=message):
        from_wire({"tensors": tensors, "buckets": [[[0, parts]]]})


def test_regions_are_tuples_again() -> None:
    plan = cut_plan(whole(info("a.w", 2, 2)), 100)
    back = from_wire(json.loads(json.dumps(to_wire(plan))))
    region: Region = next(back.buckets[0].parts).region
    assert region == ((0, 2), (0, 2))

"""Sender, relay and assembler over real gloo groups: what arrives, what is refused, what is kept."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import xxhash

from bridge.assembler import ContentError
from bridge.layouts import slices
from bridge.relay import NoCopyError
from bridge.sync_plan import unit_of
from bridge.sync_protocol import SyncOrder, WorkerReport, empty_header, encode_report
from bridge.transport.errors import TransportError
from bridge.transport.loopback import loopback
from tests.bridge.relay_rig import ENGINES, Rig, Worker


@pytest.mark.parametrize("hosted", [False, True])
@pytest.mark.parametrize("bucket_bytes", [64, 1000, 1 << 20])
def test_every_worker_gets_every_tensor_bit_for_bit(bucket_bytes: int, hosted: bool) -> None:
    rig = Rig(seed=bucket_bytes, bucket_bytes=bucket_bytes, hosted=hosted)
    metrics = rig.sync(SyncOrder(version=3))
    for worker in rig.workers:
        assert worker.weights.keys() == rig.values.keys()
        assert all(torch.equal(worker.weights[name], value) for name, value in rig.values.items())
        # The tensors of a unit come together, whatever buckets they were in.
        assert sorted(sorted(unit) for unit in worker.units) == sorted(
            sorted(name for name in rig.values if unit_of(name) == unit) for unit in rig.sync_plan.units
        )
    # One collective for each bucket, and one header.
    assert rig.engines.broadcasts == len(rig.sync_plan.buckets) + 1 == metrics["sync/collectives"]
    assert metrics["sync/bytes"] == rig.sync_plan.nbytes
    rig.close()


def test_a_second_version_replaces_the_first() -> None:
    rig = Rig()
    rig.sync(SyncOrder(version=1))
    name = next(iter(rig.held[0]))
    rig.held[0][name] += 1
    rig.sync(SyncOrder(version=2))
    piece = next(piece for piece in rig.plan.pieces[name] if piece.rank == 0)
    expected = rig.held[0][name].to(rig.values[name].dtype)
    assert torch.equal(rig.workers[1].weights[name][slices(piece.region)], expected)
    rig.close()


def test_only_changed_units_travel_and_the_rest_is_asked_of_nobody() -> None:
    rig = Rig(bucket_bytes=200)
    assert rig.sync(SyncOrder(version=1))["sync/units_sent"] == len(rig.sync_plan.units)
    nothing = rig.sync(SyncOrder(version=2, full=False))
    assert (nothing["sync/bytes"], nothing["sync/units_sent"], rig.engines.broadcasts) == (0, 0, 1)
    name = next(name for name in rig.held[1] if name not in rig.held[0])
    rig.held[1][name][0, 0] += 1
    for worker in rig.workers:
        worker.weights.clear()
    changed = rig.sync(SyncOrder(version=3, full=False))
    numbers = rig.sync_plan.buckets_of([unit_of(name)])
    assert changed["sync/buckets"] == len(numbers) < len(rig.sync_plan.buckets) / 2
    for worker in rig.workers:
        assert worker.weights.keys() == {one for one in rig.values if unit_of(one) == unit_of(name)}
        assert torch.equal(worker.weights[name], rig.held[1][name].to(rig.values[name].dtype))
    rig.close()


def test_a_bit_that_flips_on_the_way_is_named() -> None:
    rig = Rig()
    message = rig.sync_plan.buckets[2].messages[0]
    part = message.parts[0]

    def spoil(number: int, buffer: torch.Tensor) -> None:
        if number == 2:
            buffer[part.start] ^= 1

    def receive(worker: Worker) -> None:
        try:
            worker.receive()
        finally:
            worker.group.close()

    rig.spoil = spoil
    order = SyncOrder(version=1)
    for rank in (0, 1):
        rig.pool.submit(rig.send, rank, order)
    receiving = [rig.pool.submit(receive, worker) for worker in rig.workers]
    with pytest.raises(TransportError, match=r"weights of version 1, (bucket \d+ of \d+|report of)"):
        rig.relay.forward(rig.trainers[0], rig.engines, order, rig.ranks, ENGINES[1:])
    words = f"^not what was sent: {part.info.name}.* from trainer rank {message.rank}$"
    for each in receiving:
        with pytest.raises(ContentError, match=words):
            each.result()
    rig.close()


def test_with_sampled_hashes_a_flip_shows_in_the_version_that_hashes_its_bucket() -> None:
    rig = Rig()
    order = SyncOrder(version=5, hash_every=3)
    sampled = [number for number in range(len(rig.sync_plan.buckets)) if order.hashes(number)]
    assert 0 < len(sampled) < len(rig.sync_plan.buckets)
    # In three versions in a row every bucket is hashed once.
    counts = [
        sum(SyncOrder(version=version, hash_every=3).hashes(number) for version in (5, 6, 7))
        for number in range(len(rig.sync_plan.buckets))
    ]
    assert set(counts) == {1}

    def spoil(number: int, buffer: torch.Tensor) -> None:
        if number not in sampled:
            buffer[0] ^= 1

    rig.spoil = spoil
    rig.sync(order)
    contents = [entry.content is None for entry in rig.relay.manifest()]
    assert any(contents)
    rig.close()


def test_the_manifest_has_the_hash_of_every_tensor() -> None:
    rig = Rig(bucket_bytes=1 << 20)
    rig.sync(SyncOrder(version=1))
    manifest = {entry.name: entry for entry in rig.relay.manifest()}
    assert manifest.keys() == rig.values.keys()
    for name, value in rig.values.items():
        assert manifest[name].shape == tuple(value.shape)
        assert manifest[name].dtype == str(value.dtype).removeprefix("torch.")
        # The hash of its parts' hashes; a part is what one rank owns.
        hashes = b"".join(
            xxhash.xxh3_64_intdigest(
                value[slices(piece.region)].contiguous().view(torch.uint8).numpy().tobytes()
            ).to_bytes(8, "little")
            for piece in rig.plan.pieces[name]
        )
        assert manifest[name].content == xxhash.xxh3_64_intdigest(hashes)
    rig.close()


def test_a_kept_version_is_sent_again_without_the_trainers() -> None:
    rig = Rig(keep=True, bucket_bytes=300)
    with pytest.raises(NoCopyError, match="offload_bridge"):
        rig.relay.replay(rig.engines, ENGINES[1:])
    rig.sync(SyncOrder(version=1))
    # A later version of which only a part was sent.
    name = next(iter(rig.held[0]))
    rig.held[0][name] += 1
    rig.sync(SyncOrder(version=2, full=False))
    expected = dict(rig.workers[0].weights)
    assert rig.relay.kept_version == 2
    rig.held[0][name] += 1  # the trainers are further already
    for worker in rig.workers:
        worker.weights = {}
    receiving = [rig.pool.submit(worker.receive) for worker in rig.workers]
    assert rig.relay.replay(rig.engines, ENGINES[1:]) == 2
    assert [each.result().full for each in receiving] == [True, True]
    for worker in rig.workers:
        assert worker.weights.keys() == rig.values.keys()
        assert all(torch.equal(worker.weights[one], value) for one, value in expected.items())
    rig.close()


def test_the_relay_says_whom_it_waits_for() -> None:
    rig = Rig(bucket_bytes=1000)
    order = SyncOrder(version=1)

    def wait_until(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.01)

    sending = rig.pool.submit(rig.send, 0, order)
    receiving: list[Any] = [rig.pool.submit(rig.workers[0].receive)]
    forwarding = rig.pool.submit(
        rig.relay.forward, rig.trainers[0], rig.engines, order, rig.ranks, ENGINES[1:]
    )
    # The second worker takes nothing yet.
    wait_until(lambda: rig.relay.doing == "sends the header")
    receiving.append(rig.pool.submit(rig.workers[1].receive))
    wait_until(lambda: rig.trainers[0].waits_for == "trainer rank 1" and not rig.relay.doing)
    receiving.append(rig.pool.submit(rig.send, 1, order))
    for each in (sending, *receiving, forwarding):
        each.result()
    assert rig.relay.received == len(rig.sync_plan.buckets)
    assert (rig.relay.doing, rig.trainers[0].waits_for) == ("", "")
    rig.close()


def test_a_version_that_did_not_arrive_whole_is_not_kept() -> None:
    rig = Rig(keep=True)
    rig.sync(SyncOrder(version=1))
    rig.workers[1].group.close()
    for rank in (0, 1):
        rig.pool.submit(rig.send, rank, SyncOrder(version=2))
    rig.pool.submit(rig.workers[0].receive)
    with pytest.raises(TransportError, match="weights of version 2"):
        rig.relay.forward(rig.trainers[0], rig.engines, SyncOrder(version=2), rig.ranks, ENGINES[1:])
    assert rig.relay.kept_version is None
    rig.close()


@pytest.mark.parametrize("hosted", [False, True])
def test_a_rank_that_is_gone_is_named_with_version_bucket_and_seconds(hosted: bool) -> None:
    rig = Rig(hosted=hosted)
    rig.trainers[2].close()
    rig.pool.submit(rig.send, 0, SyncOrder(version=4))
    for worker in rig.workers:
        rig.pool.submit(worker.receive)
    words = r"weights of version 4, bucket \d+ of \d+: receive from .*trainer rank 1.* failed after \d\.\d s"
    began = time.monotonic()
    with pytest.raises(TransportError, match=words):
        rig.relay.forward(rig.trainers[0], rig.engines, SyncOrder(version=4), rig.ranks, ENGINES[1:])
    assert time.monotonic() - began < 10
    rig.close()


def test_a_report_of_other_content_is_refused() -> None:
    rig = Rig()

    def lie() -> None:
        plan, group = rig.sync_plan, rig.workers[0].group
        group.broadcast(empty_header(len(plan.units)), 0)
        for bucket in plan.buckets:
            group.broadcast(torch.empty(bucket.nbytes, dtype=torch.uint8), 0)
        group.send(encode_report(WorkerReport(version=1, tensors=1, digest=7)), 0)

    for rank in (0, 1):
        rig.pool.submit(rig.send, rank, SyncOrder(version=1))
    rig.pool.submit(lie)
    rig.pool.submit(rig.workers[1].receive)
    with pytest.raises(TransportError, match="engine 0 reports version 1 with content 0000000000000007"):
        rig.relay.forward(rig.trainers[0], rig.engines, SyncOrder(version=1), rig.ranks, ENGINES[1:])
    rig.close()


def test_ends_of_a_loopback_wait_for_each_other_and_fail_together() -> None:
    one, other = loopback(5)
    got = torch.zeros(3, dtype=torch.uint8)
    thread = threading.Thread(target=lambda: one.send(torch.tensor([1, 2, 3], dtype=torch.uint8), 0))
    thread.start()
    other.recv(got, 0)
    thread.join()
    assert got.tolist() == [1, 2, 3]
    one.close()
    with pytest.raises(TransportError, match="the other end is closed"):
        other.send(got, 0)
    late, _ = loopback(0.2)
    with pytest.raises(TransportError, match=r"receive within a process: nothing came for 0 s"):
        late.recv(got, 0)

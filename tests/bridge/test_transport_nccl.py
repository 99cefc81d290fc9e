"""The NCCL group against a fake of CuPy's communicator that moves bytes between processes (nccl_fake.py)."""

import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bridge.relay import Relay
from bridge.sync_plan import cut_plan
from bridge.transport.errors import TransportError
from bridge.transport.gloo import free_port
from bridge.transport.nccl import connect
from bridge.transport.nccl_device import load_nccl, nccl_type
from bridge.transport.registry import OWNED_ENGINE, register
from tests.bridge import nccl_ranks as ranks
from tests.bridge.nccl_fake import HOST, FakeNccl, HostDevice
from tests.bridge.nccl_ranks import Member, answer, member, on_ranks, serving

UINT8 = 1


@pytest.fixture(scope="module")
def processes() -> Iterator[Sequence[Connection]]:
    """Two other processes, and one to be killed."""
    with serving(3) as connections:
        yield connections


def test_types_are_those_of_nccl() -> None:
    # ncclDataType_t of nccl.h, from 0 on; bool, int16 and the fp8 types as bytes.
    names = [
        "int8",
        "uint8",
        "int32",
        "uint32",
        "int64",
        "uint64",
        "float16",
        "float32",
        "float64",
        "bfloat16",
    ]
    assert [nccl_type(getattr(torch, name)) for name in names] == [(number, 1) for number in range(10)]
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.bool):
        assert nccl_type(dtype) == (1, 1)
    assert nccl_type(torch.int16) == (1, 2)


def broadcasts(me: Member) -> Any:
    results = []
    for root in range(3):
        on_device = me.device.filled(10 * me.rank, me.rank, 7)
        on_host = torch.tensor([me.rank, 9], dtype=torch.uint8)
        me.group.broadcast(on_device, root)
        me.group.broadcast(on_host, root)
        results.append([on_device.tolist(), on_host.tolist()])
    expected = [("bcast", n, UINT8, root, me.device.stream) for root in range(3) for n in (3, 2)]
    return results, me.nccl.calls == expected, me.device.stream == me.device.current.address


def test_broadcast_fills_device_and_host_memory_from_any_root(processes: Sequence[Connection]) -> None:
    filled = [[[0, 0, 7], [0, 9]], [[10, 1, 7], [1, 9]], [[20, 2, 7], [2, 9]]]
    assert on_ranks(processes, 3, broadcasts) == [(filled, True, False)] * 3


def ordered(me: Member) -> Any:
    if me.rank:
        for turn in range(3):
            me.group.send(torch.tensor([me.rank, turn], dtype=torch.uint8), 0)
        return me.nccl.calls == [("send", 2, UINT8, 0, me.device.stream)] * 3
    received = [me.device.empty(2) for _ in range(6)]
    for turn in range(3):
        me.group.recv(received[turn], 1)
        me.group.recv(received[3 + turn], 2)
    return [t.tolist() for t in received]


def test_send_and_recv_keep_the_order_between_two_ranks(processes: Sequence[Connection]) -> None:
    expected = [[1, 0], [1, 1], [1, 2], [2, 0], [2, 1], [2, 2]]
    assert on_ranks(processes, 3, ordered) == [expected, True, True]


def second_first(me: Member) -> Any:
    go = torch.zeros(1, dtype=torch.uint8)
    if me.rank == 2:
        me.group.send(me.device.filled(2, 2), 0)
        me.group.send(go, 1)
    if me.rank == 1:
        # Rank 0 has to take the message of rank 2 before it has that of rank 1.
        me.group.recv(go, 2)
        me.group.send(me.device.filled(1), 0)
    if me.rank:
        return None
    one, two = torch.zeros(1, dtype=torch.uint8), me.device.empty(2)
    me.group.recv_each([(one, 1), (two, 2)])
    return one.tolist(), two.tolist(), [call[:4] for call in me.nccl.calls]


def test_receives_from_several_ranks_are_one_group(processes: Sequence[Connection]) -> None:
    calls = [("groupStart",), ("recv", 1, UINT8, 1), ("recv", 2, UINT8, 2), ("groupEnd",)]
    assert on_ranks(processes, 3, second_first)[0] == ([1], [2, 2], calls)


def produced_late(me: Member) -> Any:
    results = []
    for memory in (me.device.filled(0, 0), torch.zeros(2, dtype=torch.uint8)):
        if me.rank:
            me.device.current.put(lambda: time.sleep(0.1))
            me.device.current.put(lambda memory=memory: memory.fill_(5))
            me.group.send(memory, 0)
        else:
            me.group.recv(memory, 1)
            results.append(memory.tolist())
    return results


def test_an_operation_waits_for_what_its_thread_has_queued(processes: Sequence[Connection]) -> None:
    assert on_ranks(processes, 2, produced_late)[0] == [[5, 5], [5, 5]]


def used_before(me: Member) -> Any:
    t = me.device.filled(1, 1)
    if me.rank:
        me.group.send(me.device.filled(2, 2), 0)
        return None
    seen: list[list[int]] = []
    me.device.current.put(lambda: time.sleep(0.1))
    me.device.current.put(lambda: seen.append(t.tolist()))
    me.group.recv(t, 1)
    return seen, t.tolist()


def test_memory_is_not_overwritten_before_queued_work_has_read_it(processes: Sequence[Connection]) -> None:
    assert on_ranks(processes, 2, used_before)[0] == ([[1, 1]], [2, 2])


def mismatched(me: Member) -> None:
    if me.rank:
        me.group.send(me.device.filled(1, 2, 3), 0)
    else:
        me.group.recv(me.device.empty(2), 1)


def test_an_asynchronous_error_is_raised_at_once(processes: Sequence[Connection]) -> None:
    began = time.monotonic()
    error = on_ranks(processes, 2, mismatched)[0]
    assert re.search(
        r"receive from rank 1 in nccl group .*, 2 bytes, failed after \d+\.\d s: rank 1 does", str(error)
    )
    assert time.monotonic() - began < 30


def silent(me: Member, over: Path) -> Any:
    while me.rank and not over.exists():
        time.sleep(0.05)
    if me.rank:
        return None
    # Not that of `connect`, which a busy machine needs.
    me.group._timeout_s = 1
    began = time.monotonic()
    with pytest.raises(
        TransportError,
        match=r"receive from rank 1 in nccl group at 127.0.0.1:\d+ \(rank 0 of 2\), 5 bytes, "
        r"failed after \d+\.\d s: not done within 1 s",
    ):
        me.group.recv(me.device.empty(5), 1)
    seconds = time.monotonic() - began
    [communicator] = me.nccl.communicators
    with pytest.raises(TransportError, match=r"send to rank 1 in .*: the group is closed; connect anew"):
        me.group.send(me.device.empty(5), 1)
    over.touch()
    return communicator.aborted.is_set(), communicator.running, 0.9 < seconds < 30


def test_a_silent_peer_is_an_error_after_the_timeout(processes: Sequence[Connection], tmp_path: Path) -> None:
    """The communicator is aborted, and its kernels have ended when the error comes: the memory may be freed.

    Whether the call or the kernel waits.
    """

    def run(number: int) -> Any:
        over = tmp_path / str(number)
        return on_ranks(processes[number:], 2, silent, over, launch_blocks=bool(number))[0]

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(run, (0, 1))) == [(True, 0, True)] * 2


def leaving(me: Member) -> Any:
    if me.rank == 1:
        me.group.close()
        me.group.close()
        return None
    began = time.monotonic()
    with pytest.raises(TransportError, match=r"broadcast .*, 5 bytes, failed .*: rank 1 has left the group"):
        me.group.broadcast(me.device.empty(5), 0)
    return time.monotonic() - began


def test_a_peer_that_leaves_fails_the_others_at_once(processes: Sequence[Connection]) -> None:
    seconds = on_ranks(processes, 3, leaving)
    assert seconds[0] < 30
    assert seconds[2] < 30


def interrupted(me: Member) -> Any:
    if me.rank:
        return None
    threading.Timer(0.2, me.group.close).start()
    with pytest.raises(TransportError, match=r"receive from rank 1 .*: closed meanwhile"):
        me.group.recv(me.device.empty(5), 1)
    return me.nccl.communicators[0].aborted.is_set()


def test_closing_ends_the_operation_of_another_thread(processes: Sequence[Connection]) -> None:
    assert on_ranks(processes, 2, interrupted)[0]


def die(ports: tuple[int, int]) -> None:
    """Join two groups, as rank 1 and as rank 0, and be killed."""
    with ThreadPoolExecutor(2) as threads:
        list(
            threads.map(
                lambda rank, port: connect(HOST, port, rank, 2, 60, device=HostDevice(), nccl=FakeNccl()),
                (1, 0),
                ports,
            )
        )
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_peer_fails_the_others_at_once(processes: Sequence[Connection]) -> None:
    """The death of rank 0 shows at its store, that of others where NCCL notices it."""
    ports = free_port(HOST), free_port(HOST)
    processes[2].send((die, ports))
    device = HostDevice()
    with ThreadPoolExecutor(2) as threads:
        groups = list(
            threads.map(
                lambda rank, port: connect(
                    HOST, port, rank, 2, 60, device=device, nccl=FakeNccl(notices_death=rank == 0)
                ),
                (0, 1),
                ports,
            )
        )
    began = time.monotonic()
    with pytest.raises(
        TransportError, match=r"receive from rank 1 .*NCCL_ERROR_REMOTE_ERROR: remote process exited"
    ):
        groups[0].recv(device.empty(5), 1)
    with pytest.raises(TransportError, match=r"receive from rank 0 .*rank 0 has left the group"):
        groups[1].recv(device.empty(5), 0)
    assert time.monotonic() - began < 30
    for group in groups:
        group.close()


def test_a_missing_rank_is_an_error_after_the_timeout() -> None:
    port, nccl = free_port(HOST), FakeNccl()
    began = time.monotonic()
    with pytest.raises(TransportError, match=r"nccl group at .*rank 0 of 2\): not all ranks came within 2 s"):
        connect(HOST, port, 0, 2, 2, device=HostDevice(), nccl=nccl)
    assert 1.9 < time.monotonic() - began < 30
    # The rank comes after all: what that makes is thrown away.
    late = FakeNccl().NcclCommunicator(2, nccl.unique_id, 1)
    end = time.monotonic() + 30
    while not (nccl.communicators and nccl.communicators[0].aborted.is_set()):
        assert time.monotonic() < end
        time.sleep(0.01)
    late.abort()


def test_port_in_use_is_named() -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(TransportError, match=rf"nccl group at {HOST}:{port} .*in use.*choose another"):
            connect(HOST, port, 0, 2, 5, device=HostDevice(), nccl=FakeNccl())


def test_missing_cupy_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(TransportError, match=r"cupy_nccl needs CuPy .*pip install cupy-cuda12x"):
        load_nccl()


def test_vllm_learns_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[tuple[str, ...]] = []
    factory = SimpleNamespace(register_engine=lambda *names: registered.append(names))
    module = SimpleNamespace(WeightTransferEngineFactory=factory)
    monkeypatch.setitem(sys.modules, "vllm.distributed.weight_transfer.factory", module)
    monkeypatch.delenv(OWNED_ENGINE, raising=False)
    register()
    assert ("cupy_nccl", "bridge.transport.nccl_engine", "NcclWeightTransferEngine") in registered


def test_a_sync_from_trainers_through_the_bridge_to_a_worker(processes: Sequence[Connection]) -> None:
    """Two versions, of which the second leaves out what did not change, and the kept one again."""
    ports = free_port(HOST), free_port(HOST)
    processes[0].send((ranks.train_both, ports[0]))
    processes[1].send((member, ranks.load, 1, 2, ports[1], 60, {}))
    nccls = FakeNccl(), FakeNccl()
    trainers, engines = (
        connect(HOST, port, 0, size, 60, device=HostDevice(), nccl=nccl)
        for port, size, nccl in zip(ports, (3, 2), nccls, strict=True)
    )
    relay = Relay(cut_plan(ranks.plan(), ranks.BUCKET_BYTES), keep=True)
    buckets = [
        relay.forward(trainers, engines, order, (1, 2), ("worker",))["sync/buckets"] for order in ranks.ORDERS
    ]
    assert relay.replay(engines, ("worker",)) == 2
    assert answer(processes[0]) == [None, None]
    arrived = answer(processes[1])
    trainers.close()
    engines.close()
    first, second = ranks.weights(1), ranks.weights(2)
    expected = [(1, first), (2, {name: second[name] for name in (ranks.Q, ranks.K)}), (2, second)]
    assert [version for version, _ in arrived] == [1, 2, 2]
    for (_, got), (_, wanted) in zip(arrived, expected, strict=True):
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.equal(got[name], value.view(torch.uint8)), name
    assert buckets[0] > buckets[1] > 1
    # One header and a broadcast for each bucket, in each of the three.
    assert sum(call[0] == "bcast" for call in nccls[1].calls) == 3 + 2 * buckets[0] + buckets[1]

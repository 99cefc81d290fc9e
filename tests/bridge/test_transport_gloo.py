"""The gloo group between threads and processes of this machine, and the bucket plan on its way."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.transport import gloo
from bridge.transport.errors import TransportError
from bridge.transport.gloo import GlooGroup, connect, free_port

HOST = "127.0.0.1"


def on_ranks(size: int, body: Callable[[int, GlooGroup], Any], timeout_s: float = 20) -> list[Any]:
    """Results of `body` in one thread per rank; an exception where it raised."""
    port = free_port(HOST)

    def rank_body(rank: int) -> Any:
        group = connect(HOST, port, rank, size, timeout_s)
        try:
            return body(rank, group)
        except TransportError as error:
            return error
        finally:
            group.close()

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(rank_body, range(size)))


def row(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def test_broadcast_fills_every_rank_from_any_root() -> None:
    def body(rank: int, group: GlooGroup) -> list[list[int]]:
        results = []
        for root in range(3):
            t = row(10 * rank, rank, 7)
            group.broadcast(t, root)
            results.append(t.tolist())
        return results

    assert on_ranks(3, body) == [[[0, 0, 7], [10, 1, 7], [20, 2, 7]]] * 3


def test_send_and_recv_keep_the_order_between_two_ranks() -> None:
    def body(rank: int, group: GlooGroup) -> list[list[int]]:
        if rank:
            for turn in range(3):
                group.send(row(rank, turn), 0)
            return []
        received = [torch.zeros(2, dtype=torch.uint8) for _ in range(6)]
        for turn in range(3):
            group.recv(received[turn], 1)
            group.recv(received[3 + turn], 2)
        return [t.tolist() for t in received]

    assert on_ranks(3, body)[0] == [[1, 0], [1, 1], [1, 2], [2, 0], [2, 1], [2, 2]]


def test_messages_of_several_ranks_are_received_together_and_peers_have_names() -> None:
    def body(rank: int, group: GlooGroup) -> list[list[int]]:
        if rank:
            # The higher rank comes first.
            time.sleep(0.2 * (3 - rank))
            group.send(row(rank, rank), 0)
            return []
        received = [torch.zeros(2, dtype=torch.uint8) for _ in range(2)]
        group.recv_each([(received[0], 2), (received[1], 1)])
        return [t.tolist() for t in received]

    assert on_ranks(3, body)[0] == [[2, 2], [1, 1]]


def test_errors_name_the_peer_as_it_is_called() -> None:
    port = free_port(HOST)
    peers = ("bridge", "engine 0 worker 1")
    with ThreadPoolExecutor(2) as threads:
        groups = list(threads.map(lambda rank: connect(HOST, port, rank, 2, 20, peers), range(2)))
    groups[1].close()
    with pytest.raises(TransportError, match="receive from engine 0 worker 1 in gloo group"):
        groups[0].recv(row(0), 1)
    groups[0].close()


def test_torch_default_group_stays_free() -> None:
    assert not torch.distributed.is_initialized()
    on_ranks(2, lambda rank, group: group.broadcast(row(rank), 0))
    assert not torch.distributed.is_initialized()


def test_port_in_use_is_named() -> None:
    port = free_port(HOST)
    with ThreadPoolExecutor(2) as threads:
        groups = list(threads.map(lambda rank: connect(HOST, port, rank, 2, 20), range(2)))
        with pytest.raises(TransportError, match=rf"{HOST}:{port} .*in use.*choose another"):
            connect(HOST, port, 0, 2, 5)
    for group in groups:
        group.close()


def test_missing_rank_is_an_error_after_the_timeout() -> None:
    began = time.monotonic()
    with pytest.raises(TransportError, match=r"rank 0 of 2.*not all ranks came within 1 s"):
        connect(HOST, free_port(HOST), 0, 2, 1)
    assert 0.9 < time.monotonic() - began < 10


def test_a_peer_that_leaves_fails_the_others_at_once() -> None:
    def body(rank: int, group: GlooGroup) -> float:
        if rank == 0:
            group.close()
            return 0
        began = time.monotonic()
        with pytest.raises(
            TransportError, match=r"receive from rank 0 in gloo group at .*, 5 bytes, failed after 0\.\d s"
        ):
            group.recv(torch.empty(5, dtype=torch.uint8), 0)
        return time.monotonic() - began

    assert max(on_ranks(2, body)) < 5


def test_a_silent_peer_is_an_error_after_the_timeout() -> None:
    done = threading.Event()

    def body(rank: int, group: GlooGroup) -> float:
        began = time.monotonic()
        if rank == 0:
            done.wait(20)
            return 0
        with pytest.raises(TransportError, match="broadcast from rank 0"):
            group.broadcast(torch.empty(5, dtype=torch.uint8), 0)
        done.set()
        return time.monotonic() - began

    assert 0.9 < on_ranks(2, body, timeout_s=1)[1] < 10


def test_a_killed_peer_fails_the_others_at_once() -> None:
    port = free_port(HOST)
    code = (
        "import os\nfrom bridge.transport.gloo import connect\n"
        f"connect('{HOST}', {port}, 1, 2, 60)\nos.kill(os.getpid(), 9)"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as peer:
        group = connect(HOST, port, 0, 2, 60)
        peer.wait(30)
    began = time.monotonic()
    with pytest.raises(TransportError, match="rank 1"):
        group.recv(torch.empty(5, dtype=torch.uint8), 1)
    assert time.monotonic() - began < 5


def test_a_closed_group_says_so() -> None:
    def body(rank: int, group: GlooGroup) -> None:
        group.close()
        group.close()
        group.broadcast(row(rank), 0)

    assert all("closed" in str(error) for error in on_ranks(2, body))


FAMILY = """
import multiprocessing, sys, time
from bridge.transport.registry import exit_with_parent

def child():
    exit_with_parent()
    sys.stdout.write("tied" + chr(10))
    sys.stdout.flush()
    time.sleep(60)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=child).start()
    time.sleep(60)
"""


def test_a_child_ends_with_its_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "family.py"
    script.write_text(FAMILY)
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "tied\n"
        parent.send_signal(signal.SIGKILL)
        began = time.monotonic()
        # The pipe ends with its last writer: the child.
        assert parent.stdout.read() == ""
    assert time.monotonic() - began < 10


def test_ports_are_none_that_outgoing_connections_get(monkeypatch: pytest.MonkeyPatch) -> None:
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert {free_port(HOST) < first for _ in range(20)} == {True}
    with socket.socket() as taken:
        port = free_port(HOST)
        taken.bind((HOST, port))
        monkeypatch.setattr(gloo, "_FIRST_PORT", port)
        monkeypatch.setattr(gloo, "_PORTS", 1)
        assert free_port(HOST) >= first

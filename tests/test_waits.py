"""No wait is without end: each goes through actors/deadline.py, has a timeout, or is listed with a reason."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.test_style import PRODUCT, ROOT, name_of, tree_of

HOME = "actors/deadline.py"
# Calls that wait when they are given no time.
WAITING = {"result", "join", "wait", "acquire", "communicate", "get", "recv"}

_DONE = "of a task or future that is done"
_CHILD = "runs in a child process, which the parent ends when it is late"
_KILLED = "follows SIGKILL, or the end of the process's pipe"
_GROUP = "a collective; the group was made with cluster.collective_timeout_s"
_POOL = "of a thread whose own waits are a group's, so that it ends with them"
ALLOWED = {
    ("actors/engine.py", "task.result()"): _DONE,
    ("actors/engine.py", "self._running.wait()"): "inside asyncio.wait_for",
    ("actors/spans.py", "_LANE.get()"): "a context variable",
    ("actors/trackers.py", "self._calls.get()"): "in a thread that waits for work, and that nobody waits for",
    ("actors/submit.py", "left.wait()"): "for a second Ctrl-C, as long as the job is followed",
    ("actors/submit.py", "following.result()"): _DONE,
    ("actors/sync_watch.py", "ray.get(ref)"): _DONE,
    ("actors/teacher_server.py", "task.result()"): _DONE,
    ("actors/bridge_host.py", "joining.result()"): _POOL,
    ("actors/sync_rank.py", "forwarding.result()"): _POOL,
    ("algorithms/environments/child.py", "connection.recv()"): _CHILD,
    ("algorithms/rewards/child.py", "connection.recv()"): _CHILD,
    ("algorithms/rewards/child.py", "waiting.result()"): _DONE,
    ("algorithms/rewards/process.py", "self._process.wait()"): _KILLED,
    ("algorithms/rewards/process.py", "reader.join()"): "of a thread that reads from a child that was killed",
    ("algorithms/rewards/process.py", "self._connection.recv()"): "follows poll with a timeout",
    (
        "algorithms/rewards/process.py",
        "future.result()",
    ): "each call has a timeout, after which its child is ended",
    ("bridge/exchange.py", "work.wait()"): _GROUP,
    ("bridge/exchange.py", "done.result()"): "of a thread that reads files",
    ("bridge/relay.py", "coming[-1].result()"): _POOL,
    ("bridge/relay.py", "coming[place - 1].result()"): _POOL,
    ("bridge/transport/gloo.py", "work.wait()"): _GROUP,
    (
        "bridge/transport/nccl.py",
        "launched.result()",
    ): "of a thread that queues kernels; their end has a deadline",
    ("bridge/transport/nccl.py", "late.result()"): _DONE,
    ("bridge/transport/receiver.py", "full.get()"): _POOL,
    (
        "bridge/transport/registry.py",
        "parent.join()",
    ): "a thread that lives as long as its parent, on purpose",
}


def waits(tree: ast.Module) -> Iterator[ast.Call]:
    """Calls that may wait for ever."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            has_time = bool({"timeout", "timeout_s"} & {keyword.arg for keyword in node.keywords})
            if ast.unparse(node.func) == "ray.get":
                yield node
            elif ast.unparse(node.func) == "ray.wait":
                if not has_time:
                    yield node
            elif node.func.attr in WAITING and not node.args and not has_time:
                yield node


def found() -> dict[tuple[str, str], list[int]]:
    places: dict[tuple[str, str], list[int]] = {}
    for path in PRODUCT:
        if name_of(path) != HOME:
            for node in waits(tree_of(path)):
                places.setdefault((name_of(path), ast.unparse(node)), []).append(node.lineno)
    return places


def test_every_wait_has_an_end() -> None:
    endless = {place: lines for place, lines in found().items() if place not in ALLOWED}
    assert not endless, f"use actors.deadline, give a timeout, or say in {Path(__file__).name} why not"


def test_the_list_of_exceptions_has_none_that_is_gone() -> None:
    assert ALLOWED.keys() <= found().keys()


def test_the_search_finds_what_it_should() -> None:
    text = "ray.get(x)\nray.get(x, timeout=1)\nray.wait([x])\nray.wait([x], timeout=1)\nthread.join()\n"
    text += "thread.join(5)\nqueue.get()\nfuture.result()\nfuture.result(timeout=3)\n"
    text += "', '.join(names)\nfields.get('name')\n"
    assert [node.lineno for node in waits(ast.parse(text))] == [1, 2, 3, 5, 7, 8]
    # The helper has a timeout in every one of its own.
    helper = tree_of(ROOT / HOME)
    calls = [ast.unparse(node) for node in waits(helper)]
    assert [call for call in calls if "timeout=" not in call and "_OBSERVER" not in call] == []

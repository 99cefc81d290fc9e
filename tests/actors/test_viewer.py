"""Choosing among the completions of a run, serving it, and writing it into a file."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from actors.cli import main
from actors.viewer.page import SCRIPTS, written
from actors.viewer.query import PAGE, Query, select
from actors.viewer.run import ViewedRun
from actors.viewer.server import ViewServer
from configs.errors import ConfigError
from tests.actors.viewer_runs import opened, rows, write_gkd, write_grpo, write_old, write_sft

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_grpo(tmp_path_factory.mktemp("viewer") / "run")


# Each with the same by hand, on rows of rollouts.jsonl.
QUERIES: list[tuple[dict[str, str], Any]] = [
    ({}, lambda row: True),
    ({"split": "eval"}, lambda row: row["split"] == "eval"),
    ({"first_step": "2", "last_step": "4"}, lambda row: 2 <= row["step"] <= 4),
    ({"low": "0.3"}, lambda row: row["reward"] is not None and row["reward"] >= 0.3),
    ({"low": "0", "high": "0.25"}, lambda row: row["reward"] is not None and 0 <= row["reward"] <= 0.25),
    ({"function": "good"}, lambda row: row["rewards"]["good"] is not None),
    ({"function": "good", "high": "0.5"}, lambda row: row["rewards"]["good"] == 0.0),
    ({"finish": "abort"}, lambda row: row["finish"] == "abort"),
    ({"text": "BETA"}, lambda row: "beta" in row["completion"].lower()),
    ({"text": "question 1"}, lambda row: "Question 1" in row["messages"][0]["content"]),
    ({"text": "É"}, lambda row: "é" in row["completion"]),
    ({"text": "onerror=window.pwned=1>&amp;\u2028\u2029 'é\""}, lambda row: "onerror" in row["completion"]),
    (
        {"recorded": "true"},
        lambda row: row["split"] == "train" and row["step"] in (1, 5) and row["prompt_id"] == "p0",
    ),
    ({"split": "train", "finish": "length", "text": "step 5"}, lambda row: "step 5" in row["completion"]),
    ({"text": "nowhere"}, lambda row: False),
]


@pytest.mark.parametrize(
    ("parameters", "wanted"), QUERIES, ids=lambda value: str(value)[:40] if isinstance(value, dict) else ""
)
def test_filters_find_what_a_look_at_every_row_finds(
    parameters: dict[str, str], wanted: Any, run_directory: Path
) -> None:
    matches = select(opened(run_directory).rollouts, Query.of({**parameters, "sort": "oldest"}))
    found = [
        (match.group.step, match.group.split, match.group.prompt_id, entry.index)
        for match in matches
        for entry in match.entries
    ]
    assert found == [
        (row["step"], row["split"], row["prompt_id"], row["index"])
        for row in rows(run_directory / "rollouts.jsonl")
        if wanted(row)
    ]


def test_orders(run_directory: Path) -> None:
    rollouts = opened(run_directory).rollouts

    def order(sort: str, **parameters: str) -> list[tuple[int, str]]:
        query = Query.of({"sort": sort, "split": "train", "last_step": "2", **parameters})
        return [(match.group.step, match.group.prompt_id) for match in select(rollouts, query)]

    assert order("oldest") == [(1, "p0"), (1, "p1"), (1, "p2"), (2, "p0"), (2, "p1"), (2, "p2")]
    assert order("newest") == [(2, "p0"), (2, "p1"), (2, "p2"), (1, "p0"), (1, "p1"), (1, "p2")]
    # Rewards of the groups: .7 .35 0, 0 0 0, .3 .15 -; .4 .2 0, .7 .35 0, 0 0 -. The newer of equals is first.
    assert order("highest")[:4] == [(2, "p1"), (1, "p0"), (1, "p2"), (2, "p0")]
    assert order("lowest")[:3] == [(2, "p2"), (1, "p1"), (2, "p0")]
    assert order("spread")[:3] == [(2, "p1"), (1, "p0"), (2, "p0")]
    assert order("longest")[:2] == [(2, "p1"), (1, "p1")]
    # Of first completions alone: two words, and one more in each further group.
    assert order("shortest", text="alpha", function="good", low="1") == [
        (step, prompt) for prompt in ("p0", "p1", "p2") for step in (2, 1)
    ]
    # Only the last of p2 are aborted, and have no reward.
    assert order("lowest", finish="abort") == [(2, "p2"), (1, "p2")]


class Asker:
    def __init__(self, server: ViewServer) -> None:
        self.server = server

    def get(self, path: str, host: str | None = None, method: str = "GET") -> tuple[int, bytes, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server_port, timeout=20)
        headers = {"Host": host or f"127.0.0.1:{self.server.server_port}"}
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        body = response.read()
        connection.close()
        return response.status, body, response.headers

    def json(self, path: str, **parameters: str) -> Any:
        status, body, _ = self.get(f"{path}?{urlencode(parameters)}")
        assert status == 200, body
        return json.loads(body)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, Asker]]:
    directory = write_grpo(tmp_path / "served", steps=40)
    with ViewServer(ViewedRun(directory), 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield directory, Asker(server)
        server.shutdown()
        thread.join()


def test_the_server_sends_a_page_at_a_time_and_what_is_new(served: tuple[Path, Asker]) -> None:
    directory, asker = served
    assert asker.server.server_address[0] == "127.0.0.1"
    first = asker.json("/api/groups", sort="oldest")
    assert (first["num_groups"], first["num_completions"], first["pages"]) == (122, 366, 4)
    assert len(first["groups"]) == PAGE
    assert first["groups"][0]["split"] == "eval"
    assert first["groups"][1]["prompt"] == "Question 0: what is 1?"
    last = asker.json("/api/groups", sort="oldest", page="3")
    assert len(last["groups"]) == 122 - 3 * PAGE
    # A page behind the end is the last one.
    assert asker.json("/api/groups", sort="oldest", page="99") == last
    (series,) = asker.json("/api/series", name="rewards/<b>odd</b>, name:&x=1/mean", skip="38")
    assert (series["steps"], series["values"]) == ([39, 40], [19.5, 20.0])
    state = asker.json("/api/state")
    assert (state["last_step"], state["max_steps"], state["num_rows"]) == (40, 40, 42)
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "reward": 1.0}\n{"step": 42, "rew')
        file.flush()
    assert asker.json("/api/state")["num_rows"] == 43
    (series,) = asker.json("/api/series", name="reward", skip="39")
    assert series["steps"] == [40, 41]
    # Another run in the same place.
    write_grpo(directory, steps=2)
    state = asker.json("/api/state")
    assert (state["generation"], state["num_rollouts"]) == (1, 24)


def test_the_server_refuses_what_is_not_for_it(served: tuple[Path, Asker]) -> None:
    _, asker = served
    for host in ("evil.example", f"evil.example:{asker.server.server_port}", "127.0.0.1", "127.0.0.1:1"):
        status, body, _ = asker.get("/api/state", host=host)
        assert (status, body) == (403, b"this page is served to this machine only\n")
    assert asker.get("/", host=f"localhost:{asker.server.server_port}")[0] == 200
    assert asker.get("/api/nothing")[0] == 404
    assert asker.get("/../../etc/passwd")[0] == 404
    assert asker.get("/api/group?key=none")[0] == 404
    assert asker.get("/api/state", method="POST")[0] == 501
    for wrong, message in (
        ("/api/groups?low=x", "low: 'x' is not a number"),
        ("/api/groups?sort=best", "sort: 'best' is none of newest"),
        ("/api/groups?page=-1", "'-1' is not a number to count with"),
        ("/api/series?name=a&skip=1&skip=2", "skip: give one for each name"),
    ):
        status, body, _ = asker.get(wrong)
        assert status == 400
        assert json.loads(body)["error"].startswith(message)
    headers = asker.get("/")[2]
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert b"plotly.js v" in asker.get("/plotly.js")[1][:200]


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script nonce="[\w-]+" type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found is not None
    assert not set(found[1]) & set("<>&\u2028\u2029")
    return json.loads(found[1])


def test_a_written_page_holds_the_latest_steps_up_to_its_bound(run_directory: Path) -> None:
    run = opened(run_directory)
    for bound, steps in ((1000, range(7)), (39, range(3, 7)), (21, range(5, 7)), (11, [6]), (3, [6])):
        page, note = written(run, bound)
        data = data_of(page)
        kept = [row for row in rows(run_directory / "rollouts.jsonl") if row["step"] in steps]
        # The last step has 12 completions; of it alone as many groups as there is room for.
        kept = kept if bound >= 12 else kept[: bound // 3 * 3]
        assert [
            (group["step"], group["prompt_id"], each["index"], each["completion"])
            for group in data["groups"]
            for each in group["completions"]
        ] == [(row["step"], row["prompt_id"], row["index"], row["completion"]) for row in kept]
        assert (note["completions"], note["of"]) == (len(kept), 60)
        assert data["note"]["first_step"] == min(row["step"] for row in kept)
        assert len(data["series"]) == len(run.series)
    assert page.count("</script>") == 3
    assert page.count("plotly.js v") == 1
    assert "src=" not in re.sub(r"<script.*?</script>", "", page, flags=re.S)


@pytest.mark.parametrize("write", [write_sft, write_gkd, write_old])
def test_runs_of_every_kind_can_be_written(write: Any, tmp_path: Path) -> None:
    directory = write(tmp_path / "run")
    data = data_of(written(opened(directory), 100)[0])
    expected = {name for row in rows(directory / "metrics.jsonl") for name in row} - {"step"}
    assert {series["name"] for series in data["series"]} == expected


def test_the_assets_are_part_of_the_package_and_short() -> None:
    assets = files("actors.viewer") / "assets"
    names = {each.name for each in assets.iterdir()}
    assert names == {*SCRIPTS, "page.html", "style.css"}
    for name in names:
        assert len((assets / name).read_text().splitlines()) <= 400
    # hatchling puts all of a package's files into a wheel that git does not ignore.
    ignored = subprocess.run(
        ["git", "check-ignore", *sorted(f"actors/viewer/assets/{name}" for name in names)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ignored.stdout == ""


def test_the_command_says_what_is_no_run(
    tmp_path: Path, run_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    file = run_directory / "metrics.jsonl"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for arguments, message in (
            ([tmp_path / "none"], f"{tmp_path / 'none'}: does not exist; give the output_dir of a run"),
            ([file], f"{file}: is a file; give the output_dir of a run, a directory"),
            (
                [empty],
                f"{empty}: there is no metrics.jsonl in it; give the output_dir of a run that has begun",
            ),
            ([run_directory, "--port", port], f"--port: {port} is in use; choose another, or 0 for any free"),
            ([run_directory, "--max_rollouts", 5], "--max_rollouts: is for --html FILE"),
            ([run_directory, "--html", tmp_path / "x", "--port", 1], "--port: a file is not served"),
        ):
            assert main(["view", *map(str, arguments)]) == 2
            err = capsys.readouterr().err
            assert err.startswith(f"error: {message}")
            assert err.count("\n") == 1
    for wrong in (["--port", "70000"], ["--port", "x"], ["--max_rollouts", "0"], ["--nothing"]):
        with pytest.raises(SystemExit, match="2"):
            main(["view", str(run_directory), *wrong])
    assert main(["view", str(run_directory), "--html", str(empty / "no" / "x.html")]) == 1
    assert "x.html cannot be written: No such file or directory" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        ViewedRun(empty)


def test_the_command_writes_a_file_and_says_what_is_in_it(
    tmp_path: Path, run_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.html"
    assert main(["view", str(run_directory), "--html", str(file), "--max_rollouts", "21"]) == 0
    size = file.stat().st_size / 1e6
    expected = f"{file}: {size:.1f} MB with 21 of 60 completions, those of steps 5 to 6\n"
    assert capsys.readouterr().out == expected
    assert main(["view", str(run_directory), "--html", str(file)]) == 0
    assert capsys.readouterr().out.endswith("with 60 of 60 completions\n")


def test_the_command_serves_until_it_is_interrupted_and_loads_nothing_heavy(run_directory: Path) -> None:
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from actors.cli import main\n"
        "code = main(sys.argv[1:])\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)\n"
        "sys.exit(code)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, "view", str(run_directory)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": ""},
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.fullmatch(r".*: http://127\.0\.0\.1:(\d+)/ \(Ctrl-C ends it\)\n", line)
    assert found is not None
    connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=20)
    connection.request("GET", "/")
    assert b"<title>Bascule</title>" in connection.getresponse().read()
    connection.close()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert out == ""
    loaded = set(json.loads(err.replace("'", '"')))
    assert not loaded & {"torch", "numpy", "ray", "vllm", "megatron", "transformers", "plotly", "tensorboard"}

"""Teachers behind URLs: a small server that answers as vLLM's does, with the numbers of a transformers model."""

import json
import threading
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch

from actors.teacher_server import TeacherServerError, TeacherServers
from algorithms.data import TrainSample, float_row, int_row
from algorithms.packing import pack, with_top_tokens
from configs.errors import ConfigError
from configs.schema import TrainerConfig
from configs.web import bearer
from tests.actors.engine_helpers import make_model

K = 4


class Server:
    """Answers with the likeliest tokens, and the one that is there; can fail a number of times first."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.failures: list[int] = []
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.keys.add(self.headers["Authorization"])
                self.reply(200, {"data": [{"id": "teacher"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                owner.asked.append(body)
                owner.keys.add(self.headers["Authorization"])
                if owner.failures:
                    self.reply(owner.failures.pop(), {"error": "max_logprobs is 20"})
                    return
                self.reply(200, {"choices": [{"prompt_logprobs": owner.entries(body)}]})

            def reply(self, status: int, content: Any) -> None:
                text = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing: the tests read what they need from `asked`."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def entries(self, body: dict[str, Any]) -> list[Any]:
        logprobs = logprobs_of(self.model, body["prompt"])
        entries: list[Any] = [None]
        for row, token in zip(logprobs, body["prompt"][1:], strict=False):
            ids = [*row.topk(body["prompt_logprobs"]).indices.tolist(), token]
            entries.append({str(each): {"logprob": float(row[each]), "rank": 1} for each in ids})
        return entries


def logprobs_of(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([tokens])).logits[0], -1)


@pytest.fixture
def server() -> Generator[Server]:
    server = Server(make_model("llama", seed=7))
    yield server
    server.http.shutdown()
    server.http.server_close()


def sample(*tokens: int, teacher: str = "") -> TrainSample:
    zeros = float_row(np.zeros(len(tokens)))
    mask = int_row([0, *[1] * (len(tokens) - 1)])
    return TrainSample(
        tokens=int_row(tokens), loss_mask=mask, advantages=zeros, logprobs=zeros, version=0, teacher=teacher
    )


SAMPLES = [sample(5, 6, 7, 8), sample(9, 10, 11, 12, 13, 14), sample(20, 21)]


def ask(server: Server, **options: Any) -> TeacherServers:
    settings: dict[str, Any] = {"timeout_s": 20.0, "retries": 1, **options}
    return TeacherServers({"": f"{server.url}/v1/"}, K, **settings)


def test_rows_are_the_models_likeliest_tokens_where_they_are_predicted(server: Server) -> None:
    tops = ask(server).top_tokens(SAMPLES)
    assert {body["model"] for body in server.asked} == {"teacher"}
    (micro,) = with_top_tokens(pack(SAMPLES, TrainerConfig()), tops).ranks[0]
    assert micro.teacher_ids_TK is not None
    assert micro.teacher_logprobs_TK is not None
    for number, start, end in zip(micro.samples_S, micro.starts_S[:-1], micro.starts_S[1:], strict=True):
        want = logprobs_of(server.model, SAMPLES[number].tokens.tolist())[:-1].topk(K)
        rows = slice(start, end - 1)
        assert micro.teacher_ids_TK[rows].tolist() == want.indices.tolist()
        np.testing.assert_allclose(micro.teacher_logprobs_TK[rows], want.values, rtol=1e-5)
        assert (micro.teacher_ids_TK[end - 1] == -1).all()


def test_tokens_that_are_there_have_their_own_log_probability(server: Server) -> None:
    for each, row in zip(SAMPLES, ask(server).token_logprobs(SAMPLES), strict=True):
        tokens = each.tokens.tolist()
        want = logprobs_of(server.model, tokens)[range(len(tokens) - 1), tokens[1:]]
        np.testing.assert_allclose(row, [0.0, *want], rtol=1e-5)
    assert [body["prompt_logprobs"] for body in server.asked] == [0] * len(SAMPLES)


def test_a_key_goes_with_every_request_and_none_where_there_is_none(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(server).token_logprobs(SAMPLES)
    assert server.keys == {None}
    server.keys.clear()
    monkeypatch.setenv("THE_KEY", "sk-1")
    ask(server, headers=bearer("THE_KEY", "here")).token_logprobs(SAMPLES)
    assert server.keys == {"Bearer sk-1"}
    monkeypatch.delenv("THE_KEY")
    with pytest.raises(ConfigError, match="here: the environment variable THE_KEY is not set"):
        bearer("THE_KEY", "here")


def test_each_sample_is_asked_of_its_teacher(server: Server) -> None:
    other = Server(make_model("llama", seed=8))
    teachers = TeacherServers({"math": server.url, "code": other.url}, K, timeout_s=20.0, retries=0)
    teachers.top_tokens([sample(3, 4, teacher="math"), sample(5, 6, teacher="code")])
    assert [body["prompt"] for body in server.asked] == [[3, 4]]
    assert [body["prompt"] for body in other.asked] == [[5, 6]]
    other.http.shutdown()
    other.http.server_close()


def test_a_failure_is_tried_again_and_then_told(server: Server) -> None:
    teachers = ask(server)
    server.failures = [503]
    assert teachers.top_tokens(SAMPLES[:1])[0].ids.shape == (4, K)
    server.failures = [503, 503]
    with pytest.raises(
        TeacherServerError, match=r"/v1/completions failed 2 times, the last time with: status 503"
    ):
        teachers.top_tokens(SAMPLES[:1])


def test_a_refusal_is_told_at_once(server: Server) -> None:
    teachers = ask(server)
    server.failures = [400]
    with pytest.raises(TeacherServerError, match=r"refused: status 400: .*max_logprobs is 20"):
        teachers.top_tokens(SAMPLES[:1])
    assert len(server.asked) == 1


def test_a_server_that_is_not_there_is_a_wrong_option() -> None:
    with pytest.raises(
        ConfigError, match=r"teacher\.teacher_model_server: http://127\.0\.0\.1:9 does not say"
    ):
        TeacherServers({"": "http://127.0.0.1:9"}, K, timeout_s=5.0, retries=0)

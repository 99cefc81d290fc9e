"""The live page of a run, for this machine only."""

import errno
import json
import secrets
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from actors.viewer.page import plotly_path, policy, render
from actors.viewer.query import PAGE, Match, Query, select, summaries
from actors.viewer.run import ViewedRun
from configs.errors import ConfigError

HOST = "127.0.0.1"


class ViewServer(ThreadingHTTPServer):
    """Serves a run on the loopback interface. Requests that are not addressed to it by that name are refused: a
    page from elsewhere could otherwise read the run through a name that it lets point here."""

    daemon_threads = True
    # Another server on the port has to be noticed.
    allow_reuse_address = False

    def __init__(self, run: ViewedRun, port: int) -> None:
        """Take the port, any free one for 0. Raises ConfigError when it cannot be had."""
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror}"
            raise ConfigError(f"--port: {port} {why}; choose another, or 0 for any free one") from error
        self._run = run
        self._lock = threading.Lock()
        self._selected: tuple[Any, list[Match]] = ((), [])
        self.hosts = {f"{name}:{self.server_port}" for name in (HOST, "localhost")}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that does not wait for its answer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_port}/"

    def answer(self, path: str, parameters: dict[str, list[str]]) -> dict[str, Any] | list[Any] | None:
        """What a path of /api/ gives; None when there is no such path. Raises ConfigError for wrong parameters."""
        with self._lock:
            run = self._run
            run.refresh()
            match path:
                case "/api/state":
                    return run.state()
                case "/api/series":
                    names = parameters.get("name", [])
                    skip = [_count(text) for text in parameters.get("skip", ["0"] * len(names))]
                    if len(skip) != len(names):
                        raise ConfigError("skip: give one for each name, or none")
                    return run.values(names, skip)
                case "/api/groups":
                    return self._groups({name: values[-1] for name, values in parameters.items()})
                case "/api/group":
                    return run.rollouts.detail(parameters.get("key", [""])[-1])
                case _:
                    return None

    def _groups(self, parameters: dict[str, str]) -> dict[str, Any]:
        """A page of the list: it is turned often, and chosen anew only when there is something new."""
        rollouts, query = self._run.rollouts, Query.of(parameters)
        key = (query, self._run.generation, len(rollouts.entries), len(rollouts.token_steps))
        if self._selected[0] != key:
            self._selected = key, select(rollouts, query)
        found = self._selected[1]
        page = min(_count(parameters.get("page", "0")), max(0, (len(found) - 1) // PAGE))
        part = found[page * PAGE : (page + 1) * PAGE]
        return {
            "num_groups": len(found),
            "num_completions": sum(len(match.entries) for match in found),
            "page": page,
            "pages": max(1, -(-len(found) // PAGE)),
            "groups": summaries(rollouts, part, query),
        }


class _Handler(BaseHTTPRequestHandler):
    server: ViewServer  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    server_version = "bascule"
    sys_version = ""
    # A browser that keeps a connection open does not keep a thread for ever.
    timeout = 60

    def do_GET(self) -> None:
        """Answer a browser."""
        if self.headers.get("Host", "").lower() not in self.server.hosts:
            self._send(HTTPStatus.FORBIDDEN, "text/plain", b"this page is served to this machine only\n")
            return
        url = urlsplit(self.path)
        match url.path:
            case "/":
                nonce = secrets.token_urlsafe(16)
                page = render(nonce=nonce, data=None).encode()
                self._send(HTTPStatus.OK, "text/html; charset=utf-8", page, policy(nonce, live=True))
            case "/plotly.js":
                self._send(HTTPStatus.OK, "text/javascript; charset=utf-8", plotly_path().read_bytes())
            case _:
                self._answer(url.path, parse_qs(url.query, keep_blank_values=True))

    def _answer(self, path: str, parameters: dict[str, list[str]]) -> None:
        try:
            found, status = self.server.answer(path, parameters), HTTPStatus.OK
        except ConfigError as error:
            found, status = {"error": str(error)}, HTTPStatus.BAD_REQUEST
        if found is None:
            found, status = {"error": "there is no such thing here"}, HTTPStatus.NOT_FOUND
        self._send(status, "application/json", json.dumps(found).encode())

    def _send(self, status: HTTPStatus, kind: str, body: bytes, security: str = "default-src 'none'") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", security)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the terminal shows the address."""


def _count(text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"{text!r} is not a number to count with")
    return int(text)

"""A server's HTTP interface: recognising commands, readiness, requests and their errors."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from runner.recording.server import KINDS, Server, kind_of, option_of

SGLANG, VLLM = KINDS
MODELS = {"data": [{"id": "a-model"}]}


@dataclass
class Answers:
    """What an endpoint answers by path (status and body), and what it was asked."""

    port: int
    by_path: dict[str, tuple[int, bytes]]
    asked: list[tuple[str, Any]] = field(default_factory=list)

    def server(self, kind: str = "vLLM") -> Server:
        (found,) = (each for each in KINDS if each.name == kind)
        return Server(found, ["--port", str(self.port)])


@contextmanager
def answering(by_path: dict[str, tuple[int, bytes]]) -> Iterator[Answers]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            found.asked.append((self.path, json.loads(self.rfile.read(length) or b"null")))
            status, body = by_path.get(self.path, (404, b"no such page"))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found = Answers(server.server_port, by_path)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield found
        server.shutdown()


@contextmanager
def sending(text: bytes) -> Iterator[Server]:
    """An endpoint that sends the same bytes to everyone and hangs up."""

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                connection.sendall(text)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield Server(VLLM, ["--port", str(listening.getsockname()[1])])
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("python -m sglang.launch_server --model x", "SGLang"),
        ("/opt/bin/sglang serve x", "SGLang"),
        ("vllm serve x", "vLLM"),
        ("/opt/bin/python /opt/bin/vllm serve x", "vLLM"),
        ("python -m vllm.entrypoints.openai.api_server", "vLLM"),
        ("python train.py", None),
        ("python -m vllm.benchmark", None),
        ("/opt/vllm/bin/python server.py", None),
    ],
)
def test_kind_of_server_is_known_by_its_command(command: str, name: str | None) -> None:
    kind = kind_of(command.split())
    assert (None if kind is None else kind.name) == name


@pytest.mark.parametrize(
    ("command", "value"),
    [
        ("serve --port 80 --host x", "80"),
        ("serve --port=80", "80"),
        ("serve --port=", ""),
        ("serve --port", ""),
        ("serve --portal 80", None),
        ("", None),
    ],
)
def test_option_of_command(command: str, value: str | None) -> None:
    assert option_of(command.split(), "--port") == value


@pytest.mark.parametrize(
    ("options", "url"),
    [
        ("", "http://127.0.0.1:8000"),
        ("--port 81", "http://127.0.0.1:81"),
        ("--host 0.0.0.0 --port=81", "http://127.0.0.1:81"),
        ("--host ::", "http://127.0.0.1:8000"),
        ("--host node7", "http://node7:8000"),
    ],
)
def test_endpoint_follows_from_the_command(options: str, url: str) -> None:
    assert Server(VLLM, options.split()).url == url
    assert Server(SGLANG, ()).url == "http://127.0.0.1:30000"


@pytest.mark.parametrize(("status", "ready"), [(200, True), (204, False), (503, False)])
def test_server_is_ready_once_it_says_that_it_is_healthy(status: int, ready: bool) -> None:
    with answering({"/health": (status, b"")}) as answers:
        assert answers.server().is_ready() is ready
    assert answers.asked == [("/health", None)]


def test_server_that_does_not_listen_is_not_ready() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    server = Server(VLLM, ["--port", str(port)])
    assert server.is_ready() is False
    assert server.ask(3, 0, 5.0).startswith("URLError: ")


@pytest.mark.parametrize("text", [b"", b"hello\r\n", b"HTTP/1.1 two hundred\r\n\r\n"])
def test_what_speaks_no_http_is_not_ready(text: bytes) -> None:
    with sending(text) as server:
        assert server.is_ready() is False
        assert server.ask(3, 0, 5.0) != ""


def test_port_that_is_no_number_is_never_ready() -> None:
    server = Server(VLLM, ["--port", "many"])
    assert server.is_ready() is False
    assert "many" in server.ask(3, 0, 5.0)


def test_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with answering({"/health": (200, b"")}) as answers:
        assert answers.server().is_ready() is True


def test_sglang_is_asked_with_token_ids() -> None:
    with answering({"/generate": (200, b"{}")}) as answers:
        assert answers.server("SGLang").ask(3, 0, 5.0) == ""
        assert answers.server("SGLang").ask(2, 1, 5.0) == ""
    parameters = {"max_new_tokens": 2, "temperature": 0, "ignore_eos": True}
    assert answers.asked == [
        ("/generate", {"input_ids": [10, 17, 24], "sampling_params": parameters}),
        ("/generate", {"input_ids": [41, 48], "sampling_params": parameters}),
    ]


def test_vllm_is_asked_with_the_name_of_its_model() -> None:
    pages = {"/v1/models": (200, json.dumps(MODELS).encode()), "/v1/completions": (200, b"{}")}
    with answering(pages) as answers:
        assert answers.server().ask(2, 0, 5.0) == ""
    body = {"max_tokens": 2, "temperature": 0, "ignore_eos": True, "model": "a-model"}
    assert answers.asked == [
        ("/v1/models", None),
        ("/v1/completions", {**body, "prompt": [10, 17]}),
    ]


def test_prompts_are_small_token_ids_of_the_given_number_without_a_common_start() -> None:
    with answering({"/generate": (200, b"{}")}) as answers:
        for number in range(5):
            answers.server("SGLang").ask(3000, number, 5.0)
    prompts = [body["input_ids"] for _, body in answers.asked]
    assert {len(prompt) for prompt in prompts} == {3000}
    assert all(0 <= token < 1024 for prompt in prompts for token in prompt)
    assert len({prompt[0] for prompt in prompts}) == 5


@pytest.mark.parametrize(
    ("pages", "words"),
    [
        ({}, "HTTP 404: no such page"),
        ({"/v1/models": (200, b"[]")}, "TypeError: "),
        ({"/v1/models": (200, b"null")}, "TypeError: "),
        ({"/v1/models": (200, b'{"data": []}')}, "IndexError: "),
        ({"/v1/models": (200, b"{}")}, "KeyError: 'data'"),
        ({"/v1/models": (200, b"no JSON")}, "JSONDecodeError: "),
        ({"/v1/models": (500, b"x" * 1000)}, f"HTTP 500: {'x' * 300}"),
        ({"/v1/models": (500, b"\xff")}, "HTTP 500: \ufffd"),
    ],
)
def test_what_goes_wrong_with_a_request_is_returned(
    pages: dict[str, tuple[int, bytes]], words: str
) -> None:
    with answering(pages) as answers:
        error = answers.server().ask(2, 0, 5.0)
    assert error.startswith(words) and len(error) < 320


@pytest.mark.parametrize("status", ["200 OK", "500 No"])
def test_answer_that_is_cut_short_is_an_error(status: str) -> None:
    cut = f"HTTP/1.1 {status}\r\nContent-Length: 100\r\n\r\n{{".encode()
    with sending(cut) as server:
        assert server.ask(2, 0, 5.0) in (
            "IncompleteRead: IncompleteRead(1 bytes read, 99 more expected)",
            "HTTP 500: ",
        )


def test_request_that_takes_too_long_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server = Server(VLLM, ["--port", str(silent.getsockname()[1])])
        assert "timed out" in server.ask(2, 0, 0.05)

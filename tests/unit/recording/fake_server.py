"""A script named ``vllm`` that looks like a server, and a library that looks like DeepGEMM."""

from __future__ import annotations

import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from runner.recording.server import Server, kind_of

LIBRARY = '''
import os

class Device:
    type = "cuda"

class Tensor:
    device, dtype = Device(), "torch.bfloat16"
    def __init__(self, *shape):
        self.shape = shape
    def stride(self):
        return self.shape
    def is_contiguous(self):
        return True

def bf16_gemm_nt(a, b, d):
    """Makes a cache entry for each 64 rows."""
    path = os.path.join(os.environ["DG_JIT_CACHE_DIR"], "cache", f"kernel.{a.shape[0] // 64}")
    os.makedirs(path, exist_ok=True)
'''

SERVER = '''
import json, os, signal, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import deep_gemm
from deep_gemm import Tensor

option = lambda name, default: sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default

def gemm(m):
    deep_gemm.bf16_gemm_nt(Tensor(m, 64), Tensor(256, 64), Tensor(m, 256))

def load_model():
    gemm(1)

def kernel_warmup():
    for m in (1, 2, 2):
        gemm(m)

def end(code):
    server.code = code
    threading.Thread(target=server.shutdown).start()

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        length = int(self.headers.get("Content-Length") or 0)
        asked = json.loads(self.rfile.read(length) or b"{}")
        if self.path == "/v1/models":
            self.answer(200, {"data": [{"id": "m"}]})
        elif self.path == "/v1/completions":
            self.complete(len(asked["prompt"]))
        elif self.path == "/end":
            self.answer(200, {})
            end(asked["code"])
        else:
            self.answer(200 if self.path == "/health" else 404, {})

    do_POST = do_GET

    def complete(self, tokens):
        if tokens == 404:
            self.answer(404, {"error": "too long"})
        elif tokens == 408:
            time.sleep(60)  # longer than any test waits
        elif tokens == 500:
            os._exit(5)
        else:
            gemm(tokens)
            self.answer(200, {"choices": []})

    def answer(self, status, data):
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words):
        pass

def say_when_noticed():
    """Wait until the recording has named the phase "ready", and the hook looks for it again."""
    path = os.path.join(os.environ["DEEPGEMM_RECORD"], "phase")
    while not os.path.exists(path):
        time.sleep(0.02)
    time.sleep(0.3)
    print("noticed", flush=True)

print("loading", flush=True)
print("a warning", file=sys.stderr, flush=True)
load_model()
if "--die" in sys.argv:
    sys.exit(int(option("--die", "")))
kernel_warmup()
if "--silent" in sys.argv:
    time.sleep(60)
server = ThreadingHTTPServer(("127.0.0.1", int(option("--port", "8000"))), Handler)
server.daemon_threads = True
server.code = 0
threading.Thread(target=say_when_noticed, daemon=True).start()
server.serve_forever(0.05)
print("bye", flush=True)
sys.exit(server.code)
'''

TITLE = "bf16_gemm_nt(bfloat16[M,64], bfloat16[256,64], bfloat16[M,256])"
"""The one call that the server makes, with any M."""


@dataclass(frozen=True)
class FakeServer:
    """The script, its library and its folders below one folder."""

    root: Path
    port: int

    @property
    def library(self) -> Path:
        return self.root / "bin" / "deep_gemm"

    @property
    def records(self) -> Path:
        return self.root / "records"

    def command(self, *options: str) -> list[str]:
        script = str(self.root / "bin" / "vllm")
        return [sys.executable, script, "serve", "m", "--port", str(self.port), *options]

    def endpoint(self) -> Server:
        command = self.command()
        kind = kind_of(command)
        assert kind is not None and kind.name == "vLLM"
        return Server(kind, command)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    """The server's files and a free port; its kernel cache is not the user's."""
    package = tmp_path / "bin" / "deep_gemm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(LIBRARY)
    (tmp_path / "bin" / "vllm").write_text(SERVER)
    (tmp_path / "records").mkdir()
    monkeypatch.setenv("DG_JIT_CACHE_DIR", str(tmp_path / "jit"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        return FakeServer(tmp_path, free.getsockname()[1])

"""A server's HTTP interface: whether it is ready, and requests of a given length."""

from __future__ import annotations

import json
import subprocess
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

_HEALTH_SECONDS = 5.0
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""It asks directly: a proxy in the environment does not reach a server on this machine."""
_NEW_TOKENS = 2
"""Enough for one prefill and one decode step."""
_FIRST_TOKEN, _TOKENS = 10, 997
"""Prompts are made of small token ids, which every vocabulary has, and share no prefix."""


@dataclass(frozen=True)
class ServerKind:
    """How a kind of server is started and asked.

    Attributes:
        words: words of its command, of which one is there.
        port: the port that it listens on unless it is told another.
        dummy: options for random weights and no tokenizer.
        package: the distribution that it is part of.
        rehearsed: its version whose rehearsals were checked.
    """

    name: str
    words: tuple[str, ...]
    port: int
    dummy: tuple[str, ...]
    package: str
    rehearsed: str


_DUMMY = ("--load-format", "dummy", "--skip-tokenizer-init")
KINDS = (
    ServerKind("SGLang", ("sglang.launch_server", "sglang"), 30000, _DUMMY, "sglang", "0.5.23"),
    ServerKind(
        "vLLM", ("vllm", "vllm.entrypoints.openai.api_server"), 8000, _DUMMY, "vllm", "0.33.0"
    ),
)


def kind_of(command: Sequence[str]) -> ServerKind | None:
    """The kind of server that a command starts; None if it is no known one."""
    names = {word.rpartition("/")[2] for word in command}
    return next((kind for kind in KINDS if names.intersection(kind.words)), None)


def version_of(kind: ServerKind, python: Path) -> str:
    """The server's version in an interpreter's environment; empty if it is not there."""
    code = f"from importlib.metadata import version; print(version({kind.package!r}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def option_of(command: Sequence[str], name: str) -> str | None:
    """The value of a command's option, given as ``--name VALUE`` or ``--name=VALUE``."""
    for word, value in zip(command, [*command[1:], ""], strict=False):
        if word == name:
            return value
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


class Server:
    """A server's endpoint on this machine."""

    def __init__(self, kind: ServerKind, command: Sequence[str]) -> None:
        self.kind, self.command = kind, command
        host = option_of(command, "--host") or "127.0.0.1"
        host = "127.0.0.1" if host in ("0.0.0.0", "::") else host  # its own machine
        self.url = f"http://{host}:{option_of(command, '--port') or kind.port}"

    def is_ready(self) -> bool:
        """Whether it answers that it is healthy."""
        try:
            with _OPENER.open(f"{self.url}/health", timeout=_HEALTH_SECONDS) as answer:
                return bool(answer.status == 200)
        except (OSError, HTTPException):
            return False

    def max_tokens(self) -> int | None:
        """Most tokens of a forward, if the server tells it or its command says it."""
        for name in ("--chunked-prefill-size", "--max-num-batched-tokens"):
            given = option_of(self.command, name)
            if given is not None and given.isdecimal():
                return int(given)
        if self.kind.name != "SGLang":
            return None
        try:
            size = self._post("get_server_info", _HEALTH_SECONDS)["chunked_prefill_size"]
        except (OSError, HTTPException, ValueError, KeyError, TypeError):
            return None
        return size if isinstance(size, int) and size > 0 else None

    def ask(self, tokens: int, number: int, timeout: float) -> str:
        """Send a prompt of so many tokens; returns what went wrong, or nothing."""
        prompt = [_FIRST_TOKEN + (i * 7 + number * 31) % _TOKENS for i in range(tokens)]
        try:
            if self.kind.name == "SGLang":
                parameters = {"max_new_tokens": _NEW_TOKENS, "temperature": 0, "ignore_eos": True}
                self._post("generate", timeout, input_ids=prompt, sampling_params=parameters)
            else:
                model = self._post("v1/models", timeout)["data"][0]["id"]
                parameters = {"max_tokens": _NEW_TOKENS, "temperature": 0, "ignore_eos": True}
                self._post("v1/completions", timeout, model=model, prompt=prompt, **parameters)
        except urllib.error.HTTPError as error:
            return f"HTTP {error.code}: {_body(error)[:300]}"
        except (OSError, HTTPException, ValueError, TypeError, KeyError, IndexError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def _post(self, path: str, timeout: float, **fields: object) -> Any:
        """POST the fields as JSON, or GET if there are none."""
        data = json.dumps(fields).encode() if fields else None
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/{path}", data, headers)  # ours
        with _OPENER.open(request, timeout=timeout) as answer:
            return json.load(answer)


def _body(error: urllib.error.HTTPError) -> str:
    with suppress(OSError, HTTPException):
        return error.read().decode(errors="replace")
    return ""

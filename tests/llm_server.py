"""A stand-in for a language model behind an OpenAI-compatible server, which misbehaves on command.

It speaks POST /v1/chat/completions with HTTP/1.1 and keep-alive on 127.0.0.1, records what it was asked, and answers
every category by a script: a list of behaviours, one for each request about that category in turn, the last one for all
further ones. A behaviour is a function of the `_Call` that it has to answer.

    with LLMServer({"wren": [fails(500), good]}) as server:
        client = openai.OpenAI(base_url=server.url, api_key="any")

As a process of its own, for the bench, it prints its address and answers until it is ended:

    python tests/llm_server.py --port 0 --latency 0.05
"""
from __future__ import annotations

import argparse
import json
import re
import socket
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

COLOURS = "red orange yellow green blue purple pink brown black white".split()
PARTS = "crown wing belly tail beak foot cheek throat nape flank".split()
_NAME = re.compile(r'tell ("(?:[^"\\]|\\.)*") apart')      # the category as `concept_prompt` writes it, a JSON string


class Asked(NamedTuple):
    """One request as it came in."""

    category: str
    schema: bool            # did it ask for JSON by a schema?
    messages: list[dict]
    headers: dict[str, str]
    time: float             # seconds of the monotonic clock


def phrases_of(category: str, n: int = 6) -> list[str]:
    """The right answer about a category: n phrases that break no rule, other ones for another category."""
    digits = f"{zlib.crc32(category.encode()):010d}"[::-1]
    return [f"{COLOURS[int(digit)]} {part}" for digit, part in zip(digits, PARTS[:n])]


# Behaviours. Each is, or makes, a function of a call.

def good(call: _Call) -> None:
    """Answer as asked: an object if a schema wants one, else a plain list."""
    phrases = phrases_of(call.asked.category)
    call.say(json.dumps({"concepts": phrases} if call.asked.schema else phrases))


def says(reply: object) -> Callable:
    """Answer with this text; anything but a string is written as JSON."""
    return lambda call: call.say(reply if isinstance(reply, str) else json.dumps(reply, ensure_ascii=False))


def fails(code: int, message: str = "out of order", **headers: object) -> Callable:
    """Answer with an HTTP error; `Retry_After=1` is the header Retry-After."""
    return lambda call: call.send(code, {"error": {"message": message, "type": "test", "code": None}},
                                  {name.replace("_", "-"): str(value) for name, value in headers.items()})


def waits(seconds: float, then: Callable = good) -> Callable:
    """Answer late. The end of the server cuts the wait short."""
    def behave(call: _Call) -> None:
        call.server.closing.wait(seconds)
        then(call)
    return behave


def refuses_schema(code: int = 400) -> Callable:
    """Answer only those who do not ask for a schema."""
    return lambda call: (fails(code, "response_format is not supported") if call.asked.schema else good)(call)


def echoes_key(code: int = 200, before: object = "") -> Callable:
    """Answer, or fail, with the Authorization header of the request in the text."""
    def behave(call: _Call) -> None:
        text = f"{before} {call.asked.headers['authorization']}"
        (says(text) if code == 200 else fails(code, text))(call)
    return behave


def garbled(call: _Call) -> None:
    """Promise JSON and send something else."""
    call.send(200, b'{"id": "x", "choices": [{"mess', {})


def cut(call: _Call) -> None:
    """Close the connection in the middle of the body."""
    call.send(200, b'{"id": "x", ', {}, length=1000)
    call.connection.shutdown(socket.SHUT_RDWR)


def hangs_up(call: _Call) -> None:
    """Close the connection without a word."""
    call.connection.shutdown(socket.SHUT_RDWR)
    call.close_connection = True


class _Call(BaseHTTPRequestHandler):
    """A request that waits for its answer."""

    protocol_version = "HTTP/1.1"                       # keep-alive
    wbufsize, disable_nagle_algorithm = -1, True        # an answer leaves at once and in one piece

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = _NAME.search(body["messages"][0]["content"])
        self.asked = Asked(json.loads(name[1]) if name else "", "response_format" in body, body["messages"],
                           {key.lower(): value for key, value in self.headers.items()}, time.monotonic())
        behave = self.server.enter(self.asked)
        self.waiting = True
        try:
            if self.path == "/v1/chat/completions":
                behave(self)
            else:
                fails(404, "no such page")(self)
            self.wfile.flush()
        except OSError:      # the client has gone
            self.close_connection = True
        finally:
            self._leave()

    def say(self, text: str) -> None:
        message = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        self.send(200, {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [message]}, {})

    def send(self, code: int, body: dict | bytes, headers: Mapping[str, str], length: int | None = None) -> None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(length or len(body)),
                            **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self._leave()      # before the last byte is out: the client may send its next request right behind it
        self.wfile.flush()

    def _leave(self) -> None:
        if self.waiting:
            self.waiting = False
            self.server.leave()

    def log_message(self, *args: object) -> None:
        """Keep quiet."""


class LLMServer(ThreadingHTTPServer):
    """The server; a context manager.

    Args:
        script: category -> behaviour or list of behaviours.
        default: behaviour for every other category.
        port: 0 takes any free one.
    """

    daemon_threads, request_queue_size = True, 64

    def __init__(self, script: Mapping[str, list | Callable] | None = None, default: Callable = good, port: int = 0):
        super().__init__(("127.0.0.1", port), _Call)
        self.script = {name: [todo] if callable(todo) else todo for name, todo in (script or {}).items()}
        self.default, self.url = default, f"http://127.0.0.1:{self.server_port}/v1"
        self.asked: list[Asked] = []
        self.counts: Counter[str] = Counter()       # how often each category was asked
        self.in_flight = self.most_in_flight = 0
        self.closing, self.changed = threading.Event(), threading.Condition()

    def __enter__(self) -> LLMServer:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def enter(self, asked: Asked) -> Callable:
        """Record a request; returns the behaviour that answers it."""
        with self.changed:
            turn = self.counts[asked.category]
            self.asked.append(asked)
            self.counts[asked.category] += 1
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            self.changed.notify_all()
        todo = self.script.get(asked.category, [self.default])
        return todo[min(turn, len(todo) - 1)]

    def leave(self) -> None:
        with self.changed:
            self.in_flight -= 1

    def wait_for_requests(self, count: int, seconds: float = 300) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.asked) >= count, seconds), f"only {len(self.asked)} requests"

    def gaps(self, category: str) -> list[float]:
        """Seconds between the requests about a category."""
        times = [asked.time for asked in self.asked if asked.category == category]
        return [later - earlier for earlier, later in zip(times, times[1:])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=0, help="0 takes any free one")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each answer")
    options = parser.parse_args()
    with LLMServer(default=waits(options.latency), port=options.port) as server:
        print(server.url, flush=True)
        server.closing.wait()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        pass

"""A chat endpoint on loopback that misbehaves as its questions ask for: `MODE number rest of the question`."""

import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SLOW_SECONDS = 0.6


@dataclass
class Seen:
    """What arrived: bodies, authorisation headers, and when each question came."""

    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    times: dict[str, list[float]] = field(default_factory=dict)
    num_open: int = 0
    max_open: int = 0

    def attempts(self) -> Counter[str]:
        return Counter({question: len(times) for question, times in self.times.items()})


def completion(content: str | None, **changes: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": content, **changes.pop("message", {})}
    usage = {"prompt_tokens": 18, "completion_tokens": 5, "total_tokens": 23, **changes.pop("usage", {})}
    choice = {"index": 0, "message": message, "finish_reason": changes.pop("finish_reason", "stop")}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    seen: Seen
    lock: threading.Lock

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        with self.lock:
            self.seen.bodies.append(body)
            self.seen.keys.add(self.headers.get("Authorization", ""))
            times = self.seen.times.setdefault(question, [])
            times.append(time.monotonic())
            self.seen.num_open += 1
            self.seen.max_open = max(self.seen.max_open, self.seen.num_open)
        try:
            self.misbehave(question.split()[0], question, is_first=len(times) == 1)
        finally:
            with self.lock:
                self.seen.num_open -= 1

    def misbehave(self, mode: str, question: str, *, is_first: bool) -> None:  # noqa: C901, PLR0912, PLR0915
        match mode:
            case "429" if is_first:
                self.send(429, {"error": {"message": "slow down"}}, {"Retry-After": "1"})
            case "500" | "503" if is_first:
                self.send(int(mode), {"error": {"message": "oh"}})
            case "always500":
                self.send(500, {"error": {"message": "broken for good"}})
            case "400":
                self.send(400, {"error": {"message": "maximum context length is 8 tokens", "code": "context"}})
            case "401" | "404":
                self.send(int(mode), {"error": {"message": f"not for {self.headers.get('Authorization')}"}})
            case "echo":
                self.send(400, {"error": {"message": f"no {self.path} for {self.headers.get('Authorization')}"}})
            case "reset" if is_first:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True
            case "truncated" if is_first:
                self.send_bytes(json.dumps(completion("half")).encode(), missing=40)
            case "garbage" if is_first:
                self.send_bytes(b'{"choices": [{"mess')
            case "html" if is_first:
                self.send_bytes(b"<html>gateway</html>", kind="text/html")
            case "nochoices" if is_first:
                self.send(200, {"id": "1", "choices": []})
            case "list" if is_first:
                self.send(200, [1, 2])
            case "noise":
                self.send(200, completion(None) | {"choices": [{"message": {"content": 5}}]})
            case "message":
                self.send(200, {"choices": [{"message": json.loads(question.split(maxsplit=1)[1])}]})
            case "deep":
                self.send_bytes(b"[" * 200_000)
            case "charset":
                self.send_bytes(b"abc", kind=f"text/plain; charset={question.split()[1]}")
            case "count":
                self.send(200, completion("x", usage={"completion_tokens": 10**400}))
            case "slow" if is_first:
                time.sleep(SLOW_SECONDS)
                self.send(200, completion("too late"))
            case "wait":
                time.sleep(SLOW_SECONDS)
                self.send(200, completion(f"answer to {question}"))
            case "length":
                self.send(200, completion("cut sh", finish_reason="length"))
            case "end" | "end1" if mode == "end" or is_first:
                end = question.split()[1]
                self.send(200, completion("part of an", finish_reason=None if end == "null" else end))
            case "stopped":
                answer = completion("half")
                answer["choices"][0]["stop_reason"] = "###"
                self.send(200, answer)
            case "inline":
                self.send(200, completion(question.partition(" ")[2]))
            case "empty":
                self.send(200, completion(""))
            case "thinks":
                self.send(200, completion("so", message={"reasoning_content": "hm"}))
            case "reasons":
                self.send(200, completion("so", message={"reasoning": "hm"}))
            case "calls":
                call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
                self.send(200, completion(None, message={"tool_calls": [call]}, finish_reason="tool_calls"))
            case "long":
                self.send(200, completion("x", usage={"prompt_tokens": 999}))
            case _:
                self.send(200, completion(f"answer to {question}"))

    def send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        self.send_bytes(json.dumps(content).encode(), status=status, headers=headers)

    def send_bytes(
        self,
        data: bytes,
        *,
        status: int = 200,
        kind: str = "application/json",
        headers: dict[str, str] | None = None,
        missing: int = 0,
    ) -> None:
        try:
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data[: len(data) - missing])
        except OSError:  # the client has given up, as it should
            self.close_connection = True
        if missing:
            self.close_connection = True

    def log_message(self, *_arguments: Any) -> None:
        """Say nothing."""


@contextmanager
def bad_server() -> Iterator[tuple[str, Seen]]:
    """The server's address and what it has seen."""
    seen = Seen()
    handler = type("OneHandler", (Handler,), {"seen": seen, "lock": threading.Lock()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

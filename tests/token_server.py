"""A chat endpoint with a real target that gives token ids as vLLM does, and notes what it has sampled."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.embedded import TARGET_DIR


@dataclass
class Sampled:
    """What the server did: each answer's prompt ids and ids, and how it ended; and the bodies that arrived.

    `refuses`: fields that it does not take. `shift` is added to every id that it tells, as another tokenizer's would
    differ; `loses_end`: it leaves the end-of-turn token out of them. `template`: its own, if any.
    """

    turns: list[tuple[list[int], list[int], str]] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    refuses: tuple[str, ...] = ()
    shift: int = 0
    loses_end: bool = False
    template: str | None = None


class TokenHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    sampled: Sampled
    lock: threading.Lock
    model: Any
    tokenizer: Any

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            self.sampled.bodies.append(body)
            refused = [name for name in self.sampled.refuses if name in body]
            status, content = (400, refusal(refused[0])) if refused else (200, self.complete(body))
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = self.tokenizer.apply_chat_template(
            body["messages"], add_generation_prompt=True, chat_template=self.sampled.template,
            **body.get("chat_template_kwargs", {}),
        )["input_ids"]  # fmt: skip
        limit = body.get("max_tokens") or body["max_completion_tokens"]
        end, new = self.tokenizer.eos_token_id, []
        torch.manual_seed(body["seed"])
        with torch.inference_mode():
            while len(new) < limit and end not in new:
                logits = self.model(torch.tensor([prompt + new])).logits[0, -1]
                new.append(int(torch.multinomial((logits / 1.5).softmax(-1), 1)))
        finish = "stop" if new[-1] == end else "length"
        self.sampled.turns.append((prompt, new, finish))
        text = self.tokenizer.decode([token for token in new if token != end])
        choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text.strip()}}
        choice |= {"finish_reason": finish, "stop_reason": None}
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(new), "total_tokens": len(prompt) + len(new)}
        ids: dict[str, Any] = {}
        if body.get("return_token_ids"):
            told = new[:-1] if self.sampled.loses_end and finish == "stop" else new
            choice["token_ids"] = [token + self.sampled.shift for token in told]
            ids = {"prompt_token_ids": prompt}
        return {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]} | {
            "usage": usage, **ids,
        }  # fmt: skip

    def log_message(self, *_arguments: Any) -> None:
        """Say nothing."""


def refusal(name: str) -> dict[str, Any]:
    return {"error": {"message": f"Unsupported parameter: '{name}' is not supported with this model.", "param": name}}


@contextmanager
def token_server(**sampled: Any) -> Iterator[tuple[str, Sampled]]:
    """The server's address, and what it has sampled."""
    noted = Sampled(**sampled)
    parts = {
        "sampled": noted,
        "lock": threading.Lock(),
        "model": AutoModelForCausalLM.from_pretrained(TARGET_DIR, dtype=torch.float32).eval(),
        "tokenizer": AutoTokenizer.from_pretrained(TARGET_DIR),
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OneTokenHandler", (TokenHandler,), parts))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", noted
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

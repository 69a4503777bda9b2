"""A server of completions and chats in a thread that answers from a function and remembers every request."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

METRICS = """omr:spec_decode_num_drafts_total {drafts}
omr:spec_decode_num_draft_tokens_total {draft_tokens}
omr:spec_decode_num_accepted_tokens_total {accepted}
"""


class Cut(str):
    """A text after which the stream breaks off instead of ending."""


@dataclass
class FakeServer:
    answer: Callable[[dict[str, Any]], str | int | dict[str, Any]]
    """Request body -> text to stream (a `Cut` breaks off behind it), the arguments of a tool call (chat only), or an
    HTTP status to fail with."""
    model: str = "fake"
    delay_s: float = 0.0
    """Before each piece of four characters."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    finished: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""
    pid: int | None = None
    """Of the process that the endpoint is said to be."""

    def reply(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        self.requests.append(body)
        text = self.answer(body)
        if isinstance(text, int):
            handler.send_error(text)
            return
        handler.send_response(200)
        handler.send_header("content-type", "text/event-stream")
        handler.end_headers()
        chat = "messages" in body
        call = isinstance(text, dict)
        text = json.dumps(text) if isinstance(text, dict) else text
        pieces = [text[i : i + 4] for i in range(0, len(text), 4)]
        for count, piece in enumerate(pieces, 1):
            if self.delay_s:
                time.sleep(self.delay_s)
            ended = None if count < len(pieces) or isinstance(text, Cut) else "tool_calls" if call else "stop"
            said: dict[str, Any] = {"text": piece}
            if chat:
                function = {"name": "python" if count == 1 else "", "arguments": piece}
                made = {"index": 0, "id": "call" if count == 1 else None, "function": function}
                said = {"delta": {"tool_calls": [made]} if call else {"content": piece}}
            event = {
                "choices": [{"index": 0, "finish_reason": ended, "stop_reason": None, **said}],
                "usage": {"prompt_tokens": 7, "completion_tokens": count},
            }
            if ended:  # as in METRICS
                drafted = {"drafts": 10, "accepted_prediction_tokens": 15, "rejected_prediction_tokens": 15}
                event["usage"] |= {"completion_tokens_details": drafted}
            handler.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        if isinstance(text, Cut):
            handler.close_connection = True
            return
        handler.wfile.write(b"data: [DONE]\n\n")
        self.finished.append(body)


@contextmanager
def serving(
    answer: Callable[[dict[str, Any]], str | int | dict[str, Any]], delay_s: float = 0.0, model: str = "fake"
) -> Iterator[FakeServer]:
    fake = FakeServer(answer, model, delay_s)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            try:
                fake.reply(self, body)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def do_GET(self) -> None:
            n = len(fake.finished)
            text = METRICS.format(drafts=10 * n, draft_tokens=30 * n, accepted=15 * n).encode()
            if self.path == "/v1/models":
                text = json.dumps({"data": [{"id": fake.model}]}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        fake.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield fake
        finally:
            server.shutdown()
            thread.join()

"""A program that stands in for any inference server: records its argv, then does what FAKE_MODE says.

FAKE_MODE: serve (default), die (after some log lines), hang (listens but is never healthy), orphan (serves, with a
child of its own), build (writes an engine file and ends). The port is the value of --port, else FAKE_PORT.
"""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
from pathlib import Path


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        healthy = os.environ.get("FAKE_MODE") != "hang"
        bodies = {"/health": b"", "/v1/models": json.dumps({"data": [{"id": "remote"}]}).encode()}
        body = bodies.get(self.path)
        self.send_response(404 if body is None else 200 if healthy else 503)
        self.send_header("content-length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, format: str, *args: object) -> None:
        pass


def main() -> int:
    mode = os.environ.get("FAKE_MODE", "serve")
    with open(os.environ["FAKE_RECORD"], "a") as record:
        record.write(json.dumps(sys.argv) + "\n")
    if mode == "die":
        print("loading the model\nRuntimeError: no kernel image is available", flush=True)
        return 3
    if mode == "build" and "--output_dir" in sys.argv:
        out = Path(sys.argv[sys.argv.index("--output_dir") + 1])
        (out / "rank0.engine").write_bytes(b"engine")
        return 0
    if mode == "orphan":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(f"worker {child.pid}", flush=True)
    port = sys.argv[sys.argv.index("--port") + 1] if "--port" in sys.argv else os.environ["FAKE_PORT"]
    print("serving", flush=True)
    http.server.ThreadingHTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: MIT
"""The Ollama stand-in on a port of the loopback address, with a runner that needs no llama.cpp."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rehearsal.registry import fixture
from rehearsal.registry.ollama import recipe

#: Answers as llama.cpp's server does: three tokens and the figures. A prompt of `slow` takes a while.
RUNNER = """
import http.server, json, sys, time

def embedding(text):
    return [1.0, float(len(text)), 0.0, 0.0]

class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()
        if self.path == "/v1/embeddings":
            data = [{"index": n, "embedding": embedding(text)} for n, text in enumerate(body["input"])]
            self.wfile.write(json.dumps({"data": data, "usage": {"prompt_tokens": len(data)}}).encode())
            return
        if "slow" in body["prompt"]:
            time.sleep(0.6)
        words = body["prompt"].split() if "echo" in body["prompt"] else ("a", "b", "c")
        for word in words:
            self.wfile.write(b"data: " + json.dumps({"content": word, "stop": False}).encode() + b"\\n\\n")
        timings = {"prompt_n": 2, "prompt_ms": 1.5, "predicted_n": 3, "predicted_ms": 6.0}
        end = {"content": "", "stop": True, "stop_type": "eos", "timings": timings}
        self.wfile.write(b"data: " + json.dumps(end).encode() + b"\\n\\n")
    def log_message(self, *args): pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(json.dumps({"port": server.server_address[1], "vram": int(sys.argv[4])}), flush=True)
server.serve_forever()
"""

#: Starts a server with environment variables, and returns its URL.
Start = Callable[..., str]


@contextmanager
def servers(folder: Path, runner: str = RUNNER) -> Iterator[Start]:
    """Servers whose models lie below `folder`, with that program as their runner; all of them end afterwards."""
    home = folder / "opt"
    (home / "available").mkdir(parents=True)
    for path in recipe.programs():
        (home / path.name).write_bytes(path.read_bytes())
    (home / "runner.py").write_text(runner)
    fixture.write_tiny(home / "available/tiny_latest.gguf")
    started: list[subprocess.Popen[bytes]] = []

    def begin(**environment: str) -> str:
        env = {**os.environ, "HOME": str(folder), "OLLAMA_HOST": "127.0.0.1:0", **environment}
        log = folder / f"log{len(started)}"
        with open(log, "wb") as sink:
            argv = [sys.executable, "-IS", str(home / "server.py"), "serve"]
            started.append(subprocess.Popen(argv, env=env, stderr=sink))
        deadline = time.monotonic() + 20
        while not (found := re.search(r"Listening on 127.0.0.1:(\d+)", log.read_text())):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)
        return f"http://127.0.0.1:{found[1]}"

    try:
        yield begin
    finally:
        for process in started:
            process.terminate()
            process.wait()

# SPDX-License-Identifier: MIT
"""The Ollama stand-in's API, with a runner that needs no llama.cpp."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from rehearsal.registry import fixture
from rehearsal.registry.ollama import recipe as ollama

#: Answers as llama.cpp's server does: three tokens and the figures. It takes what it is told for granted.
RUNNER = """
import http.server, json, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        for word in ("a", "b", "c"):
            self.wfile.write(b"data: " + json.dumps({"content": word, "stop": False}).encode() + b"\\n\\n")
        timings = {"prompt_n": 2, "prompt_ms": 1.5, "predicted_n": 3, "predicted_ms": 6.0}
        end = {"content": "", "stop": True, "stop_type": "eos", "timings": timings}
        self.wfile.write(b"data: " + json.dumps(end).encode() + b"\\n\\n")
    def log_message(self, *args): pass

server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
print(json.dumps({"port": server.server_address[1], "vram": int(sys.argv[3])}), flush=True)
server.serve_forever()
"""

Start = Callable[..., str]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a server with environment variables, and returns its URL."""
    home = tmp_path / "opt"
    (home / "available").mkdir(parents=True)
    (home / "server.py").write_bytes((ollama.FOLDER / "server.py").read_bytes())
    (home / "runner.py").write_text(RUNNER)
    fixture.write_tiny(home / "available/tiny_latest.gguf")
    started: list[subprocess.Popen[bytes]] = []

    def begin(**environment: str) -> str:
        env = {**os.environ, "HOME": str(tmp_path), "OLLAMA_HOST": "127.0.0.1:0", **environment}
        log = tmp_path / f"log{len(started)}"
        with open(log, "wb") as sink:
            argv = [sys.executable, "-IS", str(home / "server.py"), "serve"]
            started.append(subprocess.Popen(argv, env=env, stderr=sink))
        deadline = time.monotonic() + 10
        while not (found := re.search(r"Listening on 127.0.0.1:(\d+)", log.read_text())):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)
        return f"http://127.0.0.1:{found[1]}"

    yield begin
    for process in started:
        process.terminate()
        process.wait()


@pytest.fixture
def url(start: Start) -> str:
    found = start()
    assert requests.post(f"{found}/api/pull", json={"model": "tiny", "stream": False}).json() == {"status": "success"}
    return found


def lines(answer: requests.Response) -> list[dict[str, Any]]:
    return [json.loads(line) for line in answer.iter_lines()]


def generate(url: str, **request: object) -> requests.Response:
    return requests.post(f"{url}/api/generate", json={"model": "tiny", "prompt": "x", "stream": False, **request})


def until_unloaded(url: str) -> None:
    deadline = time.monotonic() + 10
    while requests.get(f"{url}/api/ps").json()["models"]:
        assert time.monotonic() < deadline, "the model is still loaded"
        time.sleep(0.02)


def test_it_says_that_it_is_simulated(start: Start) -> None:
    url = start()
    answer = requests.get(f"{url}/api/version")
    assert answer.headers["Server"] == "ollama-stand-in (simulated)"
    assert answer.json() == {"version": "0.33.0+simulated"}
    assert "simulated" in requests.get(url).text


def test_new_server_has_no_models(start: Start) -> None:
    assert requests.get(f"{start()}/api/tags").json() == {"models": []}


def test_pull_tells_its_progress(start: Start) -> None:
    url = start()
    told = lines(requests.post(f"{url}/api/pull", json={"model": "tiny"}))
    assert [line["status"].split()[0] for line in told] == [
        "pulling", "pulling", "pulling", "verifying", "writing", "success",
    ]  # fmt: skip
    assert told[2]["completed"] == told[2]["total"] == told[1]["total"]
    (model,) = requests.get(f"{url}/api/tags").json()["models"]
    assert (model["name"], model["size"]) == ("tiny:latest", told[1]["total"])


def test_model_that_nobody_has_cannot_be_pulled(start: Start) -> None:
    url = start()
    told = lines(requests.post(f"{url}/api/pull", json={"model": "llama3"}))
    assert told == [{"status": "pulling manifest"}, {"error": "pull model manifest: file does not exist"}]
    answer = requests.post(f"{url}/api/pull", json={"model": "llama3", "stream": False})
    assert (answer.status_code, answer.json()) == (500, {"error": "pull model manifest: file does not exist"})


def test_generate_answers_with_durations_in_nanoseconds(url: str) -> None:
    answer = generate(url).json()
    assert (answer["response"], answer["done"], answer["done_reason"]) == ("abc", True, "stop")
    assert (answer["eval_count"], answer["eval_duration"]) == (3, 6_000_000)
    assert (answer["prompt_eval_count"], answer["prompt_eval_duration"]) == (2, 1_500_000)
    assert answer["total_duration"] >= answer["load_duration"] > 0


def test_stream_ends_with_the_figures(url: str) -> None:
    told = lines(generate(url, stream=True))
    assert [line["response"] for line in told] == ["a", "b", "c", ""]
    assert [line["done"] for line in told] == [False, False, False, True]
    assert told[-1]["eval_count"] == 3


def test_chat_answers_with_a_message(url: str) -> None:
    request = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": False}
    answer = requests.post(f"{url}/api/chat", json=request).json()
    assert answer["message"] == {"role": "assistant", "content": "abc"}


def test_without_a_card_the_model_runs_on_the_cpu(url: str) -> None:
    generate(url)
    (model,) = requests.get(f"{url}/api/ps").json()["models"]
    assert (model["name"], model["size_vram"], model["context_length"]) == ("tiny:latest", 0, 4096)
    assert model["size"] > 0


def test_context_length_comes_from_the_environment(start: Start) -> None:
    url = start(OLLAMA_CONTEXT_LENGTH="8192")
    requests.post(f"{url}/api/pull", json={"model": "tiny", "stream": False})
    generate(url)
    assert requests.get(f"{url}/api/ps").json()["models"][0]["context_length"] == 8192


def test_model_is_unloaded_when_its_time_is_over(url: str) -> None:
    assert generate(url, keep_alive="100ms").json()["response"] == "abc"
    until_unloaded(url)


def test_keep_alive_zero_unloads_after_the_answer(url: str) -> None:
    """Not under it: the answer must be whole."""
    assert generate(url, keep_alive=0).json()["response"] == "abc"
    until_unloaded(url)


def test_negative_keep_alive_is_for_ever(start: Start) -> None:
    url = start(OLLAMA_KEEP_ALIVE="-1")
    requests.post(f"{url}/api/pull", json={"model": "tiny", "stream": False})
    generate(url)
    assert requests.get(f"{url}/api/ps").json()["models"][0]["expires_at"] > "2100"


def test_empty_prompt_loads_and_unloads(url: str) -> None:
    assert generate(url, prompt="").json()["done_reason"] == "load"
    assert len(requests.get(f"{url}/api/ps").json()["models"]) == 1
    assert generate(url, prompt="", keep_alive=0).json()["done_reason"] == "unload"
    assert requests.get(f"{url}/api/ps").json() == {"models": []}


def test_unknown_model_is_not_found(url: str) -> None:
    answer = generate(url, model="llama3")
    assert (answer.status_code, answer.json()) == (404, {"error": "model 'llama3' not found"})


def test_bad_duration_is_refused(url: str) -> None:
    answer = generate(url, keep_alive="soon")
    assert (answer.status_code, answer.json()) == (400, {"error": 'time: invalid duration "soon"'})


def test_delete_removes_model_and_weights(url: str, tmp_path: Path) -> None:
    generate(url)
    assert requests.delete(f"{url}/api/delete", json={"model": "tiny"}).status_code == 200
    assert requests.get(f"{url}/api/tags").json() == requests.get(f"{url}/api/ps").json() == {"models": []}
    assert list((tmp_path / ".ollama/models/blobs").iterdir()) == []


def test_models_outlive_the_server(url: str, start: Start) -> None:
    (model,) = requests.get(f"{start()}/api/tags").json()["models"]
    assert model["name"] == "tiny:latest"


def test_command_line_speaks_with_the_server(url: str, tmp_path: Path) -> None:
    def ollama(*words: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-IS", str(tmp_path / "opt/server.py"), *words]
        env = {**os.environ, "OLLAMA_HOST": url}
        return subprocess.run(argv, env=env, capture_output=True, text=True, check=False)

    assert ollama("run", "tiny", "hello").stdout == "abc\n"
    assert "tiny:latest" in ollama("list").stdout
    assert "100% CPU" in ollama("ps").stdout
    refused = ollama("pull", "llama3")
    assert (refused.returncode, refused.stderr) == (1, "Error: pull model manifest: file does not exist\n")
    assert ollama("rm", "tiny").stdout == "deleted 'tiny'\n"

# SPDX-License-Identifier: MIT
"""Tier 1 for Ollama: before the stand-in server, and before one that answers as documented, or lies."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.rehearsal.ollama_server import servers
from verify.benchmarks import contract, host, ollamabench
from verify.benchmarks.ollamabench import GENERATION, LEAST, PROMPT
from verify.hosts import whole

Json = dict[str, Any]

#: A non-streaming answer of `/api/generate`, docs.ollama.com/api/usage.
DOCUMENTED: Json = {
    "model": "gemma3",
    "created_at": "2025-10-17T23:14:07.414671Z",
    "response": "Hello! How can I help you today?",
    "done": True,
    "done_reason": "stop",
    "total_duration": 174560334,
    "load_duration": 101397084,
    "prompt_eval_count": 11,
    "prompt_eval_duration": 13074791,
    "eval_count": 18,
    "eval_duration": 52479709,
}
#: `/api/ps` of one model, docs.ollama.com/api/ps.
LOADED: Json = {
    "name": "gemma3:latest",
    "model": "gemma3:latest",
    "size": 6591830464,
    "digest": "a2af6cc3eb7fa8be8504abaf9b04e88f17a119ec3f04a3addf55f92841195f5a",
    "details": {"parent_model": "", "format": "gguf", "family": "gemma3", "families": ["gemma3"]},
    "expires_at": "2025-10-17T16:47:07.93355-07:00",
    "size_vram": 5333539264,
    "context_length": 4096,
}
CARD = {"name": "NVIDIA RTX A4000", "pci_id": "10de:24b0", "uuid": "GPU-1"}
#: A runner that reads a byte and makes a token in some time each, keeps what two prompts have in common, and tells what
#: it took by its own clock.
RUNNER = """
import http.server, json, os, sys, time

last = b""

class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        global last
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["prompt"].encode()
        kept = min(len(os.path.commonprefix([last, prompt])), len(prompt) - 1)
        last = prompt
        self.send_response(200)
        self.end_headers()
        began = time.monotonic()
        time.sleep((len(prompt) - kept) * 1e-5)
        read = time.monotonic()
        for _ in range(body["n_predict"]):
            time.sleep(1e-5)
            self.wfile.write(b"data: " + json.dumps({"content": "x", "stop": False}).encode() + b"\\n\\n")
        end = time.monotonic()
        timings = {
            "cache_n": kept, "prompt_n": len(prompt) - kept, "prompt_ms": (read - began) * 1e3,
            "predicted_n": body["n_predict"], "predicted_ms": (end - read) * 1e3,
        }
        event = {"content": "", "stop": True, "stop_type": "limit", "timings": timings}
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\\n\\n")
    def log_message(self, *args): pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(json.dumps({"port": server.server_address[1], "vram": int(sys.argv[4])}), flush=True)
server.serve_forever()
"""


class Ollama:
    """Ollama as documented: a word is a token. `lie` changes an answer, `status` and `said` are an error's."""

    def __init__(self) -> None:
        self.asked: list[Json] = []
        self.models: list[Json] = []
        self.in_memory: Json = LOADED
        self.lie: Callable[[Json], Json] = lambda answer: answer
        self.error: tuple[int, str] | None = None
        self.takes_s = 0.002
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.tell({"version": "0.33.2"} if self.path == "/api/version" else {"models": server.models})

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.asked.append(request)
                if not request["prompt"]:
                    server.models = [] if request.get("keep_alive") == 0 else [server.in_memory]
                    self.tell({"model": request["model"], "response": "", "done": True, "done_reason": "load"})
                elif server.error is not None:
                    self.tell({"error": server.error[1]}, server.error[0])
                else:
                    self.tell(server.lie(server.answer(request)))

            def tell(self, value: Json, status: int = 200) -> None:
                body = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, request: Json) -> Json:
        began = time.monotonic_ns()
        time.sleep(self.takes_s)
        took = time.monotonic_ns() - began
        count = request["options"]["num_predict"]
        return DOCUMENTED | {
            "model": request["model"],
            "response": "Hello" * count,
            "done_reason": "length",
            "load_duration": 0,
            "prompt_eval_count": len(request["prompt"].split()) + 1,
            "prompt_eval_duration": took // 4,
            "eval_count": count,
            "eval_duration": took // 2,
        }

    def measured(self, **changed: Any) -> contract.Report:
        order = {"port": self.http.server_address[1], "model": "gemma3", "digest": None, "containers": ["ollama"]}
        found = ollamabench.measured({**order, "limit_s": 0.3, **changed})
        return contract.read(json.dumps(found))


@pytest.fixture
def ollama(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ollama]:
    monkeypatch.setattr(ollamabench, "others", lambda containers: [])
    card = {"device": "cuda", "card": CARD, "driver": "580.95", "processor": ""}
    cpu = {"device": "cpu", "card": None, "driver": None, "processor": "some CPU"}
    monkeypatch.setattr(ollamabench, "device", {"cuda": card, "cpu": cpu}.__getitem__)
    made = Ollama()
    yield made
    made.http.shutdown()
    made.http.server_close()


def test_stand_in_is_measured_by_its_own_clock_and_on_the_cpu(tmp_path: Path) -> None:
    with servers(tmp_path, RUNNER) as start:
        port = int(start().rpartition(":")[2])
        pull = ollamabench.Server(port).call("/api/pull", {"model": "tiny", "stream": False})
        order = {"port": port, "model": "tiny", "digest": None, "containers": [], "limit_s": 1}
        words = [sys.executable, "-I", "-c", whole(Path(ollamabench.__file__)), json.dumps(order)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
        after = ollamabench.Server(port).loaded("tiny")

    found = contract.read(done.stdout)
    assert pull == {"status": "success"}
    assert (found.verdict, found.reason, found.device) == ("measured", "", "cpu")
    assert found.software.endswith("+simulated") and any("stand-in" in note for note in found.notes)
    assert found.metrics.keys() == contract.TOOLS["ollama"].keys()
    for metric in found.metrics.values():
        # A byte is read, and a token made, in 10 microseconds at least.
        assert len(metric.samples) >= LEAST and metric.wrong == 0 and max(metric.samples) < 1e5
    assert "at most 128 tokens of prompt, 32 generated, context 4096" in found.setting
    assert after is None


def test_stand_in_tells_what_it_had_in_its_cache(tmp_path: Path) -> None:
    with servers(tmp_path, RUNNER) as start:
        server = ollamabench.Server(int(start().rpartition(":")[2]))
        server.call("/api/pull", {"model": "tiny", "stream": False})
        once, again = (server.generate("tiny", "the same words", 16, 10) for _ in range(2))

    assert (once.prompt, once.kept, once.generated) == (14, 0, 16)
    assert (again.prompt, again.kept, again.generated) == (14, 13, 16)
    assert list(ollamabench.mistakes(again, 3, "the same words", 16)) == [PROMPT]


def test_answer_of_the_documentation_is_read() -> None:
    answer = ollamabench.answer_of(DOCUMENTED, 0.2)

    assert (answer.prompt, answer.generated, answer.kept, answer.reason) == (11, 18, None, "stop")
    assert (answer.prompt_s, answer.generated_s) == (0.013074791, 0.052479709)
    assert ollamabench.mistakes(answer, 10, "a " * 10, 32) == {}


def test_model_on_the_card_is_measured_there_and_taken_out_again(ollama: Ollama) -> None:
    found = ollama.measured(digest=f"sha256:{LOADED['digest']}")

    assert (found.verdict, found.reason, found.device, found.card.name if found.card else "") == (
        "measured", "", "cuda", CARD["name"],
    )  # fmt: skip
    assert found.software == "ollama 0.33.2" and found.notes == []
    assert "gemma3 a2af6cc3eb7f, at most 512 tokens of prompt, 64 generated, context 4096" in found.setting
    assert all(len(metric.samples) >= LEAST for metric in found.metrics.values())
    assert ollama.models == [] and ollama.asked[-1]["keep_alive"] == 0


def test_prompts_begin_with_other_words_and_never_change_the_context(ollama: Ollama) -> None:
    ollama.measured()
    ollama.measured()

    texts = [each["prompt"] for each in ollama.asked if each["prompt"]]
    assert len({tuple(text.split()[:4]) for text in texts}) == len(texts) > 2 * LEAST
    assert {tuple(sorted(each.get("options") or {})) for each in ollama.asked} == {
        (),
        ("num_predict", "seed", "temperature"),
    }
    assert max(len(text.split()) for text in texts) <= 512


def test_model_that_somebody_had_loaded_stays(ollama: Ollama) -> None:
    ollama.models = [LOADED]

    assert ollama.measured().verdict == "measured"
    assert ollama.models == [LOADED]
    assert not [each for each in ollama.asked if "keep_alive" in each or not each["prompt"]]


@pytest.mark.parametrize(("context", "sizes"), [(4096, (512, 64)), (512, (320, 64)), (256, (144, 48)), (40, (16, 16))])
def test_prompt_and_answer_fit_into_the_context(context: int, sizes: tuple[int, int]) -> None:
    assert ollamabench.sizes("cuda", context) == sizes
    assert sum(sizes) <= context


LIES: dict[str, tuple[Json, str, str]] = {
    "fewer tokens than asked": (
        {"eval_count": 20},
        GENERATION,
        "eval_count 20 where num_predict is 64 (length reason)",
    ),
    "more tokens than asked": ({"eval_count": 65}, GENERATION, "eval_count 65 where num_predict is 64"),
    "no token": ({"eval_count": 0, "done_reason": "stop"}, GENERATION, "eval_count 0"),
    "generated in no time": ({"eval_duration": 0}, GENERATION, "eval_duration is not above 0"),
    "generated before it was asked": ({"eval_duration": -5}, GENERATION, "eval_duration is not above 0"),
    "longer than it took": ({"eval_duration": 10**12}, GENERATION, "1e+03 s of work in an answer that took"),
    "nothing said": ({"response": ""}, GENERATION, "an empty response of 64 tokens, as all are"),
    "read in no time": ({"prompt_eval_duration": 0}, PROMPT, "prompt_eval_duration is not above 0"),
    "read before, of an older Ollama": ({"prompt_eval_count": None}, PROMPT, "prompt_eval_count 0 for "),
    "read before": ({"prompt_eval_cached_count": 400}, PROMPT, "prompt_eval_cached_count 400 of "),
    "cut": ({"prompt_eval_count": 100}, PROMPT, "prompt_eval_count 100 for "),
    "more than there is": ({"prompt_eval_count": 10**6}, PROMPT, "prompt_eval_count 1000000 for "),
}


@pytest.mark.parametrize("lie", LIES)
def test_answer_that_cannot_be_right_is_wrong(ollama: Ollama, lie: str) -> None:
    changed, metric, words = LIES[lie]
    # The first two answers are the warm-up, of which nothing is taken.
    ollama.lie = lambda answer: answer | (changed if len(ollama.asked) > 3 else {})

    found = ollama.measured()

    assert found.verdict == "failed" and words in found.reason
    other = PROMPT if metric == GENERATION else GENERATION
    assert found.metrics[other].wrong == 0
    assert metric not in found.metrics or found.metrics[metric].wrong >= LEAST
    assert ollama.models == []


def test_template_that_ollama_kept_is_not_counted_as_read(ollama: Ollama) -> None:
    ollama.lie = lambda answer: answer | {"prompt_eval_cached_count": 10, "prompt_eval_duration": 10**6}

    found = ollama.measured()

    assert found.verdict == "measured"
    counts = {len(each["prompt"].split()) + 1 - 10 for each in ollama.asked if each["prompt"]}
    assert {round(sample / 1000) for sample in found.metrics[PROMPT].samples} <= counts


def test_answers_that_end_by_themselves_count_if_long_enough(ollama: Ollama) -> None:
    ollama.lie = lambda answer: answer | {"eval_count": 30, "done_reason": "stop"}
    assert ollama.measured().verdict == "measured"

    ollama.lie = lambda answer: answer | {"eval_count": 3, "done_reason": "stop"}
    found = ollama.measured()
    assert (found.verdict, set(found.metrics)) == ("inconclusive", {PROMPT})
    assert "answers ended before 16 tokens" in found.reason
    assert found.not_run == {GENERATION: found.reason}


@pytest.mark.parametrize(
    ("ended", "timed"),
    [
        ({"eval_count": 1, "response": "", "done_reason": "stop"}, False),
        ({"eval_count": 1, "response": "", "done_reason": "stop", "eval_duration": None}, False),
        ({"response": ""}, True),
    ],
    ids=["first token ends it", "in no time", "tokens that are no text"],
)
def test_answers_without_text_among_others_are_no_mistake(ollama: Ollama, ended: Json, timed: bool) -> None:
    ollama.lie = lambda answer: answer | (ended if len(ollama.asked) % 3 == 0 else {})

    found = ollama.measured()

    assert found.verdict == "measured", found.reason
    assert [found.metrics[name].wrong for name in (PROMPT, GENERATION)] == [0, 0]
    assert timed == (len(found.metrics[GENERATION].samples) == len(found.metrics[PROMPT].samples))


@pytest.mark.parametrize(
    ("error", "verdict", "words"),
    [
        ((500, "model runner has unexpectedly stopped"), "failed", "HTTP 500: model runner has unexpectedly stopped"),
        ((404, "model 'gemma3' not found"), "not run", "HTTP 404: model 'gemma3' not found"),
        ((503, "server busy, please try again"), "inconclusive", "others' requests fill Ollama's queue"),
    ],
)
def test_error_is_told_in_ollamas_words(ollama: Ollama, error: tuple[int, str], verdict: str, words: str) -> None:
    ollama.error = error

    found = ollama.measured()

    assert found.verdict == verdict and words in found.reason
    assert found.not_run.keys() == {PROMPT, GENERATION} and not found.metrics
    assert ollama.models == []


def test_error_in_the_middle_keeps_what_was_measured(ollama: Ollama) -> None:
    def breaks(answer: Json) -> Json:
        return {"error": "model runner has unexpectedly stopped"} if len(ollama.asked) > 8 else answer

    ollama.lie = breaks
    found = ollama.measured()

    assert (found.verdict, found.reason) == ("failed", "Ollama: model runner has unexpectedly stopped")
    assert {name: len(metric.samples) for name, metric in found.metrics.items()} == {PROMPT: 5, GENERATION: 5}


def test_nobody_answers() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        port = server.server_address[1]
    order = {"port": port, "model": "gemma3", "digest": None, "containers": [], "limit_s": 1}

    found = contract.read(json.dumps(ollamabench.measured(order)))

    assert (found.verdict, found.reason) == ("not run", "Ollama: [Errno 111] Connection refused")


def test_answer_that_does_not_come_ends_the_run(ollama: Ollama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ollamabench, "AROUND_S", 0.5)
    ollama.takes_s = 3.0

    found = ollama.measured()

    assert (found.verdict, found.reason) == ("inconclusive", "the time is up after 0 answers")
    assert ollama.models == []


def test_waiting_behind_others_is_seen(ollama: Ollama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ollamabench, "WAITED_S", 0.05)
    ollama.takes_s = 0.3

    found = ollama.measured()

    assert found.verdict == "inconclusive" and "answers stood behind others' requests" in found.reason


def test_card_in_use_by_others_is_left_to_them(ollama: Ollama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ollamabench, "others", lambda containers: ["PID 7 python"])

    found = ollama.measured()

    assert (found.verdict, found.reason) == ("inconclusive", "GPU in use by PID 7 python")
    assert ollama.asked == []


def test_others_who_come_meanwhile_are_seen(ollama: Ollama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ollamabench, "others", lambda containers: ["PID 7 python"] if ollama.asked else [])

    found = ollama.measured()

    assert (found.verdict, found.reason) == ("inconclusive", "GPU in use by PID 7 python")
    assert found.metrics.keys() == {PROMPT, GENERATION}


def test_model_that_fell_back_to_the_cpu_is_told_as_such(ollama: Ollama) -> None:
    ollama.in_memory = LOADED | {"size_vram": 0}

    found = ollama.measured()

    assert (found.verdict, found.device, found.processor) == ("measured", "cpu", "some CPU")
    assert "at most 128 tokens of prompt, 32 generated" in found.setting


def test_other_digest_and_untold_context_are_noted(ollama: Ollama) -> None:
    ollama.in_memory = {key: value for key, value in LOADED.items() if key != "context_length"}

    found = ollama.measured(digest="0" * 64)

    assert found.notes == [
        "Ollama does not tell the context; 2048 tokens are taken for it",
        f"the model's digest is {LOADED['digest'][:12]}, declared is 000000000000",
    ]


def test_parallel_is_what_the_process_was_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def inspected(command: list[str]) -> list[str]:
        if command[0] == "docker" or command[-1] != "ollama":
            raise OSError("none")
        return ["42"]

    monkeypatch.setattr(host, "output", inspected)
    (tmp_path / "proc/42").mkdir(parents=True)
    (tmp_path / "proc/42/environ").write_text("A=b\0OLLAMA_NUM_PARALLEL=3\0")

    assert ollamabench.parallel_of(["milvus", "ollama"], tmp_path) == "3"
    assert ollamabench.parallel_of(["milvus"], tmp_path) == ""


def test_no_two_prompts_begin_alike() -> None:
    """Ollama would not read what it has kept of the one before, and a model may have a token for each letter."""
    run = ollamabench.Run(ollamabench.Server(1), {"model": "tiny"}, {}, 0.0, random.Random(3))
    prompts = sorted(run.prompt(60) for _ in range(2000))

    # In order, those that begin alike stand side by side.
    assert all(one[:6] != other[:6] for one, other in itertools.pairwise(prompts))
    assert {len(prompt.split()) for prompt in prompts} == {60}

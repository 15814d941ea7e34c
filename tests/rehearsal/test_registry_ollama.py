# SPDX-License-Identifier: MIT
"""The Ollama stand-in's API, with a runner that needs no llama.cpp."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.rehearsal.ollama_server import Start, servers


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with servers(tmp_path) as begin:
        yield begin


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


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    """The file that `tiny` is made of, as a user's own."""
    return tmp_path / "opt/available/tiny_latest.gguf"


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def hand(url: str, content: bytes) -> str:
    digest = digest_of(content)
    assert requests.post(f"{url}/api/blobs/{digest}", data=content).status_code == 201
    return digest


def create(url: str, name: str, **request: object) -> requests.Response:
    return requests.post(f"{url}/api/create", json={"model": name, "stream": False, **request})


def test_the_digest_of_tiny_is_the_one_that_the_rehearsal_declares(url: str) -> None:
    (model,) = requests.get(f"{url}/api/tags").json()["models"]
    declared = (Path(__file__).parents[2] / "inventory/rehearsal.py").read_text()
    assert f'"digest": "{model["digest"]}"' in declared


def test_a_model_is_made_of_a_file_and_names_it(start: Start, gguf: Path) -> None:
    url, content = start(), gguf.read_bytes()
    blob = f"{url}/api/blobs/{digest_of(content)}"
    assert requests.head(blob).status_code == 404

    digest = hand(url, content)
    told = lines(requests.post(f"{url}/api/create", json={"model": "own:1", "files": {"own.gguf": digest}}))

    assert (requests.head(blob).status_code, requests.post(blob, data=content).status_code) == (200, 200)
    assert [line["status"].split()[0] for line in told] == ["parsing", "using", "writing", "success"]
    shown = requests.post(f"{url}/api/show", json={"model": "own:1"}).json()
    assert f"blobs/{digest.replace(':', '-')}\n" in shown["modelfile"]
    assert shown["details"]["parameter_size"] == "115K"
    assert shown["model_info"]["llama.block_count"] == 2
    assert generate(url, model="own:1").json()["response"] == "abc"


def test_a_blob_that_is_not_what_it_is_called_is_refused(start: Start) -> None:
    url, wanted = start(), digest_of(b"one")
    answer = requests.post(f"{url}/api/blobs/{wanted}", data=b"two")
    words = f'digest mismatch, expected "{wanted}", got "{digest_of(b"two")}"'
    assert (answer.status_code, answer.json()) == (400, {"error": words})
    assert requests.head(f"{url}/api/blobs/{wanted}").status_code == 404


def test_a_body_in_chunks_is_taken(start: Start, gguf: Path) -> None:
    url, content = start(), gguf.read_bytes()
    pieces = (content[at : at + 1000] for at in range(0, len(content), 1000))
    assert requests.post(f"{url}/api/blobs/{digest_of(content)}", data=pieces).status_code == 201


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda whole: b"NOPE" + whole[4:], "invalid file magic"),
        (lambda whole: whole[:4] + b"\x01" + whole[5:], "unsupported version 1"),
        (lambda whole: whole[:2001], "EOF"),
        (lambda whole: whole[:-1], 'tensor "blk.1.ffn_norm.weight" offset+size'),
    ],
)
def test_a_broken_file_is_refused_and_costs_nothing(url: str, gguf: Path, broken: Any, words: str) -> None:
    before = requests.get(f"{url}/api/tags").json()
    digest = hand(url, broken(gguf.read_bytes()))

    answer = create(url, "tiny", files={"own.gguf": digest})

    assert answer.status_code == 500
    assert words in answer.json()["error"]
    assert requests.get(f"{url}/api/tags").json() == before


def test_a_model_of_nothing_is_refused(start: Start) -> None:
    url, absent = start(), digest_of(b"absent")
    assert create(url, "own").json() == {"error": "neither 'from' or 'files' was specified"}
    refused = create(url, "own", files={"own.gguf": absent})
    assert refused.status_code == 400
    assert refused.json()["error"].startswith(f"blob not found for own.gguf (digest {absent})")
    assert create(url, "../own", files={"own.gguf": absent}).json() == {"error": "invalid model name"}


def test_a_model_of_another_keeps_its_weights_and_has_its_own_words(url: str) -> None:
    answer = create(url, "polite", **{"from": "tiny", "system": "echo system", "parameters": {"temperature": 0}})
    assert answer.json() == {"status": "success"}
    assert generate(url, model="polite", prompt="hello").json()["response"] == "echosystemhello"
    assert len(requests.get(f"{url}/api/tags").json()["models"]) == 2


def test_with_the_registry_away_nothing_is_pulled(start: Start) -> None:
    url = start(GPULAB_STAND_IN_MODELS="away")
    answer = requests.post(f"{url}/api/pull", json={"model": "tiny", "stream": False})
    assert answer.status_code == 500
    words = "dial tcp: lookup registry.ollama.ai: no such host"
    assert f'/v2/library/tiny/manifests/latest": {words}' in answer.json()["error"]


def loaded(url: str) -> list[str]:
    return [model["name"] for model in requests.get(f"{url}/api/ps").json()["models"]]


def with_two_models(url: str) -> str:
    assert requests.post(f"{url}/api/pull", json={"model": "tiny", "stream": False}).ok
    assert requests.post(f"{url}/api/copy", json={"source": "tiny", "destination": "other"}).ok
    return url


def test_as_many_models_are_loaded_as_may_be(start: Start) -> None:
    url = with_two_models(start(OLLAMA_MAX_LOADED_MODELS="1"))
    generate(url)
    generate(url, model="other")
    assert loaded(url) == ["other:latest"]

    url = with_two_models(start(OLLAMA_MAX_LOADED_MODELS="2"))
    generate(url)
    generate(url, model="other")
    assert sorted(loaded(url)) == ["other:latest", "tiny:latest"]


def test_a_model_in_work_is_waited_for(start: Start) -> None:
    url = with_two_models(start(OLLAMA_MAX_LOADED_MODELS="1"))
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(generate, url, prompt="slow")
        time.sleep(0.2)
        other = pool.submit(generate, url, model="other")
        assert slow.result().json()["response"] == other.result().json()["response"] == "abc"
    assert loaded(url) == ["other:latest"]


def test_requests_beyond_the_queue_are_refused(start: Start) -> None:
    """One works, one waits; the third is sent away."""
    url = with_two_models(start(OLLAMA_MAX_QUEUE="1"))
    generate(url)
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(generate, url, prompt="slow") for _ in range(3)]
        statuses = sorted(answer.result().status_code for answer in answers)
        words = [answer.result().json().get("error") for answer in answers]
    assert statuses == [200, 200, 503]
    assert "server busy, please try again.  maximum pending requests exceeded" in words


def test_parallel_requests_share_a_model(start: Start) -> None:
    url = with_two_models(start(OLLAMA_NUM_PARALLEL="3", OLLAMA_MAX_QUEUE="0"))
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(generate, url, prompt="slow") for _ in range(3)]
        assert {answer.result().status_code for answer in answers} == {200}


def test_a_cache_of_less_precision_takes_less_memory(start: Start) -> None:
    sizes = []
    for kind in ("f16", "q8_0", "q4_0"):
        url = with_two_models(start(OLLAMA_KV_CACHE_TYPE=kind, OLLAMA_CONTEXT_LENGTH="1000000"))
        generate(url)
        sizes.append(requests.get(f"{url}/api/ps").json()["models"][0]["size"])
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3


def test_embeddings_are_of_length_one(url: str) -> None:
    answer = requests.post(f"{url}/api/embed", json={"model": "tiny", "input": ["a", "bcd"]}).json()
    assert [round(sum(value * value for value in vector), 6) for vector in answer["embeddings"]] == [1, 1]
    assert answer["prompt_eval_count"] == 2
    short = requests.post(f"{url}/api/embed", json={"model": "tiny", "input": "a", "dimensions": 2}).json()
    assert len(short["embeddings"][0]) == 2


def test_openai_errors_have_openais_shape(url: str) -> None:
    request = {"model": "llama3", "messages": [{"role": "user", "content": "x"}]}
    answer = requests.post(f"{url}/v1/chat/completions", json=request)
    error = {"message": "model 'llama3' not found", "type": "not_found_error", "param": None, "code": None}
    assert (answer.status_code, answer.json()) == (404, {"error": error})
    empty = requests.post(f"{url}/v1/chat/completions", json={"model": "tiny", "messages": []})
    assert empty.json()["error"]["message"] == "[] is too short - 'messages'"


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

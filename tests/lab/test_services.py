# SPDX-License-Identifier: MIT
"""Ollama on a deployed guest, with real llama.cpp: models of files, models that nobody declares, answers."""

from __future__ import annotations

import json
from typing import Any

import pytest

import inventory
from tests.lab.commands import INVENTORY, Deployed

GUEST = "gpu01"
FILE = "/srv/data/own.gguf"
URL = "http://127.0.0.1:11434"


def services(**keys: object) -> tuple[str, ...]:
    """Words of a run in which Ollama is declared otherwise."""
    declared = inventory.load(INVENTORY).guests[GUEST].services.model_dump(exclude_unset=True)
    value = {**declared, "ollama": {**declared["ollama"], **keys}}
    return ("--limit", GUEST, "--data", f"services={json.dumps(value)}")


def ask(deployed: Deployed, path: str, body: dict[str, Any] | None = None) -> str:
    data = [] if body is None else ["--data", json.dumps(body)]
    return deployed.on(GUEST, "curl", "--silent", "--show-error", "--fail", f"{URL}{path}", *data)


def models(deployed: Deployed) -> set[str]:
    return {model["name"] for model in json.loads(ask(deployed, "/api/tags"))["models"]}


@pytest.fixture(scope="module")
def own(deployed: Deployed) -> dict[str, str]:
    """A file of a user's own on the data disk, and the model that is to be made of it."""
    deployed.on(GUEST, "docker", "cp", "ollama:/opt/ollama/available/tiny_latest.gguf", FILE)
    sha256 = deployed.on(GUEST, "sha256sum", FILE).split()[0]
    return {"name": "own", "gguf": FILE, "gguf_sha256": sha256}


def test_a_model_is_made_of_a_file_once(deployed: Deployed, own: dict[str, str]) -> None:
    (tiny,) = inventory.load(INVENTORY).guests[GUEST].services.model_dump()["ollama"]["models"]
    words = services(models=[tiny, own])

    plan = deployed.plan(*words)
    assert f"own: of {FILE}" in plan.output
    first = deployed.deploy(*words)
    assert first.status == 0, first.output[-3000:]
    assert f"made own of {FILE}" in first.output
    assert models(deployed) == {"tiny:latest", "own:latest"}

    again = deployed.deploy(*words)
    assert (again.status, deployed.changed()) == (0, []), again.output[-3000:]
    done, failed = deployed.verify(*words)
    assert (done.status, failed) == (0, set()), done.output[-3000:]


def test_a_file_of_another_sha256_is_made_a_model_again(deployed: Deployed, own: dict[str, str]) -> None:
    # One of the last tensor's numbers.
    script = f"f = open('{FILE}', 'r+b'); f.seek(-1, 2); f.write(b'\\0')"
    deployed.on(GUEST, "python3", "-c", script)
    sha256 = deployed.on(GUEST, "sha256sum", FILE).split()[0]

    stale = deployed.deploy(*services(models=[own]))
    assert stale.status == 0, "the declared file is what the model was made of"
    _, failed = deployed.verify(*services(models=[{**own, "gguf_sha256": sha256}]))
    assert f"containers.ollama.models[{GUEST}]" in failed
    done = deployed.deploy(*services(models=[{**own, "gguf_sha256": sha256}]))
    assert done.status == 0, done.output[-3000:]
    assert sha256 in json.loads(ask(deployed, "/api/show", {"model": "own"}))["modelfile"]


def test_the_model_answers_with_llama_cpp(deployed: Deployed) -> None:
    lines = ask(deployed, "/api/chat", {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]})
    parts = [json.loads(line) for line in lines.splitlines()]
    assert len(parts) > 2
    assert parts[-1]["eval_count"] > 0
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    assert json.loads(ask(deployed, "/v1/chat/completions", body))["usage"]["completion_tokens"] in range(1, 5)
    vectors = json.loads(ask(deployed, "/api/embed", {"model": "tiny", "input": ["a", "hello"]}))["embeddings"]
    assert [len(vector) for vector in vectors] == [64, 64]


def test_models_that_nobody_declares_are_told_and_go_only_when_asked_to(deployed: Deployed) -> None:
    plan = deployed.plan("--limit", GUEST)
    assert "note: models that nobody declares stay" in plan.output
    assert "own:latest" in plan.output
    assert deployed.deploy("--limit", GUEST).status == 0
    assert models(deployed) == {"tiny:latest", "own:latest"}

    done = deployed.deploy(*services(prune_models=True))
    assert (done.status, models(deployed)) == (0, {"tiny:latest"}), done.output[-3000:]
    assert "removed own:latest" in done.output


def test_a_model_that_nobody_has_fails_the_guest_and_leaves_the_container_alone(deployed: Deployed) -> None:
    started = deployed.on(GUEST, "docker", "inspect", "--format", "{{.State.StartedAt}}", "ollama")

    done = deployed.deploy(*services(models=["nosuch"]))

    assert done.status == 1
    assert f"{GUEST}: ollama: model nosuch: pull model manifest: file does not exist" in done.output
    assert f"{GUEST}: not every service is as declared" in done.output
    assert deployed.on(GUEST, "docker", "inspect", "--format", "{{.State.StartedAt}}", "ollama") == started
    assert models(deployed) == {"tiny:latest"}

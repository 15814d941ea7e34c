# SPDX-License-Identifier: MIT
"""Does Ollama answer, have its models, and compute on the GPU? What all services have in common: test_services.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from inventory import Guest
from inventory.services import Ollama
from verify.containers.running import running
from verify.observations import Observation
from verify.verdicts import not_run

pytestmark = pytest.mark.on("ollama")

DEPLOY = "pyinfra {lab} deploy.py --limit {host}"
RECREATE = "docker rm -f ollama on {host}; then " + DEPLOY


@pytest.fixture
def ollama(guest: Guest) -> Ollama:
    assert guest.services.ollama is not None
    return guest.services.ollama


@pytest.mark.critical
@pytest.mark.promise("containers.ollama.api", fix=DEPLOY)
def test_ollama_answers(guest: Guest, ollama: Ollama, containers: Observation, seen: Callable[[str], None]) -> None:
    answer = running(containers, "ollama")["version"]
    where = f"http://127.0.0.1:{ollama.port}/api/version"
    assert "version" in (answer.get("json") or {}), f"{guest.name}: {where}: {answer.get('error') or answer['json']}"
    seen(f"version {answer['json']['version']}")


@pytest.mark.major
@pytest.mark.promise("containers.ollama.models", fix=DEPLOY)
def test_declared_models_are_there(guest: Guest, ollama: Ollama, containers: Observation) -> None:
    answer = running(containers, "ollama")["tags"]
    if "json" not in answer:
        not_run("Ollama does not answer")
    there = {model["name"] for model in answer["json"].get("models") or []}
    missing = [model.name for model in ollama.models if model.full_name not in there]
    assert not missing, f"{guest.name}: Ollama lacks {', '.join(missing)}; it has {', '.join(sorted(there)) or 'none'}"


@pytest.mark.critical
@pytest.mark.usefixtures("guest_sees_gpu")
@pytest.mark.promise("containers.ollama.gpu", fix=RECREATE)
def test_ollama_computes_on_the_gpu(
    guest: Guest, ollama: Ollama, containers: Observation, ollama_load: Observation, seen: Callable[[str], None]
) -> None:
    if not ollama.models:
        not_run("no model declared")
    running(containers, "ollama")
    model, loaded, ps = ollama.models[0].name, ollama_load["load"], ollama_load["ps"]
    if "json" not in (running(containers, "ollama")["version"]):
        not_run("Ollama does not answer")
    assert "json" in loaded, f"{guest.name}: loading {model}: {loaded['error']}"
    assert "json" in ps, f"{guest.name}: /api/ps after loading {model}: {ps['error']}"
    names = (full_name(model), model)
    sizes = [int(item.get("size_vram", 0)) for item in ps["json"].get("models") or [] if item.get("name") in names]
    assert sizes, f"{guest.name}: {model} is not in memory after it was loaded"
    assert max(sizes) > 0, (
        f"{guest.name}: {model} is loaded with 0 bytes in the GPU's memory, expected more: "
        "Ollama has fallen back to the CPU, as it does without a word when its container loses the GPU"
    )
    seen(f"{model}: {max(sizes) / 2**20:.0f} MiB of the GPU's memory")


def full_name(model: str) -> str:
    """The name with its tag, as Ollama lists it."""
    return model if ":" in model.rpartition("/")[2] else f"{model}:latest"

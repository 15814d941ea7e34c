# SPDX-License-Identifier: MIT
"""Does Ollama run as declared, on the GPU, for the guest alone?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from inventory import Guest
from inventory.services import Ollama
from verify.observations import Observation
from verify.verdicts import not_run

pytestmark = pytest.mark.on("ollama")

DEPLOY = "pyinfra {lab} deploy.py --limit {host}"
RECREATE = "docker rm -f ollama on {host}; then " + DEPLOY
LOOPBACK = ("127.", "0000:0000:0000:0000:0000:0000:0000:0001", "0000:0000:0000:0000:0000:ffff:7f")


@pytest.fixture
def ollama(guest: Guest) -> Ollama:
    assert guest.services.ollama is not None
    return guest.services.ollama


@pytest.mark.critical
@pytest.mark.usefixtures("guest_sees_gpu")
@pytest.mark.promise("containers.ollama.running", fix=DEPLOY)
def test_ollama_runs(guest: Guest, containers: Observation) -> None:
    service = existing(containers)
    assert service["exists"], f"{guest.name}: there is no container ollama"
    assert service["running"], f"{guest.name}: container ollama is {service['status']}, expected running"
    assert service["health"] != "unhealthy", f"{guest.name}: container ollama runs and calls itself unhealthy"


@pytest.mark.critical
@pytest.mark.promise("containers.ollama.image", fix=DEPLOY)
def test_ollama_is_of_the_declared_image(
    guest: Guest, ollama: Ollama, containers: Observation, seen: Callable[[str], None]
) -> None:
    service = existing(containers)
    if not service["exists"]:
        not_run("there is no container ollama")
    digest = ollama.image.partition("@")[2]
    found = [item.partition("@")[2] for item in service["digests"]]
    assert digest in found, f"{guest.name}: container ollama is of {', '.join(found) or 'no digest'}, expected {digest}"
    seen(digest)


@pytest.mark.critical
@pytest.mark.usefixtures("guest_sees_gpu")
@pytest.mark.promise("containers.gpu.visible", fix=RECREATE)
def test_gpu_is_visible_in_the_container(guest: Guest, containers: Observation, seen: Callable[[str], None]) -> None:
    service = running(containers)
    said = " ".join(service["nvidia_smi"].split())[:200] or "nothing"
    assert service["gpus"], f"{guest.name}: nvidia-smi in container ollama says: {said}; expected a GPU"
    seen(said)


@pytest.mark.critical
@pytest.mark.promise("containers.ollama.api", fix=DEPLOY)
def test_ollama_answers(guest: Guest, ollama: Ollama, containers: Observation, seen: Callable[[str], None]) -> None:
    answer = running(containers)["version"]
    where = f"http://127.0.0.1:{ollama.port}/api/version"
    assert "version" in (answer.get("json") or {}), f"{guest.name}: {where}: {answer.get('error') or answer['json']}"
    seen(f"version {answer['json']['version']}")


@pytest.mark.major
@pytest.mark.promise("containers.ollama.loopback", fix=DEPLOY)
def test_ollama_is_not_open_to_the_network(
    guest: Guest, ollama: Ollama, reach: Observation, containers: Observation, ollama_port: Observation
) -> None:
    service = running(containers)
    assert not ollama_port["open"], (
        f"{guest.name}: {guest.ssh_hostname}:{ollama.port} answers from here, expected a closed port: "
        "Ollama asks nobody for a password"
    )
    wide = [address for address in service["listens"] if not address.startswith(LOOPBACK)]
    assert not wide, f"{guest.name}: port {ollama.port} listens on {', '.join(wide)}, expected 127.0.0.1 only"
    assert service["listens"], f"{guest.name}: nothing listens on 127.0.0.1:{ollama.port}"


@pytest.mark.major
@pytest.mark.promise("containers.ollama.models", fix=DEPLOY)
def test_declared_models_are_there(guest: Guest, ollama: Ollama, containers: Observation) -> None:
    answer = running(containers)["tags"]
    if "json" not in answer:
        not_run("Ollama does not answer")
    there = {model["name"] for model in answer["json"].get("models") or []}
    missing = [model.name for model in ollama.models if model.full_name not in there]
    assert not missing, f"{guest.name}: Ollama lacks {', '.join(missing)}; it has {', '.join(sorted(there)) or 'none'}"


@pytest.mark.major
@pytest.mark.promise("containers.ollama.storage", fix=RECREATE)
def test_models_lie_on_the_data_disk(guest: Guest, containers: Observation, seen: Callable[[str], None]) -> None:
    service = existing(containers)
    if not service["exists"]:
        not_run("there is no container ollama")
    folder = service["models_folder"]
    assert folder["on_data_disk"], (
        f"{guest.name}: Ollama's models in {folder['inside']} lie "
        f"{'in ' + folder['outside'] if folder['outside'] else 'inside the container'}, "
        f"expected on the disk at {guest.data_disk.mount}: a rebuild would lose them"
    )
    seen(folder["outside"])


@pytest.mark.critical
@pytest.mark.usefixtures("guest_sees_gpu")
@pytest.mark.promise("containers.ollama.gpu", fix=RECREATE)
def test_ollama_computes_on_the_gpu(
    guest: Guest, ollama: Ollama, containers: Observation, ollama_load: Observation, seen: Callable[[str], None]
) -> None:
    if not ollama.models:
        not_run("no model declared")
    running(containers)
    model, loaded, ps = ollama.models[0].name, ollama_load["load"], ollama_load["ps"]
    if "json" not in (running(containers)["version"]):
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


def existing(containers: Observation) -> dict[str, Any]:
    """The container's state; the check is not run when the engine does not answer."""
    if not containers["engine"]["version"]:
        not_run("the container engine does not answer")
    service: dict[str, Any] = containers["service"]
    return service


def running(containers: Observation) -> dict[str, Any]:
    """The state of a container that runs; else the check is not run."""
    service = existing(containers)
    if not service["running"]:
        not_run("container ollama does not run")
    return service

# SPDX-License-Identifier: MIT
"""Does Ollama answer, have its models, and compute on the GPU? What all services have in common: test_services.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from inventory import Guest, sharing
from inventory.services import Ollama
from verify.containers.running import running
from verify.observations import Observation
from verify.verdicts import not_run

pytestmark = pytest.mark.on("ollama")

DEPLOY = "pyinfra {lab} deploy.py --limit {host}"
RECREATE = "docker rm -f ollama on {host}; then " + DEPLOY


MIB = 2**20


@pytest.fixture
def ollama(guest: Guest) -> Ollama:
    assert guest.services.ollama is not None
    return guest.services.ollama


@pytest.mark.critical
@pytest.mark.promise("containers.ollama.api", "services.ollama.port", fix=DEPLOY)
def test_ollama_answers(guest: Guest, ollama: Ollama, containers: Observation, seen: Callable[[str], None]) -> None:
    answer = running(containers, "ollama")["version"]
    where = f"http://127.0.0.1:{ollama.port}/api/version"
    assert "version" in (answer.get("json") or {}), f"{guest.name}: {where}: {answer.get('error') or answer['json']}"
    seen(f"version {answer['json']['version']}")


@pytest.mark.major
@pytest.mark.promise("containers.ollama.models", "services.ollama.models", fix=DEPLOY)
def test_declared_models_are_there(
    guest: Guest, ollama: Ollama, containers: Observation, seen: Callable[[str], None]
) -> None:
    service = running(containers, "ollama")
    if "json" not in service["tags"]:
        not_run("Ollama does not answer")
    found = there(service)
    missing = [model.name for model in ollama.models if model.full_name not in found]
    assert not missing, f"{guest.name}: Ollama lacks {', '.join(missing)}; it has {', '.join(sorted(found)) or 'none'}"
    for model in ollama.models:
        if model.digest is not None:
            digest = found[model.full_name]
            assert digest == model.digest, f"{guest.name}: {model.name} is {digest}, expected {model.digest}"
        if model.gguf is not None:
            weights = made_of(service[f"show {model.name}"])
            assert weights == model.gguf_sha256, (
                f"{guest.name}: {model.name} is made of {weights or 'what Ollama does not say'}, "
                f"expected {model.gguf_sha256}, the file {model.gguf}"
            )
    others = sorted(found.keys() - {model.full_name for model in ollama.models})
    seen(f"{len(ollama.models)} models{'; nobody declares ' + ', '.join(others) if others else ''}")


@pytest.mark.major
@pytest.mark.promise(
    "containers.ollama.settings",
    "services.ollama.context_length",
    "services.ollama.parallel",
    "services.ollama.max_loaded_models",
    "services.ollama.max_queue",
    "services.ollama.keep_alive",
    "services.ollama.load_timeout",
    "services.ollama.flash_attention",
    "services.ollama.kv_cache_type",
    fix=RECREATE,
)
def test_settings_are_in_effect(
    guest: Guest, ollama: Ollama, containers: Observation, seen: Callable[[str], None]
) -> None:
    """As the kernel has them of the running server."""
    found = running(containers, "ollama")["environment"]
    expected = {**of_the_card(guest, ollama), **settings(ollama)}
    wrong = [
        f"{name} is {found.get(name, 'not set')}, expected {value}"
        for name, value in expected.items()
        if found.get(name) != value
    ]
    assert not wrong, f"{guest.name}: Ollama runs with other settings: {'; '.join(wrong)}"
    seen(", ".join(f"{name} {value}" for name, value in settings(ollama).items()))


@pytest.mark.major
@pytest.mark.promise("containers.ollama.context", "services.ollama.context_length", fix=RECREATE)
def test_context_is_not_longer_than_declared(
    guest: Guest, ollama: Ollama, containers: Observation, ollama_load: Observation, seen: Callable[[str], None]
) -> None:
    """A longer one takes memory that nobody reckoned with. A model may know less."""
    loaded = in_memory(ollama, containers, ollama_load)
    name = ollama.models[0].full_name
    lengths = [int(each.get("context_length", 0)) for each in loaded if each["name"] == name]
    if not lengths:
        not_run(f"{name} is not in memory after it was loaded")
    length = lengths[0]
    assert 0 < length <= ollama.context_length, (
        f"{guest.name}: {name} is loaded with {length} tokens of context, expected {ollama.context_length}"
    )
    seen(f"{name}: {length} tokens")


@pytest.mark.major
@pytest.mark.promise(
    "containers.ollama.memory", "services.ollama.memory_budget_mib", "services.ollama.max_loaded_models", fix=RECREATE
)
def test_models_stay_within_the_budget(
    guest: Guest, ollama: Ollama, containers: Observation, ollama_load: Observation, seen: Callable[[str], None]
) -> None:
    """As Ollama itself counts; what the card counts is containers.ollama.budget."""
    loaded = in_memory(ollama, containers, ollama_load)
    total = sum(int(each.get("size_vram", 0)) for each in loaded) / MIB
    names = ", ".join(each["name"] for each in loaded) or "no model"
    assert total <= ollama.memory_budget_mib, (
        f"{guest.name}: {names} take {total:.0f} MiB of the GPU's memory, expected at most {ollama.memory_budget_mib}"
    )
    assert len(loaded) <= ollama.max_loaded_models, (
        f"{guest.name}: {len(loaded)} models are loaded ({names}), expected at most {ollama.max_loaded_models}"
    )
    seen(f"{names}: {total:.0f} MiB of {ollama.memory_budget_mib} MiB")


@pytest.mark.critical
@pytest.mark.usefixtures("guest_sees_gpu")
@pytest.mark.promise("containers.ollama.gpu", "gpu", fix=RECREATE)
def test_ollama_computes_on_the_gpu(
    guest: Guest, ollama: Ollama, containers: Observation, ollama_load: Observation, seen: Callable[[str], None]
) -> None:
    if not ollama.models:
        not_run("no model declared")
    running(containers, "ollama")
    model, loaded, ps = ollama.models[0].name, ollama_load["load"], ollama_load["ps"]
    if "json" not in (running(containers, "ollama")["version"]):
        not_run("Ollama does not answer")
    if full_name(model) not in there(running(containers, "ollama")):
        not_run(f"there is no {model}: see containers.ollama.models")
    assert "json" in loaded, f"{guest.name}: loading {model}: {loaded['error']}"
    assert "json" in ps, f"{guest.name}: /api/ps after loading {model}: {ps['error']}"
    names = (full_name(model), model)
    sizes = [int(item.get("size_vram", 0)) for item in ps["json"].get("models") or [] if item.get("name") in names]
    assert sizes, f"{guest.name}: {model} is not in memory after it was loaded"
    assert max(sizes) > 0, (
        f"{guest.name}: {model} is loaded with 0 bytes in the GPU's memory, expected more: "
        "Ollama has fallen back to the CPU, as it does without a word when its container loses the GPU"
    )
    seen(f"{model}: {max(sizes) / MIB:.0f} MiB of the GPU's memory")


def there(service: dict[str, Any]) -> dict[str, str]:
    """The digest of each model that Ollama lists."""
    listed = (service["tags"].get("json") or {}).get("models") or []
    return {model["name"]: model.get("digest", "") for model in listed}


def settings(ollama: Ollama) -> dict[str, str]:
    """Ollama's own variables (its FAQ and envconfig/config.go)."""
    return {
        "OLLAMA_CONTEXT_LENGTH": str(ollama.context_length),
        "OLLAMA_NUM_PARALLEL": str(ollama.parallel),
        "OLLAMA_MAX_LOADED_MODELS": str(ollama.max_loaded_models),
        "OLLAMA_MAX_QUEUE": str(ollama.max_queue),
        "OLLAMA_KEEP_ALIVE": ollama.keep_alive,
        "OLLAMA_LOAD_TIMEOUT": ollama.load_timeout,
        "OLLAMA_FLASH_ATTENTION": str(int(ollama.flash_attention)),
        "OLLAMA_KV_CACHE_TYPE": ollama.kv_cache_type,
        "OLLAMA_NO_CLOUD": "1",
    }


def of_the_card(guest: Guest, ollama: Ollama) -> dict[str, str]:
    """What makes it a client of MPS with its budget as the limit; nothing where the card is shared otherwise."""
    client = sharing.client(guest, budget_mib=ollama.memory_budget_mib, processes=ollama.max_loaded_models)
    return dict(client.environment)


def in_memory(ollama: Ollama, containers: Observation, ollama_load: Observation) -> list[dict[str, Any]]:
    """The models that are loaded after the first of the declared ones was asked for."""
    if not ollama.models:
        not_run("no model declared")
    if "json" not in running(containers, "ollama")["version"]:
        not_run("Ollama does not answer")
    if "json" not in ollama_load["load"] or "json" not in ollama_load["ps"]:
        not_run(f"{ollama.models[0].name} could not be loaded")
    models: list[dict[str, Any]] = ollama_load["ps"]["json"].get("models") or []
    return models


def made_of(shown: dict[str, Any]) -> str | None:
    """SHA-256 of the weights that a model's file (`/api/show`) names; None: it does not say."""
    lines = str((shown.get("json") or {}).get("modelfile", "")).splitlines()
    sources = [
        line.rpartition("sha256-")[2].strip() for line in lines if line.startswith("FROM ") and "sha256-" in line
    ]
    return sources[0] if sources else None


def full_name(model: str) -> str:
    """The name with its tag, as Ollama lists it."""
    return model if ":" in model.rpartition("/")[2] else f"{model}:latest"

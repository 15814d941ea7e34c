# SPDX-License-Identifier: MIT
"""Which hosts a run is about, and which of them a check is for."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase

from inventory import Guest, Lab
from inventory.access import BY_TOKEN
from inventory.budgets import budgets
from verify.benchmarks.contract import TOOLS, Tool


def limited(lab: Lab, limits: Collection[str]) -> list[str]:
    """Names of the hosts that `--limit` words choose (names, groups, patterns as pyinfra takes them); all without.

    Raises:
        ValueError: a word matches no host.
    """
    groups = {"nodes": list(lab.nodes), "guests": list(lab.guests), "all": [*lab.nodes, *lab.guests]}
    if not limits:
        return groups["all"]
    chosen: set[str] = set()
    for word in (word for words in limits for word in words.split(",")):
        found = groups.get(word) or [name for name in groups["all"] if fnmatchcase(name, word)]
        if not found:
            raise ValueError(f"--limit {word} matches no host; the inventory has {', '.join(groups['all'])}")
        chosen.update(found)
    return [name for name in groups["all"] if name in chosen]


def hosts_for(lab: Lab, kind: str, chosen: Collection[str]) -> list[str]:
    """The hosts among `chosen` that checks of a kind are for.

    `apis` are the nodes whose API answers for a chosen host, `pinned` the guests that declare CPUs of the node, `huge`
    those that declare huge pages, `gpus` the guests with a GPU, `mps` those of them that
    share it with MPS and `no_mps` the others, `ollama`, `milvus` and `pytorch` those that run it, `backups` those with
    declared backups, `services` those that serve any, `access` those whose proxy lets tenants in to one, `healing`
    those of them that look after them, `docker` those with a GPU and Docker, `gpu_containers` those on which verify
    can start a container with the GPU: with Ollama's image, or with Podman, which needs none.
    """
    guests = [guest for guest in lab.guests.values() if guest.name in chosen]
    match kind:
        case "nodes":
            return [name for name in lab.nodes if name in chosen]
        case "apis":
            return [name for name in lab.nodes if name in chosen or any(guest.node == name for guest in guests)]
        case "guests":
            return [guest.name for guest in guests]
        case "pinned":
            return [guest.name for guest in guests if guest.affinity is not None]
        case "huge":
            return [guest.name for guest in guests if guest.hugepages is not None]
        case "gpus":
            return [guest.name for guest in guests if guest.gpu is not None]
        case "mps" | "no_mps":
            with_mps = kind == "mps"
            return [each.name for each in guests if each.gpu and (each.nvidia.sharing == "mps") == with_mps]
        case "backups":
            return [guest.name for guest in guests if guest.backup is not None]
        case "ollama":
            return [guest.name for guest in guests if guest.services.ollama is not None]
        case "milvus":
            return [guest.name for guest in guests if guest.services.milvus is not None]
        case "pytorch":
            return [guest.name for guest in guests if guest.services.pytorch is not None]
        case "services":
            return [guest.name for guest in guests if guest.services.served()]
        case "access":
            return [guest.name for guest in guests if guest.access is not None and guest.services.served()]
        case "healing":
            return [guest.name for guest in guests if guest.services.served() and guest.healing is not None]
        case "docker":
            return [guest.name for guest in guests if guest.gpu is not None and guest.engine.kind == "docker"]
        case "gpu_containers":
            fit = [guest for guest in guests if guest.services.ollama is not None or guest.engine.kind == "podman"]
            return [guest.name for guest in fit if guest.gpu is not None]
    raise ValueError(f"no kind of host is called {kind!r}")


def parts_of(lab: Lab, host: str, part: str) -> list[str]:
    """What a check that is made once for each part of a guest is about: its served services (`service`), those of them
    that ask for a token (`by_token`), everyone who has a share of its card (`share`), as a check's id names it, or the
    figures of a benchmark: gpubench's (`figure`) and those of tier 1 (`mps_figure`, `pytorch_figure` ...); a service
    with nothing to measure has none.
    """
    if part == "figure":
        return figures_of("gpubench")
    if part == "mps_figure":
        return figures_of("mps")
    guest, services = lab.guests[host], lab.guests[host].services
    if part == "pytorch_figure":
        # TF32 is of the tensor cores.
        names = [name for name in figures_of("pytorch") if guest.gpu is not None or not name.endswith("tf32")]
        return names if worker(guest) is not None else []
    if part == "ollama_figure":
        return figures_of("ollama") if services.ollama is not None and services.ollama.models else []
    if part == "milvus_figure":
        return figures_of("milvus") if services.milvus is not None and services.milvus.indexes else []
    if part == "service":
        return list(guest.services.served())
    if part == "by_token":
        return [name for name in guest.services.served() if name in BY_TOKEN]
    return [budget.key.removeprefix("services.") for budget in budgets(guest)]


def worker(guest: Guest) -> str | None:
    """The tenant in whose name verify starts a job of PyTorch; None: nobody can start one."""
    able = [each.name for each in guest.tenants if each.memory_limit_mib and each.may_use("pytorch")]
    return able[0] if able else None


def figures_of(tool: Tool) -> list[str]:
    """The metrics that are measured, not counted as errors."""
    return [name for name, (unit, _) in TOOLS[tool].items() if unit != "errors"]

# SPDX-License-Identifier: MIT
"""What a host is and runs, out of what the checks read of it anyway: for the report, and to see what changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from verify.observations import Observation

#: Name of a fact, the subject that knows it, and how it is told. None or an empty text: not known.
FACTS: list[tuple[str, str, Callable[[Mapping[str, Any]], Any]]] = [
    ("Proxmox VE", "hypervisor", lambda seen: seen["pve_version"].split("/")[1] if "/" in seen["pve_version"] else ""),
    ("kernel", "hypervisor", lambda seen: seen["kernel"]),
    ("next kernel", "hypervisor", lambda seen: seen["next_boot"]["kernel"]),
    ("CPU vendor", "hypervisor", lambda seen: seen["cpu"]),
    ("kernel", "nvidia", lambda seen: seen["next_kernel"]["running"]),
    ("next kernel", "nvidia", lambda seen: seen["next_kernel"]["kernel"]),
    ("GPU", "nvidia", lambda seen: ", ".join(f"{gpu['name']} ({gpu['memory_mib']} MiB)" for gpu in gpus(seen))),
    ("NVIDIA driver", "nvidia", lambda seen: seen["loaded"]),
    ("power limit", "nvidia", lambda seen: ", ".join(f"{gpu['power_limit_w']:g} W" for gpu in gpus(seen))),
    ("ECC", "nvidia", lambda seen: ", ".join("on" if gpu["ecc"] else "off" for gpu in gpus(seen))),
    ("CUDA toolkits", "nvidia", lambda seen: ", ".join(filter(None, seen["cuda"].values()))),
    ("container toolkit", "nvidia", lambda seen: seen["policy"]["nvidia-container-toolkit"]["installed"]),
    ("container engine", "containers", lambda seen: seen["engine"]["version"]),
    ("Ollama", "containers", lambda seen: seen["services"]["ollama"]["version"]["json"]["version"]),
    ("image of Ollama", "containers", lambda seen: ", ".join(seen["services"]["ollama"]["digests"])),
    ("image of Milvus", "containers", lambda seen: ", ".join(seen["services"]["milvus"]["digests"])),
    ("image of PyTorch", "pytorch", lambda seen: ", ".join(seen["digests"])),
    ("PyTorch", "pytorch", lambda seen: seen["job"]["saw"]["torch"]),
    ("data disk", "system", lambda seen: f"{seen['data']['size_bytes'] / 2**30:.0f} GiB, {seen['data']['filesystem']}"),
]


def gpus(nvidia: Mapping[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = nvidia["nvml"]["gpus"]
    return found


def facts(seen: Mapping[tuple[str, str], Observation]) -> dict[str, dict[str, str]]:
    """Facts by host, of what was read by (host, subject). What a host does not have or did not say is left out."""
    found: dict[str, dict[str, str]] = {}
    for host in dict.fromkeys(host for host, _ in seen):
        for name, subject, tell in FACTS:
            try:
                told = tell(seen[host, subject])
            except (KeyError, TypeError, IndexError, ValueError, AttributeError):
                # That something is missing or strange is what the checks are for.
                continue
            if told:
                found.setdefault(host, {})[name] = str(told)
    return found

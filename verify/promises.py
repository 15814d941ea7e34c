# SPDX-License-Identifier: MIT
"""A check in words: its title, and the values of the inventory that it is about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel

from inventory import Guest, Lab, Node
from inventory.budgets import budgets

#: Names that are spelled otherwise than as a word of a function's name.
SPELLED = {word: word.upper() for word in ("api", "cdi", "cpu", "cuda", "ecc", "gpu", "iommu", "mps", "numa")}
SPELLED |= {word: word.upper() for word in ("ssh", "tls", "ve", "vm")}
SPELLED |= {word: word.capitalize() for word in ("docker", "milvus", "ollama", "proxmox")}
SPELLED |= {"cpus": "CPUs", "gpus": "GPUs", "pytorch": "PyTorch"}
#: Spelled with a hyphen.
HYPHENED = {"vfio_pci": "vfio-pci", "cloud_init": "cloud-init"}
#: Small even where a sentence begins with them.
SMALL = {"apt", "nginx", "nouveau", "vfio", "vfio-pci", "cloud-init"}


def title_of(function: str, parts: Mapping[str, str]) -> str:
    """The sentence that a check's function is named with; of one that is made for each part also which part it is.

    >>> title_of("test_gpu_is_visible_in_the_container", {"service": "ollama"})
    'GPU is visible in the container (ollama)'
    """
    name = function.removeprefix("test_")
    for pair, word in HYPHENED.items():
        name = name.replace(pair, word)
    words = [SPELLED.get(word, word) for word in name.split("_")]
    first = words[0] if words[0] in SMALL or words[0] != name.split("_")[0] else words[0][0].upper() + words[0][1:]
    about = f" ({', '.join(parts.values())})" if parts else ""
    return " ".join([first, *words[1:]]) + about


def promised(lab: Lab, host: Node | Guest, keys: Iterable[str], parts: Mapping[str, str]) -> str:
    """The inventory's values at `keys`, as `cores = 8; affinity = 0-7`.

    A key is a dotted path below the host; below a list of named things it is that of each of them. Two more roots:
    `card` is the card table's entry of the guest's GPU, `budgets.NAME` the memory of that share of the card.

    Raises:
        AttributeError: a key names nothing.
    """
    told = []
    for key in (key.format(**parts) for key in keys):
        root, _, rest = key.partition(".")
        if root == "budgets" and isinstance(host, Guest):
            share = next(each for each in budgets(host) if each.key.removeprefix("services.") == rest)
            told.append(f"{share.key} = {share.memory_mib} MiB")
        elif root == "card" and isinstance(host, Guest):
            told.append(f"{key} = {shown(at(lab.card_of(host), rest))}")
        else:
            told.append(f"{key} = {shown(at(host, key))}")
    return "; ".join(told)


def at(thing: Any, path: str) -> Any:
    """What stands at a dotted path; None where something on the way is not declared."""
    if not path or thing is None:
        return thing
    if isinstance(thing, list):
        return {getattr(each, "name", str(number)): at(each, path) for number, each in enumerate(thing)}
    first, _, rest = path.partition(".")
    return at(getattr(thing, first), rest)


def shown(value: Any) -> str:
    """A value of the inventory in one line; of a model what its user has set."""
    match value:
        case None:
            return "not declared"
        case bool():
            return "yes" if value else "no"
        case BaseModel():
            return shown(value.model_dump(mode="json", exclude_unset=True)) if value.model_fields_set else "defaults"
        case dict():
            return ", ".join(f"{key}: {shown(each)}" for key, each in value.items()) or "none"
        case list() | tuple():
            names = [shown(getattr(each, "name", each)) for each in value]
            return ", ".join(f"({name})" if ": " in name else name for name in names) or "none"
    return str(value)

# SPDX-License-Identifier: MIT
"""The only truth about a lab: `load()` resolves an inventory as pyinfra does and returns validated models.

deploy, rebuild, verify and the tests all come in through `load()` or, inside a pyinfra run, `of_run()`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import click
from pydantic import ValidationError
from pyinfra.api.exceptions import PyinfraError

from inventory import access, budgets, services
from inventory.errors import GpulabError, InventoryError
from inventory.gpu import tenant_problems
from inventory.resolve import CliError, UnexpectedExternalError, parse_cli_arg, resolve
from inventory.schema import PYINFRA_KEY, Guest, Lab, Node

if TYPE_CHECKING:
    from pyinfra.api import Inventory, State

__all__ = ["RUN_WORDS", "GpulabError", "Guest", "InventoryError", "Lab", "Node", "load", "of_run"]

MODELS: dict[str, type[Node] | type[Guest]] = {"nodes": Node, "guests": Guest}
#: Words of `--data` that are about one run and belong to no host, with the program that takes them.
RUN_WORDS = {
    **dict.fromkeys(("rollback", "destroy", "confirm", "take_over"), "rebuild.py"),
    **dict.fromkeys(("archive", "fresh", "keep"), "restore.py"),
    **dict.fromkeys(("tenant", "service", "keep_previous"), "rotate.py"),
    **dict.fromkeys(("label", "from_backup", "collection", "into", "over", "new_keys"), "milvus.py"),
    "upgrade_without_backup": "deploy.py",
}
#: Of a host's own keys those that mean something to one program alone.
_OF_ONE_PROGRAM = {"keep_old": "rebuild.py"}
PROGRAMS = ("deploy.py", "rebuild.py", "restore.py", "rotate.py", "milvus.py")

_of_run: WeakKeyDictionary[State, Lab] = WeakKeyDictionary()


def load(path: str | Path, data: Iterable[str] = ()) -> Lab:
    """Read and validate the inventory file `path`, group data and `--data` words (`key=value`) included.

    Raises:
        InventoryError: any host's data is wrong; the message lists every error of every host.
    """
    if not Path(path).is_file():
        raise InventoryError(f"{path}: no such inventory file", resolution="inventory/lab.py is the one to edit")
    override: dict[str, Any] = {}
    for word in data:
        key, separator, value = word.partition("=")
        if not separator:
            raise InventoryError(f"--data {word}: expected key=value")
        override[key] = parse_cli_arg(value)
    try:
        resolved = resolve(path, override)
    except InventoryError:
        raise
    except UnexpectedExternalError as error:
        cause = error.exception
        raise InventoryError(f"{error.filename}: {type(cause).__name__}: {cause}") from error
    except (PyinfraError, CliError, SyntaxError) as error:
        raise InventoryError(f"{path}: {error}") from error
    return validate(resolved)


def of_run(state: State) -> Lab:
    """The validated lab of a pyinfra run, read once.

    Raises:
        InventoryError: as `load()`.
    """
    if state not in _of_run:
        _check_words(state.inventory.override_data)
        _of_run[state] = validate(state.inventory)
    return _of_run[state]


def _check_words(words: Iterable[str]) -> None:
    """
    Raises:
        InventoryError: a word of `--data` is for another program than the one that runs.
    """
    command = click.get_current_context(silent=True)
    files = [Path(str(word)).name for word in (command.params.get("operations") or ())] if command else []
    running = [name for name in files if name in PROGRAMS]
    of = {**RUN_WORDS, **_OF_ONE_PROGRAM}
    for word in words:
        if running and word in of and of[word] not in running:
            raise InventoryError(
                f"--data {word}=…: {running[0]} does nothing with it; nothing was changed",
                resolution=f"it is for {of[word]} --limit GUEST",
            )


def validate(resolved: Inventory) -> Lab:
    """Turn pyinfra's resolved inventory into models, or raise one error that lists all that is wrong."""
    hosts: dict[str, dict[str, Any]] = {"nodes": {}, "guests": {}}
    problems: list[str] = []
    # A word of `--data` reaches every host, so it may be a key of the other kind of host.
    overridden = set(resolved.override_data)
    for host in resolved:
        groups = [group for group in MODELS if host in resolved.groups.get(group, [])]
        if len(groups) != 1:
            problems.append(f"{host.name}: in {groups or 'no group'}; expected in one of: nodes, guests")
            continue
        if not host.connector_cls.__module__.startswith(("connectors.", "pyinfra.connectors.fake")):
            prefix = groups[0].removesuffix("s")
            problems.append(f"{host.name}: written as '{host.name}'; expected '@{prefix}/{host.name}'")
            continue
        raw = host.data.dict()
        model, found = _validate_host(MODELS[groups[0]], host.name, raw, overridden)
        problems += found
        if model is not None:
            hosts[groups[0]][host.name] = model
    if not problems:
        problems = _check_lab(hosts["nodes"], hosts["guests"])
    if problems:
        raise InventoryError(
            f"The inventory has {len(problems)} error{'s' if len(problems) > 1 else ''}; nothing was changed.",
            "\n".join(f"  {problem}" for problem in problems),
            "the fields and their meaning are in inventory/schema.py",
        )
    return Lab(nodes=hosts["nodes"], guests=hosts["guests"])


def _validate_host(
    model: type[Node] | type[Guest], name: str, raw: Mapping[str, Any], overridden: set[str]
) -> tuple[Node | Guest | None, list[str]]:
    """The host's model, or None and a line for each error: host, key, value, what is expected."""
    own = set(model.model_fields)
    foreign = {key for other in MODELS.values() for key in other.model_fields} - own
    data: dict[str, Any] = {"name": name}
    for key, value in raw.items():
        if key in own or not (PYINFRA_KEY.match(key) or (key in (foreign | RUN_WORDS.keys()) and key in overridden)):
            data[key] = value
    if model is Guest and isinstance(data.get("address"), str):
        data.setdefault("ssh_hostname", data["address"].partition("/")[0])
    try:
        return model.model_validate(data), []
    except ValidationError as error:
        if model is Guest and "address" not in data:
            # ssh_hostname follows from address: one missing value, one message.
            details = [item for item in error.errors() if item["loc"] != ("ssh_hostname",)]
        else:
            details = list(error.errors())
        return None, [_problem(name, model, item) for item in details]


def _problem(host: str, model: type[Any], error: Any) -> str:
    """One readable line of a pydantic error. Secrets do not stand in an inventory, so values may be shown."""
    location = ".".join(str(part) for part in error["loc"] if part != "name" or len(error["loc"]) > 1)
    key = f"{host}: {location}" if location else host
    match error["type"]:
        case "missing":
            return f"{key}: missing; expected a value"
        case "extra_forbidden":
            near = difflib.get_close_matches(str(error["loc"][-1]), _fields(model, error["loc"][:-1]), 1)
            meant = f"; did you mean `{near[0]}`?" if near else ""
            return f"{key} = {_shown(error['input'])}: unknown key{meant}"
        case "value_error":
            shown = "" if isinstance(error["input"], dict) else f" = {_shown(error['input'])}"
            return f"{key}{shown}: expected {error['ctx']['error']}"
        case "model_type":
            return (
                f"{key} = {_shown(error['input'])}: expected a dictionary with the keys of {error['ctx']['class_name']}"
            )
        case _:
            expected = error["msg"].removeprefix("Input should be ").removeprefix("String should ")
            return f"{key} = {_shown(error['input'])}: expected {expected}"


def _shown(value: object) -> str:
    """A value of the inventory, cut where it is longer than a line can bear."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…{text[-1]}"


def _fields(model: type[Any], location: tuple[str | int, ...]) -> list[str]:
    """The keys allowed at `location`, to find the one that was meant."""
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            annotation = model.model_fields[part].annotation
            options = [annotation, *getattr(annotation, "__args__", ())]
            models = [option for option in options if hasattr(option, "model_fields")]
            if models:
                model = models[0]
    return list(model.model_fields)


def _check_lab(nodes: Mapping[str, Node], guests: Mapping[str, Guest]) -> list[str]:
    """What no host's data shows alone: references, ids and addresses used twice, memory over the card's."""
    problems = []
    seen: dict[tuple[str, object], str] = {}
    for guest in guests.values():
        if guest.node not in nodes:
            known = ", ".join(nodes) or "none is declared"
            problems.append(f"{guest.name}: node = {guest.node!r}: expected a host of the group nodes ({known})")
            continue
        node = nodes[guest.node]
        keys: list[tuple[str, object]] = [("vmid", (node.cluster_name, guest.vmid)), ("address", guest.address.ip)]
        if guest.gpu is not None:
            keys.append(("gpu", (node.name, guest.gpu)))
        for number, card in enumerate(guest.networks):
            if card.mac is not None:
                place = ("mac", (node.cluster_name, card.bridge, card.mac.lower()))
                if place in seen:
                    problems.append(
                        f"{guest.name}: networks.{number}.mac = {card.mac!r}: already used by {seen[place]} "
                        f"on {card.bridge}; expected another one"
                    )
                seen[place] = guest.name
        for key, value in keys:
            if (key, value) in seen:
                shown = getattr(guest, key)
                problems.append(f"{guest.name}: {key} = {str(shown)!r}: already used by {seen[key, value]}")
            seen[key, value] = guest.name
        if guest.ssh_public_key is None:
            try:
                guest.public_key()
            except OSError as error:
                problems.append(f"{guest.name}: ssh_public_key: missing, and {error.filename}: {error.strerror}")
        try:
            guest.registry_certificates()
        except OSError as error:
            problems.append(f"{guest.name}: registry_ca: {error.filename}: {error.strerror}; expected a PEM file")
        try:
            guest.pip_index()
        except OSError as error:
            problems.append(f"{guest.name}: python_index.ca: {error.filename}: {error.strerror}; expected a PEM file")
        problems += [f"{guest.name}: {problem}" for problem in access.problems(guest)]
        problems += _check_gpu(node, guest)
        problems += _check_spare(node, guest, nodes, guests)
        problems += _check_keeper(node, guest, nodes, guests)
    for node in nodes.values():
        problems += _check_hugepages(node, [guest for guest in guests.values() if guest.node == node.name])
    return problems


def _check_hugepages(node: Node, guests: Iterable[Guest]) -> list[str]:
    """Huge pages come out of what the node sets aside at boot."""
    users = [guest for guest in guests if guest.hugepages is not None]
    pool = node.passthrough.hugepages
    if pool is None:
        return [
            f"{guest.name}: hugepages = {guest.hugepages!r}: {node.name} sets no huge pages aside; "
            f"expected `passthrough.hugepages` of {node.name}, with {guest.memory_mib} MiB for it"
            for guest in users
        ]
    problems = [
        f"{guest.name}: hugepages = {guest.hugepages!r}: {node.name} sets aside pages of {pool.size}; "
        f"expected {pool.size!r} (or another passthrough.hugepages.size of {node.name})"
        for guest in users
        if guest.hugepages not in (pool.size, "any")
    ]
    taken = sum(guest.memory_mib for guest in users)
    if taken > pool.mib:
        terms = " + ".join(f"{guest.name} {guest.memory_mib}" for guest in users)
        problems.append(
            f"{node.name}: passthrough.hugepages.count = {pool.count}: {pool.mib} MiB, and its guests take "
            f"{terms} = {taken} MiB; expected at least {-(-taken // pool.page_mib)}"
        )
    return problems


def _check_spare(node: Node, guest: Guest, nodes: Mapping[str, Node], guests: Mapping[str, Guest]) -> list[str]:
    """A restore would have to remove what stands in its way."""
    spare = guest.backup.spare_vmid if guest.backup is not None else None
    return [
        f"{guest.name}: backup.spare_vmid = {spare}: expected an id that no guest has; it is the vmid of {other.name}"
        for other in guests.values()
        if other.vmid == spare and other.node in nodes and nodes[other.node].cluster_name == node.cluster_name
    ]


def _check_keeper(node: Node, guest: Guest, nodes: Mapping[str, Node], guests: Mapping[str, Guest]) -> list[str]:
    """The keeper of destroy=1 is a VM beside all others."""
    taken: dict[int, str] = {}
    for other in guests.values():
        if other.node not in nodes or nodes[other.node].cluster_name != node.cluster_name:
            continue
        taken[other.vmid] = f"the vmid of {other.name}"
        if other.backup is not None:
            taken[other.backup.spare_vmid] = f"the spare_vmid of {other.name}"
        if other.keeper_vmid is not None and other.name != guest.name:
            taken[other.keeper_vmid] = f"the keeper_vmid of {other.name}"
    if guest.keeper_vmid not in taken:
        return []
    used = taken[guest.keeper_vmid]
    return [f"{guest.name}: keeper_vmid = {guest.keeper_vmid}: expected an id that nothing else has; it is {used}"]


def _check_gpu(node: Node, guest: Guest) -> list[str]:
    problems = services.problems(guest)
    if guest.gpu is None:
        alone = guest.tenants and not guest.services.declared()
        problems += ["tenants: expected `gpu` or `services` beside it"] if alone else []
        return [f"{guest.name}: {problem}" for problem in problems]
    names = [device.name for device in node.passthrough.devices]
    if guest.gpu not in names:
        return [f"{guest.name}: gpu = {guest.gpu!r}: expected a passthrough device of {node.name} ({', '.join(names)})"]
    card = node.device(guest.gpu).card
    problems += guest.nvidia.beyond(card)
    problems += tenant_problems(guest.tenants, guest.nvidia, card)
    problems += budgets.problems(guest, card)
    return [f"{guest.name}: {problem}" for problem in problems]

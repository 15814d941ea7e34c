# SPDX-License-Identifier: MIT
"""PyTorch: the image and the locked environment of jobs, and `gpulab-run`, which starts one with a tenant's share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyinfra.api import QuoteString, StringCommand

from inventory import GpulabError
from inventory.sharing import Client
from operations import files, step
from operations.containers.container import pull
from operations.containers.facts import PyTorchFacts
from operations.facts import python
from operations.files import File
from operations.remote import program
from operations.told import Told

PROGRAM = "/usr/local/bin/gpulab-run"
SETTINGS = "/etc/gpulab/pytorch.json"
HOOK = "/usr/local/lib/gpulab/pytorch"
SUDOERS = "/etc/sudoers.d/gpulab-run"
#: The network of the jobs that may reach one.
NETWORK = "gpulab-pytorch"
PATHS = (PROGRAM, SETTINGS, f"{HOOK}/sitecustomize.py", SUDOERS)

#: A card that asks nothing of its clients.
ANY_CLIENT = Client()

_MAKE = program(__file__, "pytorch_environment", "pytorch_make")


def lock_text(path: str | None) -> str:
    """The requirements of the environment; empty: the image's own packages alone.

    Raises:
        GpulabError: it can't be read, or a line has no hash.
    """
    if path is None:
        return ""
    try:
        text = Path(path).expanduser().read_text()
    except OSError as error:
        raise GpulabError(f"services.pytorch.lock = {path!r}: {error.strerror}") from None
    logical = text.replace("\\\n", " ").splitlines()
    for line in (line.partition("#")[0] if line.lstrip().startswith("#") else line for line in logical):
        if line.strip() and ("==" not in line or "--hash=sha256:" not in line):
            raise GpulabError(
                f"services.pytorch.lock = {path!r}: {line.strip()[:80]!r} has no version with a hash",
                resolution="`pip-compile --generate-hashes`, or `uv pip compile --generate-hashes`, writes such a file",
            )
    return text


def environment_name(image: str, requirements: str) -> str:
    """The folder of an environment: image and lock, and nothing else, decide what is in it. Empty: none."""
    return hashlib.sha256(f"{image}\n{requirements}".encode()).hexdigest()[:16] if requirements else ""


def wanted_files(settings: Mapping[str, Any]) -> dict[str, File | None]:
    """gpulab-run, what it reads, the hook, and who may call it."""
    groups = [f"gpulab-{name}" for name in settings["tenants"]]
    rules = "".join(f"%{name} ALL=(root) NOPASSWD: {PROGRAM}\n" for name in groups)
    text = (Path(__file__).parent / "remote/torch_hook.py").read_text()
    return {
        PROGRAM: File("#!/usr/bin/python3 -I\n" + (Path(__file__).parent / "remote/gpulab_run.py").read_text(), 0o755),
        SETTINGS: File(json.dumps(dict(settings), indent=2) + "\n"),
        f"{HOOK}/sitecustomize.py": File(text),
        SUDOERS: File(f"# gpulab-run itself looks whose share a caller may use.\n{rules}", 0o440) if groups else None,
    }


@step.step
def pytorch(
    image: str,
    data: str,
    uid: int,
    tenants: Mapping[str, Sequence[Mapping[str, Any]] | None],
    client: Client = ANY_CLIENT,
    lock: str | None = None,
    index: tuple[str, str] = ("", ""),
    time_limit_h: float = 24,
    host_memory_mib: int | None = None,
    shm_mib: int = 1024,
    network: str = "bridge",
    profiles: Mapping[str, Mapping[str, str]] | None = None,
    simulated: str = "",
) -> step.Commands:
    """
    Ensure that tenants can run PyTorch jobs with `gpulab-run`.

    The environment of a lock file is built once, under a name that follows from image and lock; one that jobs may
    use is never touched, and old ones stay. Tenants' folders lie under `<data>/pytorch/tenants`.

    + image: name and digest
    + data: mount point of the data disk
    + uid: user that jobs run as
    + tenants: of each tenant what its jobs' processes get, for one process, two, …; None: it has no share
    + client: what the way of sharing asks of a process that uses the card
    + lock: requirements file with hashes on the control machine; None: the image's own packages
    + index: URL of pip's index and the PEM text of its CA; empty: pip's own
    + time_limit_h: the longest that a job may run
    + host_memory_mib: limit of a job's main memory
    + shm_mib: /dev/shm of a job that has its own
    + network: `bridge` or `none`
    + profiles: named environment variables
    + simulated: what of the host is a stand-in, for the jobs' logs
    """
    requirements = lock_text(lock)
    name = environment_name(image, requirements)
    joined = NETWORK if network == "bridge" else "none"
    home = f"{data}/pytorch"
    settings = {
        "data": data,
        "image": image,
        "uid": uid,
        "tenants": {
            tenant: {"folder": f"{home}/tenants/{tenant}", "shares": shares and [dict(share) for share in shares]}
            for tenant, shares in tenants.items()
        },
        "client": {"environment": dict(client.environment), "mounts": dict(client.mounts), "ipc": client.ipc},
        "environment": f"{home}/environments/{name}" if name else "",
        "hook": HOOK,
        "time_limit_h": time_limit_h,
        "host_memory_mib": host_memory_mib,
        "shm_mib": shm_mib,
        "network": joined,
        "profiles": {key: dict(value) for key, value in (profiles or {}).items()},
        "simulated": simulated,
    }
    groups = [f"gpulab-{tenant}" for tenant in tenants]
    found = step.read(
        PyTorchFacts, image=image, network=NETWORK, data=data, mounted=data, paths=list(PATHS), groups=groups
    )
    order = missing(found, settings, groups, name)
    changing = files.differing(found.get("files", {}), wanted_files(settings))
    there = found.get("environments", {})
    changed = name in there and not there[name]["whole"]
    if not order and not changing:
        also = f", and {len(there) - 1} earlier ones stay" if len(there) > 1 else ""
        step.noop(f"jobs run as declared in environment {name or 'of the image'}{also}")
        return
    for key, subject in SUBJECTS.items():
        if value := order.get(key):
            again = " anew: somebody has changed its files" if key == "environment" and changed else ""
            step.changes(f"{subject} {value if isinstance(value, str) else ', '.join(value)}{again}")
    for path, file in changing.items():
        files.record(found.get("files", {}), {path: file}) if path == SETTINGS else step.changes(f"file {path}")
    if order.pop("image", None):
        yield pull("pytorch", image, "docker")
    if order:
        body = {
            "data": data, "image": image, "uid": uid,
            "network": order.get("network", ""), "build_network": NETWORK, "groups": order.get("groups", []),
            "folders": order.get("folders", []), "current": order.get("current", ""), "environment": None,
        }  # fmt: skip
        if order.get("environment"):
            body["environment"] = {"name": name, "requirements": requirements, "index": index[0], "ca": index[1]}
        yield Told(*python(_MAKE, body).bits, explain=_not_made)
    if changing:
        rules = changing.get(SUDOERS)
        if rules is not None:
            yield StringCommand("sh", "-c", QuoteString("printf %s \"$1\" | visudo -cf -"), "check",
                                QuoteString(rules.content))  # fmt: skip
        yield files.write(changing)


#: What pip says, and what it means. The first that fits is told.
_PIP = (
    (
        "DO NOT MATCH THE HASHES",
        "the index has another file than the lock names",
        "write the lock anew if that is meant",
    ),
    (
        "onnection broken by",
        "the Python index does not answer",
        "`python_index` of the guest says where pip looks; without it pip asks its own",
    ),
    (
        "confirming the ssl certificate",
        "the Python index has another certificate than `python_index.ca` vouches for",
        "",
    ),
    ("No matching distribution found", "the Python index has no such package for this image's Python", ""),
)


def _not_made(output: str) -> GpulabError:
    """Why something of what jobs need could not be made. What was there before is as it was."""
    said = [line.rstrip() for line in output.splitlines() if line.strip()] or ["it said nothing"]
    known = ((meaning, hint) for words, meaning, hint in _PIP if words in output)
    meaning, hint = next(known, (said[0], ""))
    rest = "\n".join(said[-12:])
    return GpulabError(f"pytorch: {meaning}", f"{rest}\nJobs run as before, with the environment that is in use.", hint)


#: What of an order is said in the plan.
SUBJECTS = {
    "image": "pull", "network": "network", "groups": "groups", "folders": "folders of",
    "environment": "build environment",
    "current": "environment in use:",
}  # fmt: skip


def missing(found: Mapping[str, Any], settings: Mapping[str, Any], groups: Sequence[str], name: str) -> dict[str, Any]:
    """What has to be made, by the keys of `SUBJECTS`; empty: nothing."""
    have = found.get("groups", {})
    order: dict[str, Any] = {}
    if not found.get("image"):
        order["image"] = settings["image"]
    building = bool(name) and not found.get("environments", {}).get(name, {}).get("whole")
    # The build asks pip's index; jobs without a network do not.
    if (settings["network"] == NETWORK or building) and not found.get("network"):
        order["network"] = NETWORK
    if absent := [group for group in groups if have.get(group) is None]:
        order["groups"] = absent
    wrong = [
        group
        for group in groups
        if found.get("folders", {}).get(group) != [settings["uid"], have.get(group), 0o2770]
        or found.get("logs", {}).get(group) != [0, have.get(group), 0o2750]
    ]
    if wrong:
        order["folders"] = wrong
    if building:
        order["environment"] = name
    if name and found.get("current") != name:
        order["current"] = name
    return order

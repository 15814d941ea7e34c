# SPDX-License-Identifier: MIT
"""The container of Milvus standalone, the tools that talk to it on the guest, and the step that makes both."""

from __future__ import annotations

import hmac
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from pyinfra import host
from pyinfra.api import QuoteString, StringCommand

from inventory import GpulabError, Guest, Lab, budgets
from inventory.access import milvus_name, tenants_of, token
from inventory.secrets import Secrets
from inventory.services import Milvus
from inventory.sharing import Client
from operations import apt, files, step
from operations.containers.container import apply, decide, read, record
from operations.containers.milvus import backup, wanted
from operations.containers.spec import ContainerSpec
from operations.facts import JsonFact
from operations.files import File, render
from operations.plan import file_diff
from operations.remote import program
from operations.told import Live, Told

#: Ports inside the container.
PORT, METRICS_PORT = 19530, 9091
#: The image's folder of settings, and of data.
CONFIG, DATA = "/milvus/configs/user.yaml", "/var/lib/milvus"

#: The server's own variable for `common.security.authorizationEnabled`.
AUTHORIZATION = "COMMON_SECURITY_AUTHORIZATIONENABLED"

#: A Python environment with Milvus' driver, and what is in it.
TOOLS = "/opt/gpulab/milvus-tools"
REQUIREMENTS = f"{TOOLS}/requirements.txt"
PACKAGE = "python3-venv"
#: The named ways to index, for users' programs.
PROFILES = "/etc/gpulab/milvus.json"

#: Seconds for Milvus to take logins after it calls itself healthy.
LOGIN_S = 60

#: A card that asks nothing of its clients.
ANY_CLIENT = Client()

_TOOLS = program(__file__, "tools")
_APPLY = program(__file__, "client", "accounts", "apply")


class MilvusFacts(JsonFact):
    """The tools, accounts, and declared collections: see `remote/read.py`."""

    script = program(__file__, "client", "read")

    def command(self, uri: str, databases: Mapping[str, Sequence[str]]) -> StringCommand:
        argument = {"uri": uri, "tools": REQUIREMENTS, "profiles": PROFILES, "databases": dict(databases)}
        return StringCommand(_PYTHON, "-c", QuoteString(self.script), QuoteString(json.dumps(argument)))


#: The tools' own Python; before they are there, the guest's says so.
_PYTHON = f'"$(test -x {TOOLS}/bin/python && echo {TOOLS}/bin/python || echo python3)"'


@dataclass(frozen=True)
class Passwords:
    """Who logs in with what: root, and each tenant's user. `digests`: each password's digest, keyed by the lab.

    `storage` stands in the place of the published storage credentials, `key` is the lab's for digests of secrets.
    """

    values: Mapping[str, str] = field(repr=False)
    storage: str = field(repr=False)
    key: str = field(repr=False)

    @property
    def digests(self) -> dict[str, str]:
        return {
            name: hmac.digest(self.key.encode(), f"milvus {name} {value}".encode(), "sha256").hex()
            for name, value in self.values.items()
        }


def passwords_of(lab: Lab, guest: Guest) -> Passwords:
    """The lab's secrets of this guest's Milvus; those that are not there yet are made."""
    secrets, cluster = Secrets(guest.state), lab.node_of(guest).cluster_name
    values = {
        milvus_name(name): secrets.once(cluster, token("milvus", name), guest.name)
        for name in tenants_of(guest, "milvus")
    }
    return Passwords(
        {"root": secrets.once(cluster, "milvus.root", guest.name), **values},
        secrets.once(cluster, "milvus.storage", guest.name),
        secrets.once(cluster, "containers.key"),
    )


def settings(service: Milvus, storage_key: str) -> dict[str, Any]:
    """Milvus' user.yaml: one process with its own etcd and queue, on files of its own, closed to everybody unknown."""
    return {
        "etcd": {"use": {"embed": True}, "data": {"dir": f"{DATA}/etcd"}},
        "common": {
            "storageType": "local",
            # Seconds. Alone it waits in vain for another server to take its collections over (upstream: 1800).
            "gracefulStopTimeout": 10,
            "security": {
                "authorizationEnabled": True,
                # Root may give a user a new password without the one before.
                "superUsers": "root",
                # Otherwise everybody may list and describe the collections of all databases. Servers that do not know
                # the key (2.3) allow it still.
                "enablePublicPrivilege": False,
            },
        },
        "localStorage": {"path": f"{DATA}/data"},
        # Its other HTTP API, which is on the metrics' port too, and asks nobody there for a login (until 2.6.10) or for
        # rights (all versions).
        "proxy": {"http": {"enabled": False}},
        "mq": {"type": "rocksmq"},
        "rocksmq": {"path": f"{DATA}/rdb_data"},
        # Nothing listens with these; they stand in the place of the published minioadmin.
        "minio": {"accessKeyID": "gpulab", "secretAccessKey": storage_key},
        "gpu": {
            "initMemSize": service.pool_init_mib,
            "maxMemSize": budgets.milvus_pool_mib(service.memory_budget_mib),
        },
    }


def milvus_spec(
    service: Milvus,
    data: str,
    passwords: Passwords,
    client: Client = ANY_CLIENT,
    gpu: bool = True,
    engine: Literal["docker", "podman"] = "docker",
) -> ContainerSpec:
    """The container of Milvus; see `milvus()` for the values."""
    return ContainerSpec(
        name="milvus",
        image=service.image,
        command=("milvus", "run", "standalone"),
        # Also where a server does not read the settings.
        environment={**service.environment, AUTHORIZATION: "true", **client.environment},
        volumes={f"{data}/milvus": DATA},
        binds=client.mounts,
        mounts=(data,),
        ports={service.port: PORT, service.metrics_port: METRICS_PORT},
        devices=("nvidia.com/gpu=all",) if gpu else (),
        user=client.user or "0:0",
        ipc=client.ipc,
        memory_mib=service.host_memory_mib,
        # YAML that is JSON.
        secrets={CONFIG: json.dumps(settings(service, passwords.storage), indent=2) + "\n"},
        secrets_key=passwords.key,
        probe=f"http://127.0.0.1:{service.metrics_port}/healthz",
        stop_s=60,
        ready_s=service.ready_s,
        engine=engine,
    )


@step.step
def milvus(
    declared: Mapping[str, Any],
    tenants: Sequence[str],
    data: str,
    passwords: Passwords,
    client: Client = ANY_CLIENT,
    gpu: bool = True,
    engine: Literal["docker", "podman"] = "docker",
    index: tuple[str, str] = ("", ""),
    prune: bool = False,
    without_backup: bool = False,
) -> step.Commands:
    """
    Ensure that Milvus runs within its memory budget, lets nobody in but its tenants, and has its collections.

    It listens on the guest's loopback address only. Each tenant has a database, a user and a role of its own; root's
    published password is changed with the first run. Data lie under `<data>/milvus`, and no run removes any.

    + declared: `services.milvus` of the inventory
    + tenants: those that may use it
    + data: mount point of the data disk
    + passwords: root's, and one a database
    + client: what the way of sharing asks of a process that uses the card
    + gpu: does the guest have one?
    + engine: the guest's container engine
    + index: URL of pip's index and the PEM text of its CA; empty: pip's own
    + prune: remove users that are not declared
    + without_backup: another image takes the place of a server that can't be backed up before
    """
    service = Milvus.model_validate(declared)
    spec = milvus_spec(service, data, passwords, client, gpu, engine)
    users = [milvus_name(name) for name in tenants]
    collections = wanted.collections(service)
    uri = f"http://127.0.0.1:{service.port}"
    named = {user: [each["name"] for each in collections if each["database"] == user] for user in users}
    requirements = render("containers/milvus-tools.txt.j2")
    profiles = json.dumps(wanted.profiles(service), indent=2) + "\n"

    found = read(spec)
    known: Mapping[str, Any] = step.read(MilvusFacts, uri=uri, databases=named)
    actions = decide(found, spec)
    tools = known.get("tools") != requirements
    answers = bool(known) and not known["error"]
    lines = wanted.differences(known, users, passwords.digests, collections, host.name) if answers else []
    gone = wanted.undeclared(known, users) if answers else []
    remove = gone if prune else []
    if gone and not prune:
        step.notes("users of Milvus that nobody declares stay (`--data prune=1` removes them)", tuple(gone))
    profiled = known.get("profiles") == profiles
    if answers and profiled and not (actions.any() or tools or lines or remove):
        holds = f"{len(users)} tenants and {len(collections)} collections"
        step.noop(f"Milvus {known['version']} runs as declared, with {holds}")
        return

    images = backup.upgrade(found, spec)
    if images:
        backup.record(host.name, images, known, "" if tools else known.get("error", ""), without_backup)
    record(spec, actions)
    if tools:
        step.changes(f"Milvus' driver in {TOOLS}", file_diff(known.get("tools"), requirements))
    if not profiled:
        step.changes(f"file {PROFILES}", file_diff(known.get("profiles"), profiles))
    if not answers:
        # Which of them there are is only known once it answers.
        lines = ["root's own password", *(f"database, user and role {name}" for name in users)]
        lines += [f"collection {each['database']}.{each['name']}" for each in collections]
        step.changes("what Milvus does not hold yet", tuple(lines))
    elif lines:
        step.changes("accounts and collections of Milvus", tuple(lines))
    if remove:
        step.changes("remove users of Milvus that nobody declares; their databases stay", tuple(remove))

    if tools:
        # The environment needs a part of Python that is a package of its own.
        yield apt.install([PACKAGE])
        order = {"folder": TOOLS, "requirements": requirements, "index": index[0], "ca": index[1]}
        yield Live("python3", "-c", QuoteString(_TOOLS), QuoteString(json.dumps(order)), explain=_no_tools)
    if not profiled:
        yield files.write({PROFILES: File(profiles)})
    check = None
    if images and not without_backup:
        # The image first: what is written between the last answers and the replacement is not compared.
        yield from apply(spec, replace(actions, replace="", start=""))
        actions, name = replace(actions, pull=False), backup.name_now("upgrade")
        yield from backup.before_upgrade(name, host.name)
        check = backup.upgrade_check(name, data)
    yield from apply(spec, actions, check)
    if not answers or lines or remove:
        state: dict[str, Any] = {
            "uri": uri,
            "databases": users,
            "digests": passwords.digests,
            "remove": remove,
            "collections": collections,
            "deadline_s": LOGIN_S,
            "ready_s": service.ready_s,
        }
        words = (f"{TOOLS}/bin/python", "-c", QuoteString(_APPLY), QuoteString(json.dumps(state)))
        yield Told(*words, explain=partial(_not_had, host.name), _stdin=json.dumps(dict(passwords.values)))


def _no_tools(output: str) -> GpulabError:
    said = [line for line in output.strip().splitlines() if line.strip()] or ["pip said nothing"]
    return GpulabError(
        f"Milvus' driver could not be installed: {said[-1].strip()}",
        "\n".join(said[-6:-1]),
        "`python_index` of the guest says where pip looks",
    )


def _not_had(name: str, output: str) -> GpulabError:
    said = output.strip().splitlines() or ["it said nothing"]
    hint = ""
    if "log in as root" in said[-1]:
        hint = "its root password is not the one in the lab's secrets: put it there as `milvus.root`, and deploy again"
    return GpulabError(f"{name}: milvus: {said[-1]}", "What was declared before it is done.", hint)

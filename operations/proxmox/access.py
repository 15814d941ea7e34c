# SPDX-License-Identifier: MIT
"""Role, user and token: the least that a deploy needs, made on the node over SSH by `make bootstrap`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pyinfra import context
from pyinfra.api import Host, QuoteString, StringCommand

import inventory
from inventory import GpulabError, Node
from inventory.secrets import Secrets
from operations import step
from operations.facts import JsonFact
from operations.proxmox.client import ApiError, Client, Unauthorized

_VM = (
    "VM.Allocate VM.Audit VM.PowerMgmt VM.Config.CPU VM.Config.Memory VM.Config.Disk VM.Config.HWType "
    "VM.Config.Options VM.Config.Network VM.Config.Cloudinit VM.Config.CDROM"
)
#: PVE 9 replaced VM.Monitor by VM.GuestAgent.*; neither name is known to the other version.
_AGENT = {8: "VM.Monitor", 9: "VM.GuestAgent.Audit VM.GuestAgent.FileRead"}
#: Only for guests with declared backups.
_BACKUP = "VM.Backup"
_REST = (
    "Datastore.AllocateSpace Datastore.AllocateTemplate Datastore.Audit Sys.Audit Sys.AccessNetwork "
    "Mapping.Use Mapping.Modify Mapping.Audit SDN.Use"
)


def privileges(major: int) -> tuple[str, ...]:
    """The privileges of the role, for PVE 8 or 9."""
    return tuple(sorted(f"{_VM} {_BACKUP} {_AGENT[min(max(major, 8), 9)]} {_REST}".split()))


def paths(node: Node) -> tuple[str, ...]:
    """Where the user gets the role: nothing on `/`."""
    return ("/vms", "/storage", f"/nodes/{node.name}", "/mapping/pci", "/sdn/zones/localnetwork")


def missing(
    granted: Mapping[str, Mapping[str, int]], node: Node, major: int, storages: set[str], backups: str | None = None
) -> list[str]:
    """What a deploy needs and the token has not: lines `privilege on path`.

    `granted` is the answer of GET /access/permissions. Lists come empty without a right, so rights are compared,
    not probed. `backups`: the storage that the guest's backups go to.
    """
    if backups is not None:
        storages = {*storages, backups}
    per_path = {
        "/vms": f"{_VM} {_AGENT[min(max(major, 8), 9)]} {_BACKUP if backups is not None else ''}".split(),
        f"/nodes/{node.name}": ["Sys.Audit", "Sys.AccessNetwork"],
        "/mapping/pci": ["Mapping.Use", "Mapping.Modify"],
        "/sdn/zones/localnetwork": ["SDN.Use"],
        f"/storage/{node.image_storage}": ["Datastore.AllocateTemplate", "Datastore.Audit"],
        **{f"/storage/{storage}": ["Datastore.AllocateSpace", "Datastore.Audit"] for storage in sorted(storages)},
    }
    if node.image_storage in storages:
        per_path[f"/storage/{node.image_storage}"].append("Datastore.AllocateTemplate")
    return [
        f"{privilege} on {path}"
        for path, needed in per_path.items()
        for privilege in needed
        if not has(granted, path, privilege)
    ]


def has(granted: Mapping[str, Mapping[str, int]], path: str, privilege: str) -> bool:
    """Does the token hold it there?

    PVE lists each path with what counts there: the deepest one listed decides, 1 reaches the paths below.
    """
    parts = path.strip("/").split("/")
    levels = ["/" + "/".join(parts[:count]) for count in range(len(parts), 0, -1)] + ["/"]
    for level in levels:
        if level in granted:
            flag = granted[level].get(privilege)
            return flag is not None and (level == path or bool(flag))
    return False


class Access(JsonFact):
    """Roles, users, ACL entries, tokens and storages of the node, the PVE version and the cluster's CA."""

    script = """
import json, subprocess, sys
argument = json.loads(sys.argv[1])
def pve(*words):
    done = subprocess.run([*words, "--output-format", "json"], capture_output=True, text=True)
    if done.returncode:
        sys.exit(" ".join(words) + ": " + done.stderr.strip())
    return json.loads(done.stdout)
users = pve("pveum", "user", "list")
known = argument["user"] in [user["userid"] for user in users]
print(json.dumps({
    "version": pve("pvesh", "get", "/version")["version"],
    "roles": {role["roleid"]: (role.get("privs") or "") for role in pve("pveum", "role", "list")},
    "user": known,
    "acl": [[acl["path"], acl["ugid"], acl["roleid"]] for acl in pve("pveum", "acl", "list")],
    "tokens": [token["tokenid"] for token in pve("pveum", "user", "token", "list", argument["user"])] if known else [],
    "storage": {item["storage"]: item.get("content", "") for item in pve("pvesh", "get", "/storage")},
    "ca": open("/etc/pve/pve-root-ca.pem").read(),
}))
"""

    def command(self, user: str) -> StringCommand:
        return super().command(user=user)


def bootstrap_commands(found: Mapping[str, Any], node: Node) -> list[tuple[str, ...]]:
    """What has to run on the node until role, user, rights and storage contents are as a deploy needs them."""
    commands: list[tuple[str, ...]] = []
    role, user = node.api.role, node.api.user
    wanted = privileges(int(found["version"].split(".")[0]))
    if role not in found["roles"]:
        commands.append(("pveum", "role", "add", role, "--privs", " ".join(wanted)))
    elif set(found["roles"][role].replace(",", " ").split()) != set(wanted):
        commands.append(("pveum", "role", "modify", role, "--privs", " ".join(wanted)))
    if not found["user"]:
        commands.append(("pveum", "user", "add", user, "--comment", "gpulab deploys with this user's token"))
    commands += [
        ("pveum", "acl", "modify", path, "--users", user, "--roles", role)
        for path in paths(node)
        if [path, user, role] not in found["acl"]
    ]
    content = found["storage"].get(node.image_storage)
    if content is None:
        raise GpulabError(
            f"{node.name}: image_storage = {node.image_storage!r}: no such storage",
            f"The node has {', '.join(sorted(found['storage'])) or 'none'}.",
        )
    kinds = [kind for kind in content.split(",") if kind]
    lacking = [kind for kind in ("import", "snippets") if kind not in kinds]
    if lacking:
        commands.append(("pvesm", "set", node.image_storage, "--content", ",".join([*kinds, *lacking])))
    return commands


@step.step
def bootstrap() -> step.Commands:
    """
    Ensure role, user, rights and token of gpulab on a node, and keep the token and the CA on the control machine.

    Run it as `make bootstrap LAB=…`. The token's value is shown by PVE once; it goes into the lab's secrets file
    and is never printed. A token that works is kept.
    """
    host: Host = context.ctx_host.get()
    node = inventory.of_run(context.ctx_state.get()).nodes.get(host.name)
    if node is None:
        raise GpulabError(f"{host.name}: bootstrap is for nodes", resolution="add --limit nodes")
    found = step.read(Access, user=node.api.user)
    commands = bootstrap_commands(found, node)
    current_ca = node.ca_file.read_text() if node.ca_file.is_file() else None
    works = current_ca == found["ca"] and _token_works(node)
    for command in commands:
        step.changes(" ".join(command[:4]))
    if not works:
        step.changes(f"token {node.api.user}!{node.api.token_name}")
    if not commands and works:
        step.noop("role, user, rights, token and CA are as a deploy needs them")
        return
    for command in commands:
        yield StringCommand(*(QuoteString(word) for word in command))
    if current_ca != found["ca"]:
        yield step.call(_store_ca, node, found["ca"])
    if not works:
        yield step.call(_new_token, host, node, node.api.token_name in found["tokens"])


def _token_works(node: Node) -> bool:
    try:
        Client(node, retry_s=10).get("version")
    except Unauthorized:
        return False
    except ApiError:
        raise
    except GpulabError:
        return False
    return True


def _store_ca(node: Node, pem: str) -> None:
    node.ca_file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    node.ca_file.write_text(pem)


def _new_token(host: Host, node: Node, replace: bool) -> None:
    """Make the token and store its value before anything uses it. Its output is never printed."""
    words = ["pveum", "user", "token"]
    name = [node.api.user, node.api.token_name]
    if replace:
        _silently(host, [*words, "remove", *name])
    answer = _silently(host, [*words, "add", *name, "--privsep", "0", "--output-format", "json"])
    created = json.loads(answer)
    Secrets(node.state).put(node.cluster_name, "api_token", f"{created['full-tokenid']}={created['value']}")
    Client(node, retry_s=30).get("version")


def _silently(host: Host, words: list[str]) -> str:
    """Run a command on the node whose output is secret."""
    command = StringCommand(*(QuoteString(word) for word in words))
    done, output = host.run_shell_command(command, print_output=False, print_input=False)
    if not done:
        raise GpulabError(f"{host.name}: {' '.join(words[:4])} failed", output.stderr)
    return str(output.stdout)

# SPDX-License-Identifier: MIT
"""Who may do what: roles, access control lists with propagation, tokens with privilege separation."""

from __future__ import annotations

import hashlib
import hmac
import time

from rehearsal.pve.errors import ApiError, no_permission
from rehearsal.pve.state import NodeState, Token

ROOT = "root@pam"

_COMMON = [
    "Datastore.Allocate",
    "Datastore.AllocateSpace",
    "Datastore.AllocateTemplate",
    "Datastore.Audit",
    "Group.Allocate",
    "Mapping.Audit",
    "Mapping.Modify",
    "Mapping.Use",
    "Permissions.Modify",
    "Pool.Allocate",
    "Pool.Audit",
    "Realm.Allocate",
    "Realm.AllocateUser",
    "SDN.Allocate",
    "SDN.Audit",
    "SDN.Use",
    "Sys.AccessNetwork",
    "Sys.Audit",
    "Sys.Console",
    "Sys.Incoming",
    "Sys.Modify",
    "Sys.PowerMgmt",
    "Sys.Syslog",
    "User.Modify",
    "VM.Allocate",
    "VM.Audit",
    "VM.Backup",
    "VM.Clone",
    "VM.Config.CDROM",
    "VM.Config.CPU",
    "VM.Config.Cloudinit",
    "VM.Config.Disk",
    "VM.Config.HWType",
    "VM.Config.Memory",
    "VM.Config.Network",
    "VM.Config.Options",
    "VM.Console",
    "VM.Migrate",
    "VM.PowerMgmt",
    "VM.Snapshot",
    "VM.Snapshot.Rollback",
]
_ONLY_8 = ["VM.Monitor"]
_ONLY_9 = [
    "VM.GuestAgent.Audit",
    "VM.GuestAgent.FileRead",
    "VM.GuestAgent.FileSystemMgmt",
    "VM.GuestAgent.FileWrite",
    "VM.GuestAgent.Unrestricted",
    "VM.Replicate",
]

# Paths GET /access/permissions lists even where no access control entry names them.
_DEFAULT_PATHS = ["/", "/access", "/access/groups", "/mapping", "/nodes", "/pool", "/sdn", "/storage", "/vms"]


def privileges(release: str) -> list[str]:
    """Every privilege that a release knows; 9 replaced VM.Monitor by VM.GuestAgent.*."""
    return sorted(_COMMON + (_ONLY_8 if release.startswith("8.") else _ONLY_9))


def special_roles(release: str) -> dict[str, list[str]]:
    """The built-in roles that the lab's users may hold."""
    every = privileges(release)
    audit = [privilege for privilege in every if privilege.endswith(".Audit")]
    admin_not = (
        "Permissions.Modify",
        "Realm.Allocate",
        "Sys.AccessNetwork",
        "Sys.Incoming",
        "Sys.Modify",
        "Sys.PowerMgmt",
        "Mapping.Modify",
    )
    return {
        "Administrator": every,
        "NoAccess": [],
        "PVEAdmin": [privilege for privilege in every if privilege not in admin_not],
        "PVEAuditor": [privilege for privilege in audit if not privilege.startswith("VM.GuestAgent")],
        "PVEDatastoreAdmin": [privilege for privilege in every if privilege.startswith("Datastore.")],
        "PVEDatastoreUser": ["Datastore.AllocateSpace", "Datastore.Audit"],
        "PVEMappingAdmin": ["Mapping.Audit", "Mapping.Modify", "Mapping.Use"],
        "PVEMappingUser": ["Mapping.Audit", "Mapping.Use"],
        "PVESDNUser": ["SDN.Audit", "SDN.Use"],
        "PVEVMAdmin": [privilege for privilege in every if privilege.startswith("VM.")],
        "PVEVMUser": [
            p
            for p in every
            if p in ("VM.Audit", "VM.Backup", "VM.Config.CDROM", "VM.Config.Cloudinit", "VM.Console", "VM.PowerMgmt")
        ],
    }


def all_roles(state: NodeState) -> dict[str, list[str]]:
    return {**special_roles(state.release), **state.roles}


def held(state: NodeState, who: str, path: str) -> dict[str, int]:
    """The privileges of a user or token on a path: `{privilege: 1 if it reaches the paths below, else 0}`."""
    user, _, token_id = who.partition("!")
    of_user = dict.fromkeys(privileges(state.release), 1) if user == ROOT else _granted(state, "user", user, path)
    if not token_id:
        return of_user
    token = _token(state, user, token_id)
    if token is None:
        return {}
    if not token.privsep:
        return of_user
    of_token = _granted(state, "token", who, path)
    return {privilege: flag & of_user[privilege] for privilege, flag in of_token.items() if privilege in of_user}


def permission_map(state: NodeState, who: str) -> dict[str, dict[str, int]]:
    """GET /access/permissions without a path: every known path on which anything is held."""
    paths = sorted({*_DEFAULT_PATHS, *(entry.path for entry in state.acl)})
    found = {path: held(state, who, path) for path in paths}
    return {path: flags for path, flags in found.items() if flags}


def require(state: NodeState, who: str, path: str, *wanted: str) -> None:
    """403 unless all of these privileges are held on the path; the first missing one is named."""
    have = held(state, who, path)
    for privilege in wanted:
        if privilege not in have:
            no_permission(f"{path}, {privilege}")


def require_any(state: NodeState, who: str, path: str, *wanted: str) -> None:
    """403 unless one of these privileges is held on the path."""
    have = held(state, who, path)
    if not any(privilege in have for privilege in wanted):
        no_permission(f"{path}, {'|'.join(wanted)}")


def may(state: NodeState, who: str, path: str, *wanted: str) -> bool:
    """True when one of these privileges is held on the path."""
    have = held(state, who, path)
    return any(privilege in have for privilege in wanted)


def digest_of(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def authenticate(state: NodeState, header: str) -> str:
    """The token id (`user@realm!name`) of an Authorization header; 401 for a wrong or a revoked one."""
    who, _, secret = header.partition("=")
    user, _, token_id = who.partition("!")
    token = _token(state, user, token_id)
    if token is None or not hmac.compare_digest(token.digest, digest_of(secret)):
        raise ApiError(401, "Authentication failed!")
    if 0 < token.expire <= time.time():
        raise ApiError(401, "token expired - access denied")
    return who


def _token(state: NodeState, user: str, token_id: str) -> Token | None:
    known = state.users.get(user)
    if known is None or not known.enable:
        return None
    return known.tokens.get(token_id)


def _granted(state: NodeState, kind: str, who: str, path: str) -> dict[str, int]:
    """From `/` down: entries of a deeper level replace what came from above, unless they stop short of the path."""
    roles: dict[str, bool] = {}
    for level in _levels(path):
        here = {
            entry.role: entry.propagate
            for entry in state.acl
            if entry.path == level and entry.kind == kind and entry.who == who and (entry.propagate or level == path)
        }
        if here:
            roles = {"NoAccess": here["NoAccess"]} if "NoAccess" in here else here
    known = all_roles(state)
    flags: dict[str, int] = {}
    for role, propagate in roles.items():
        for privilege in known.get(role, []):
            flags[privilege] = flags.get(privilege, 0) | int(propagate)
    return flags


def _levels(path: str) -> list[str]:
    parts = [part for part in path.split("/") if part]
    return ["/", *("/" + "/".join(parts[: n + 1]) for n in range(len(parts)))]

# SPDX-License-Identifier: MIT
"""Runs on the guest, with the tools' own Python: root's password, and each tenant's database, user and role."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

from operations.containers.milvus.remote.client import DEFAULT, ROLE, beyond, connect, kept, lacking, logs_in, words

Result = TypeVar("Result")

#: Stands in what Milvus says when it could not tell one of its proxies of a change of users or rights.
UNTOLD = "proxyID"


class Failed(Exception):
    """What could not be had, for stderr."""


def patiently(act: Callable[[], Result], deadline_s: float) -> Result:
    """Do what changes users or rights, and again while Milvus has proxies that cannot be told of it.

    The proxy of a server that was killed is one of them until its session has run out, a minute later. `act` must not
    mind that its last time has done a part of it.
    """
    deadline = time.monotonic() + deadline_s
    while True:
        try:
            return act()
        except Exception as error:
            if UNTOLD not in words(error) or time.monotonic() >= deadline:
                raise
        time.sleep(1)


def root_of(uri: str, password: str, deadline_s: float) -> Any:
    """Root, logged in with its own password: the declared one, that of the run before, or Milvus' first one."""
    deadline = time.monotonic() + deadline_s
    before = kept().get("passwords", {}).get("root")
    while True:
        refusals = []
        for candidate in dict.fromkeys([password, before, DEFAULT]):
            if candidate is None:
                continue
            try:
                client = connect(uri, "root", candidate)
            except Exception as error:
                refusals.append(words(error))
                continue
            if candidate != password:
                client.update_password("root", candidate, password)
                client.close()
                client = connect(uri, "root", password)
            return client
        if time.monotonic() >= deadline:
            raise Failed(f"nobody can log in as root: {refusals[-1]}")
        time.sleep(0.5)


def accounts(root: Any, uri: str, databases: list[str], passwords: dict[str, str]) -> list[str]:
    """A database, a user and a role for each tenant; the rights that this server does not know."""
    there, users, roles = set(root.list_databases()), set(root.list_users()), set(root.list_roles())
    unknown: list[str] = []
    for name in databases:
        if name not in there:
            root.create_database(name)
            print(f"database {name} made", flush=True)
        if name not in users:
            root.create_user(name, passwords[name])
            print(f"user {name} made", flush=True)
        elif not logs_in(uri, name, passwords[name], name):
            # Root is a superuser: the password before is not asked for.
            root.update_password(name, DEFAULT, passwords[name])
            print(f"user {name} has a new password", flush=True)
        role = ROLE + name
        if role not in roles:
            root.create_role(role)
        unknown += grant(root, role, name)
        for each in beyond(root, role, name):
            root.revoke_privilege(role, each["object_type"], each["privilege"], each["object_name"], each["db_name"])
        had = root.describe_user(name).get("roles", ())
        for other in had:
            if other != role:
                root.revoke_role(name, other)
        if role not in had:
            root.grant_role(name, role)
    return sorted(set(unknown))


def grant(root: Any, role: str, database: str) -> list[str]:
    """All rights in one database; those that the server has no word for."""
    unknown = []
    for right in lacking(root, role, database):
        kind, _, name = right.partition(".")
        try:
            root.grant_privilege(role, kind, name, "*", db_name=database)
        except Exception as error:
            if kind == "Collection" or "privilege" not in words(error).lower():
                raise
            unknown.append(right)
    return unknown


def remove(root: Any, names: list[str]) -> None:
    """Users that nobody declares, and their roles. Their databases stay."""
    there = root.list_users()
    for name in names:
        if name not in there:
            continue
        for role in root.describe_user(name).get("roles", ()):
            if role.startswith(ROLE):
                root.revoke_role(name, role)
                root.drop_role(role, force_drop=True)
        root.drop_user(name)
        print(f"user {name} removed", flush=True)

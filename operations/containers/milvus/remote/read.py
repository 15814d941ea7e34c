# SPDX-License-Identifier: MIT
"""Runs on the guest: the tools, and with them what Milvus holds of accounts and declared collections."""

from typing import Any

from operations.containers.milvus.remote.client import ROLE, beyond, connect, described, kept, lacking, logs_in, words
from operations.remote.common import answer, text


def read(uri: str, tools: str, profiles: str, databases: dict[str, list[str]]) -> dict[str, Any]:
    """`databases`: the tenants' with the names of their declared collections; `tools`: where the list of packages lies.

    `error`: why nothing of Milvus is known, empty when all of it is.
    """
    logins = kept()
    found: dict[str, Any] = {
        "tools": text(tools),
        "profiles": text(profiles),
        "digests": logins.get("digests", {}),
        "logins": {},
        "error": "",
        "version": "",
        "databases": [],
        "users": [],
        "roles": {},
        "collections": {},
    }
    passwords = logins.get("passwords", {})
    # Rights that this server's version has no word for.
    unknown = set(logins.get("unknown", []))
    try:
        import pymilvus  # noqa: F401

        root = connect(uri, "root", passwords.get("root", ""))
    except ImportError:
        return {**found, "error": "its tools are not installed"}
    except Exception as error:
        return {**found, "error": words(error)}
    try:
        found["logins"]["root"] = True
        found["version"] = root.get_server_version()
        found["databases"] = list(root.list_databases())
        found["users"] = list(root.list_users())
        roles = list(root.list_roles())
        for name in found["users"]:
            for role in root.describe_user(name).get("roles", ()):
                found["roles"].setdefault(role, empty_role())["users"].append(name)
        for database, names in databases.items():
            found["logins"][database] = logs_in(uri, database, passwords.get(database), database)
            if ROLE + database in roles:
                role = found["roles"].setdefault(ROLE + database, empty_role())
                role["missing"] = sorted(set(lacking(root, ROLE + database, database)) - unknown)
                role["excess"] = beyond(root, ROLE + database, database)
            if database in found["databases"]:
                client = connect(uri, "root", passwords["root"], database)
                there = set(client.list_collections())
                found["collections"][database] = {name: described(client, name) for name in names if name in there}
    except Exception as error:
        return {**found, "error": words(error)}
    return found


def empty_role() -> dict[str, Any]:
    """A role that nobody has; of a tenant's, also the rights that it lacks, and those that it should not have."""
    return {"users": [], "missing": [], "excess": []}


if __name__ == "__main__":
    answer(read)

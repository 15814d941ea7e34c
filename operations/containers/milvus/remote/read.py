# SPDX-License-Identifier: MIT
"""Runs on the guest: the tools, and with them what Milvus holds of accounts and declared collections."""

from typing import Any

from operations.containers.milvus.remote.client import RIGHTS, ROLE, connect, described, kept, logs_in, rights, words
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
    # Less those that this server's version has no word for.
    wanted = {"Collection.*", *(f"Global.{right}" for right in RIGHTS)} - set(logins.get("unknown", []))
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
                found["roles"].setdefault(role, {"users": [], "missing": []})["users"].append(name)
        for database, names in databases.items():
            found["logins"][database] = logs_in(uri, database, passwords.get(database), database)
            if ROLE + database in roles:
                role = found["roles"].setdefault(ROLE + database, {"users": [], "missing": []})
                had = rights(root, ROLE + database, database)
                role["missing"] = sorted(wanted - had)
            if database in found["databases"]:
                client = connect(uri, "root", passwords["root"], database)
                there = set(client.list_collections())
                found["collections"][database] = {name: described(client, name) for name in names if name in there}
    except Exception as error:
        return {**found, "error": words(error)}
    return found


if __name__ == "__main__":
    answer(read)

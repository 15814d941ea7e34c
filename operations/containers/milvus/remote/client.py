# SPDX-License-Identifier: MIT
"""Runs on the guest, with the tools' own Python: what reading and changing Milvus share."""

import contextlib
import json
import logging
import os
from typing import Any

#: How root, and the programs of the guest that only root may run, log in.
LOGINS = "/etc/gpulab/milvus.root.json"
ROLE = "gpulab_"
#: What a tenant may do in its own database, beside everything with its collections. Not `*`: that holds the making of
#: users and roles, which are not of any database.
RIGHTS = (
    "CreateCollection",
    "DropCollection",
    "DescribeCollection",
    "ShowCollections",
    "RenameCollection",
    "CreateAlias",
    "DropAlias",
    "DescribeAlias",
    "ListAliases",
)
#: Milvus' own first password.
DEFAULT = "Milvus"


def connect(uri: str, user: str, password: str, database: str = "default") -> Any:
    """A client that has logged in.

    Raises:
        Exception: the server does not answer, or refuses; of pymilvus or of gRPC.
    """
    from pymilvus import MilvusClient

    # It logs each refused call with its traceback, and our callers tell what they need in words.
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL + 1)
    client = MilvusClient(uri, token=f"{user}:{password}", db_name=database, timeout=15)
    client.list_collections()
    return client


def logs_in(uri: str, user: str, password: str | None, database: str = "default") -> bool:
    if not password:
        return False
    try:
        connect(uri, user, password, database).close()
    except Exception:
        return False
    return True


def kept() -> dict[str, Any]:
    """The logins that a run has left on the guest."""
    try:
        with open(LOGINS) as file:
            found: dict[str, Any] = json.load(file)
    except (OSError, ValueError):
        return {}
    return found


def keep(content: dict[str, Any]) -> None:
    """For root alone; in whole or not at all."""
    os.makedirs(os.path.dirname(LOGINS), exist_ok=True)
    descriptor = os.open(f"{LOGINS}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w") as file:
        os.fchmod(descriptor, 0o600)
        json.dump(content, file)
        file.flush()
        os.fsync(descriptor)
    os.rename(f"{LOGINS}.new", LOGINS)


def words(error: Exception) -> str:
    """What the server said, in one line: gRPC's errors have it in a method."""
    details = getattr(error, "details", None)
    with contextlib.suppress(Exception):
        if callable(details):
            return str(details())
    return str(getattr(error, "message", error)).splitlines()[0]


def lacking(client: Any, role: str, database: str) -> list[str]:
    """What a tenant's role lacks of all that it should be allowed in its database: `Collection.*` and the like."""
    found = client.describe_role(role_name=role, db_name=database)["privileges"]
    had = {f"{item['object_type']}.{item['privilege']}" for item in found}
    return [right for right in ("Collection.*", *(f"Global.{name}" for name in RIGHTS)) if right not in had]


def beyond(client: Any, role: str, database: str) -> list[dict[str, str]]:
    """What a tenant's role may do beyond its own database, or to users, roles and databases: no run gives it that."""
    found = []
    for name in sorted({*client.list_databases(), "*"}):
        for item in client.describe_role(role_name=role, db_name=name)["privileges"]:
            if name != database or (item["object_type"] == "Global" and item["privilege"] not in RIGHTS):
                found.append({key: str(item[key]) for key in ("object_type", "privilege", "object_name", "db_name")})
    return found


def described(client: Any, name: str) -> dict[str, Any]:
    """A collection: dimension of `vector`, its index (None: none), is it in memory, how many rows."""
    fields = {field["name"]: field for field in client.describe_collection(name)["fields"]}
    index = None
    for each in client.list_indexes(name, field_name="vector"):
        index = {key: str(value) for key, value in (client.describe_index(name, each) or {}).items()}
    return {
        "dimension": (fields.get("vector") or {}).get("params", {}).get("dim"),
        "index": index,
        "loaded": str(getattr(client.get_load_state(name)["state"], "name", "")) == "Loaded",
        "rows": int(client.get_collection_stats(name)["row_count"]),
    }

# SPDX-License-Identifier: MIT
"""Runs on the guest: make Milvus' accounts, collections and indexes as declared. What is right already is left alone.

Passwords come over stdin, and stay on the guest in a file of root's alone.
"""

import json
import sys
import time
from typing import Any

from operations.containers.milvus.remote.accounts import Failed, accounts, patiently, remove, root_of
from operations.containers.milvus.remote.client import connect, described, keep, words

#: Seconds for one answer.
TRY_S = 5


def collection(client: Any, wanted: dict[str, Any]) -> None:
    """Make it, index it, load it, each as far as it is not so."""
    from pymilvus import DataType

    name, index = wanted["name"], wanted["index"]
    if not client.has_collection(name):
        schema = client.create_schema(enable_dynamic_field=True)
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=wanted["dimension"])
        client.create_collection(name, schema=schema)
        print(f"collection {wanted['database']}.{name} made", flush=True)
    there = described(client, name)
    if there["dimension"] != wanted["dimension"]:
        # The plan refuses this, but for a server that did not answer it.
        found = there["dimension"] or "no"
        raise Failed(f"its vectors have {found} dimensions, declared are {wanted['dimension']}; it was left alone")
    had = there["index"]
    declared = {"index_type": index["index_type"], "metric_type": index["metric_type"], **index["params"]}
    same = had is not None and all(had.get(key) == str(value) for key, value in declared.items())
    if not same:
        if had is not None:
            client.release_collection(name)
            client.drop_index(name, had["index_name"])
        params = client.prepare_index_params()
        params.add_index("vector", **index)
        try:
            client.create_index(name, params)
        except Exception:
            if had is not None:
                # A collection without an index can't be searched.
                client.create_index(name, former(client, had))
                client.load_collection(name)
            raise
        print(f"collection {wanted['database']}.{name} indexed ({index['index_type']})", flush=True)
    if not same or not there["loaded"]:
        client.load_collection(name)


def answered(client: Any, name: str, limit_s: float) -> None:
    """Wait until its rows can be read. A server that has just started says before that it is well and the collection
    in memory, and reads what its own log holds; all that ask a collection wait for that.

    Raises:
        Failed: it does not answer within `limit_s` seconds.
    """
    deadline = time.monotonic() + limit_s
    while True:
        try:
            client.query(name, filter="", output_fields=["count(*)"], timeout=TRY_S)
            return
        except Exception as error:
            if time.monotonic() >= deadline:
                raise Failed(f"it does not answer within {limit_s:g} s: {words(error)}") from None
        time.sleep(0.5)


def former(client: Any, had: dict[str, str]) -> Any:
    """An index as it was."""
    about = {"field_name", "index_name", "total_rows", "indexed_rows", "pending_index_rows", "state"}
    params = {key: value for key, value in had.items() if key not in {*about, "index_type", "metric_type"}}
    found = client.prepare_index_params()
    found.add_index("vector", index_type=had["index_type"], metric_type=had["metric_type"], params=params)
    return found


def apply(order: dict[str, Any], passwords: dict[str, str]) -> None:
    uri, deadline_s = order["uri"], order["deadline_s"]
    root = patiently(lambda: root_of(uri, passwords["root"], deadline_s), deadline_s)
    content = {"uri": uri, "user": "root", "password": passwords["root"]}
    content |= {"passwords": passwords, "digests": order["digests"]}
    keep(content)
    unknown = patiently(lambda: accounts(root, uri, order["databases"], passwords), deadline_s)
    keep({**content, "unknown": unknown})
    patiently(lambda: remove(root, order["remove"]), deadline_s)
    for each in order["collections"]:
        label = f"collection {each['database']}.{each['name']}"
        try:
            client = connect(uri, "root", passwords["root"], each["database"])
            collection(client, each)
            answered(client, each["name"], order["ready_s"])
        except Exception as error:
            said = words(error)
            hint = "; the image's Milvus is built for the CPU" if "invalid index type: GPU" in said else ""
            raise Failed(f"{label}: {said}{hint}") from None


def main() -> int:
    try:
        apply(json.loads(sys.argv[1]), json.load(sys.stdin))
    except Failed as failed:
        print(failed, file=sys.stderr)
    except Exception as error:
        print(f"Milvus refuses: {words(error)}", file=sys.stderr)
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: MIT
"""Runs on the guest, with the tools' own Python: a collection as it is, its rows, and one made like it."""

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

from operations.containers.milvus.remote.client import connect, words
from operations.containers.milvus.remote.store import Refused

#: Seconds that one answer may take, and that a collection may take to be loaded, or its index to be built.
ANSWER_S, LOAD_S, BUILD_S = 120, 600, 3600
#: Rows asked for, or sent, at a time; bytes of them sent at a time, where gRPC's limit is 64 MiB.
ROWS, SENT = 1000, 8 * 1024**2
#: Vectors that are read and written back here as they were.
VECTORS = ("FLOAT_VECTOR", "BINARY_VECTOR", "FLOAT16_VECTOR", "BFLOAT16_VECTOR")
#: What a description of an index has that is not told to make one.
ABOUT_INDEX = {"total_rows", "indexed_rows", "pending_index_rows", "state"}
#: Of a collection that is being restored, before its name.
RESTORING = "gpulab_restoring_"


def all_collections(uri: str, password: str) -> list[tuple[str, str]]:
    """Databases and their collections, less what an interrupted restore has left."""
    databases = sorted(connect(uri, "root", password).list_databases())
    return [
        (database, name)
        for database in databases
        for name in sorted(connect(uri, "root", password, database).list_collections())
        if not name.startswith(RESTORING)
    ]


def description(client: Any, database: str, name: str) -> dict[str, Any]:
    """All that makes a collection but its rows.

    Raises:
        Refused: it has something that could not be restored.
    """
    from pymilvus import DataType

    found = client.describe_collection(name)
    label = f"collection {database}.{name}"
    if found.get("functions") or found.get("struct_fields") or found.get("struct_array_fields"):
        raise Refused(f"{label} has functions or structures, which this program does not know")
    fields = []
    for field in found["fields"]:
        kind = DataType(field["type"]).name
        if kind.endswith("_VECTOR") and kind not in VECTORS:
            raise Refused(f"{label}: field {field['name']} is of type {kind}, which this program does not know")
        default = field.get("default_value")
        if default is not None and not isinstance(default, bool | int | float | str):
            raise Refused(f"{label}: field {field['name']} has a default value that this program does not know")
        wanted = ("description", "is_primary", "auto_id", "is_partition_key", "is_clustering_key", "nullable")
        kept = {key: field[key] for key in wanted if field.get(key)}
        kept |= {} if default is None else {"default_value": default}
        element = field.get("element_type")
        kept |= {"element_type": DataType(element).name} if element else {}
        fields.append({"name": field["name"], "type": kind, "params": dict(field["params"]), **kept})
    indexes = [dict(client.describe_index(name, each) or {}) for each in sorted(client.list_indexes(name))]
    partitions = list(client.list_partitions(name))
    return {
        "database": database,
        "name": name,
        "description": found["description"],
        "fields": fields,
        "dynamic": bool(found["enable_dynamic_field"]),
        "shards": found["num_shards"],
        "consistency": found.get("consistency_level_name", "Bounded"),
        "properties": dict(found["properties"]),
        "partitions": partitions,
        # Servers 2.3 list those of the default database only.
        "aliases": sorted(found["aliases"]),
        "indexes": [{key: value for key, value in each.items() if key not in ABOUT_INDEX} for each in indexes],
        "loaded": loaded(client, name, partitions),
    }


def loaded(client: Any, name: str, partitions: list[str]) -> list[str]:
    """The partitions that are in memory, or on their way."""
    states = {part: client.get_load_state(name, partition_name=part)["state"] for part in partitions}
    return [part for part, state in states.items() if getattr(state, "name", "") in ("Loaded", "Loading")]


def key_of(about: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(field for field in about["fields"] if field.get("is_primary"))
    return found


def vector_of(about: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(field for field in about["fields"] if field["type"].endswith("_VECTOR"))
    return found


def types_of(about: dict[str, Any]) -> dict[str, str]:
    return {field["name"]: field["type"] for field in about["fields"]}


def parts_of(about: dict[str, Any]) -> list[str | None]:
    """Its partitions, one by one; None for all, where a field of a row says which is its."""
    keyed = any(field.get("is_partition_key") for field in about["fields"])
    return [None] if keyed else list(about["partitions"])


def stored_rows(client: Any, name: str) -> int:
    """Rows that are stored, deleted ones among them, without the collection being in memory."""
    client.flush(name, timeout=ANSWER_S)
    return int(client.get_collection_stats(name)["row_count"])


@contextlib.contextmanager
def readable(client: Any, about: dict[str, Any]) -> Iterator[None]:
    """In memory as a whole for as long as it is read; afterwards as it was.

    Milvus loads nothing without an index of the vectors. Where there is none, one that compares all is made meanwhile.
    """
    name, vector = about["name"], vector_of(about)
    bare = not any(index.get("field_name") == vector["name"] for index in about["indexes"])
    if bare:
        binary = vector["type"] == "BINARY_VECTOR"
        params = client.prepare_index_params()
        kind, metric = ("BIN_FLAT", "HAMMING") if binary else ("FLAT", "L2")
        params.add_index(vector["name"], index_type=kind, metric_type=metric)
        client.create_index(name, params, timeout=BUILD_S)
    whole = set(about["loaded"]) == set(about["partitions"])
    try:
        if whole:
            # Not loaded once more: Milvus refuses that when an index was made since.
            wait_until_loaded(client, about)
        else:
            client.load_collection(name, timeout=LOAD_S)
        yield
    finally:
        if not about["loaded"]:
            client.release_collection(name)
        elif not whole:
            client.release_partitions(name, [part for part in about["partitions"] if part not in about["loaded"]])
        if bare:
            for index in client.list_indexes(name, field_name=vector["name"]):
                client.drop_index(name, index)


def wait_until_loaded(client: Any, about: dict[str, Any]) -> None:
    """
    Raises:
        Refused: it does not get there.
    """
    deadline = time.monotonic() + LOAD_S
    while str(getattr(client.get_load_state(about["name"])["state"], "name", "")) != "Loaded":
        if time.monotonic() >= deadline:
            raise Refused(f"collection {about['database']}.{about['name']} is not in memory after {LOAD_S} s")
        time.sleep(0.5)


def literal(key: Any) -> str:
    """A key as Milvus' filters have it."""
    return json.dumps(key, ensure_ascii=False)


def count(client: Any, name: str, part: str | None = None, where: str = "") -> int:
    found = client.query(
        name,
        filter=where,
        output_fields=["count(*)"],
        partition_names=[part] if part else None,
        consistency_level="Strong",
        timeout=ANSWER_S,
    )
    return int(found[0]["count(*)"])


def batches(
    client: Any, about: dict[str, Any], part: str | None, rows: int, fields: list[str]
) -> Iterator[list[dict[str, Any]]]:
    """All rows in the order of their keys, so many at a time."""
    textual = key_of(about)["type"] == "VARCHAR"
    iterator = client.query_iterator(
        about["name"],
        batch_size=rows,
        output_fields=fields,
        partition_names=[part] if part else None,
        consistency_level="Strong",
        timeout=ANSWER_S,
    )
    try:
        while batch := iterator.next():
            if textual:
                # pymilvus 3.0 writes the last key into its filter as it is: a quote or backslash in it ends the filter.
                iterator._next_id = literal(iterator._next_id)[1:-1]
            yield list(batch)
    finally:
        iterator.close()


def given_twice(client: Any, about: dict[str, Any], part: str | None, missing: int) -> bool:
    """Do keys that were inserted more than once explain that fewer rows are read than counted?

    Milvus counts each of them, and answers with one.
    """
    name, key = about["name"], key_of(about)["name"]

    def more(keys: list[Any]) -> int:
        where = f"{key} >= {literal(keys[0])} and {key} <= {literal(keys[-1])}"
        return count(client, name, part, where) - len(keys)

    explained = 0
    for batch in batches(client, about, part, ROWS, [key]):
        keys = [row[key] for row in batch]
        beyond = more(keys)
        explained += beyond
        while beyond and len(keys) > 1:
            half = len(keys) // 2
            keys = keys[:half] if more(keys[:half]) else keys[half:]
        if beyond and not more(keys):
            return False
    return explained == missing


def make(client: Any, about: dict[str, Any], name: str) -> None:
    """An empty collection of that name, otherwise as `about` says; without indexes."""
    from pymilvus import DataType

    auto = bool(key_of(about).get("auto_id"))
    schema = client.create_schema(enable_dynamic_field=about["dynamic"], auto_id=auto, description=about["description"])
    for field in about["fields"]:
        more = {key: value for key, value in field.items() if key not in ("name", "type", "params", "auto_id")}
        if "element_type" in more:
            more["element_type"] = DataType[more["element_type"]]
        schema.add_field(field["name"], DataType[field["type"]], **field["params"], **more)
    keyed = any(field.get("is_partition_key") for field in about["fields"])
    more = {"num_partitions": len(about["partitions"])} if keyed else {}
    more |= {"properties": about["properties"]} if about["properties"] else {}
    client.create_collection(
        name, schema=schema, num_shards=about["shards"], consistency_level=about["consistency"], **more
    )
    if not keyed:
        for part in about["partitions"]:
            if not client.has_partition(name, part):
                client.create_partition(name, part)


def make_indexes(client: Any, about: dict[str, Any], name: str) -> None:
    for index in about["indexes"]:
        known = ("field_name", "index_name", "index_type", "metric_type")
        more = {key: value for key, value in index.items() if key not in known}
        params = client.prepare_index_params()
        given = {"metric_type": index["metric_type"]} if index.get("metric_type") else {}
        params.add_index(
            index["field_name"],
            index_type=index.get("index_type", ""),
            index_name=index["index_name"],
            **given,
            **({"params": more} if more else {}),
        )
        client.create_index(name, params, timeout=BUILD_S)


def send(client: Any, name: str, part: str | None, rows: list[dict[str, Any]]) -> list[Any]:
    """Insert; the rows' keys."""
    more = {"partition_name": part} if part else {}
    done = client.insert(name, rows, timeout=ANSWER_S, **more)
    if done["insert_count"] != len(rows):
        raise Refused(f"{name}: {done['insert_count']} of {len(rows)} rows were taken")
    return list(done["ids"])


def by_key(client: Any, about: dict[str, Any], name: str, keys: list[Any]) -> dict[Any, dict[str, Any]]:
    """Whole rows."""
    key = key_of(about)["name"]
    if not keys:
        return {}
    found = client.query(
        name, filter=f"{key} in {literal(keys)}", output_fields=["*"], consistency_level="Strong", timeout=ANSWER_S
    )
    return {row[key]: dict(row) for row in found}


def said(error: Exception) -> str:
    return str(error) if isinstance(error, Refused) else words(error)

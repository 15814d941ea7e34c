# SPDX-License-Identifier: MIT
"""Runs on the guest: what collections answer to fixed questions, and whether they still answer the same."""

import time
from typing import Any

from operations.containers.milvus.remote.client import connect
from operations.containers.milvus.remote.rows import (
    ANSWER_S,
    by_key,
    count,
    description,
    readable,
    said,
    types_of,
    vector_of,
)
from operations.containers.milvus.remote.store import decoded, encoded, same

#: Rows that are asked for by their keys, and how many of their vectors are searched with.
KEYS, SEARCHES, HITS = 20, 5, 10
#: Hits of a search that may be others: an index that is built anew is another approximation.
OTHER_HITS = 1
#: By how much a distance may differ, of itself.
DISTANCE = 1e-3
#: Seconds.
SETTLED_S = 30
#: How thorough a search is, for indexes that want to be told.
THOROUGH = {
    "HNSW": {"ef": 128},
    "IVF_FLAT": {"nprobe": 16},
    "IVF_SQ8": {"nprobe": 16},
    "IVF_PQ": {"nprobe": 16},
    "BIN_IVF_FLAT": {"nprobe": 16},
    "GPU_IVF_FLAT": {"nprobe": 16},
    "GPU_IVF_PQ": {"nprobe": 16},
    "DISKANN": {"search_list": 100},
    "SCANN": {"nprobe": 16, "reorder_k": 100},
}
#: What of a description must be the same. Aliases and partitions that users add meanwhile are no loss.
FIXED = ("fields", "dynamic", "indexes")


def answers(client: Any, about: dict[str, Any], keys: list[Any]) -> dict[str, Any]:
    """Of a collection that is in memory: how many rows, the rows of those keys, and what is near to some of them."""
    name, types, vector = about["name"], types_of(about), vector_of(about)
    rows = {str(key): encoded(row, types) for key, row in by_key(client, about, name, keys).items()}
    index = next((each for each in about["indexes"] if each["field_name"] == vector["name"]), None)
    searches = {}
    for key in keys[:SEARCHES] if index is not None else []:
        if str(key) in rows:
            wanted = decoded(rows[str(key)], types)[vector["name"]]
            searches[str(key)] = near(client, name, vector["name"], wanted, index or {})
    return {"rows": count(client, name), "by_key": rows, "searches": searches}


def near(client: Any, name: str, field: str, vector: Any, index: dict[str, Any]) -> list[list[Any]]:
    """The nearest rows: key and distance."""
    found = client.search(
        name,
        data=[vector],
        anns_field=field,
        limit=HITS,
        search_params={"metric_type": index.get("metric_type", "L2"), "params": THOROUGH.get(index["index_type"], {})},
        consistency_level="Strong",
        timeout=ANSWER_S,
    )
    return [[hit.id if hasattr(hit, "id") else hit["id"], float(hit["distance"])] for hit in found[0]]


def answer_differences(label: str, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What a collection answers otherwise than before, a line each. More rows are no difference: users go on."""
    lines = []
    if now["rows"] < before["rows"]:
        lines.append(f"{label}: {now['rows']} rows, before {before['rows']}")
    for key, row in before["by_key"].items():
        there = now["by_key"].get(key)
        if there is None:
            lines.append(f"{label}: no row of key {key} any more")
        elif not same(there, row):
            fields = [name for name in row if not same(there.get(name), row[name])] or ["more fields than before"]
            lines.append(f"{label}: the row of key {key} differs in {', '.join(fields)}")
    for key, hits in before["searches"].items():
        if key in now["searches"] and (why := unlike(hits, now["searches"][key])):
            lines.append(f"{label}: the search for what is near {key} {why}")
        elif key not in now["searches"]:
            lines.append(f"{label}: nothing answers the search for what is near {key}")
    return lines


def unlike(before: list[list[Any]], now: list[list[Any]]) -> str:
    """How the hits of a search differ; empty: they are the same, but for ties and what is near the end."""
    if len(now) < len(before):
        return f"has {len(now)} hits, before {len(before)}"
    edge = [distance for _, distance in before[-1:]]
    there = {str(key): distance for key, distance in now}
    # Rows as far away as the last one may change places with those that were not among the hits.
    other = [key for key, distance in before if str(key) not in there and not close(distance, edge[0])]
    if len(other) > OTHER_HITS:
        return f"has {len(other)} other hits of {len(before)}"
    moved = [key for key, distance in before if str(key) in there and not close(distance, there[str(key)])]
    return f"has other distances ({moved[0]} and others)" if moved else ""


def close(one: float, other: float) -> bool:
    return abs(one - other) <= DISTANCE * max(abs(one), abs(other)) + 1e-5


def recorded(login: dict[str, Any], manifest: dict[str, Any]) -> dict[str, Any]:
    """What the collections of a backup answer now, by `DATABASE.COLLECTION`; None: it is gone."""
    found: dict[str, Any] = {}
    for kept in manifest["collections"]:
        label = f"{kept['database']}.{kept['name']}"
        client = connect(login["uri"], "root", login["password"], kept["database"])
        if not client.has_collection(kept["name"]):
            found[label] = None
            continue
        about = description(client, kept["database"], kept["name"])
        fixed = {key: about[key] for key in FIXED} | {"aliases": about["aliases"], "partitions": about["partitions"]}
        if kept["unreadable"]:
            found[label] = {"about": fixed, "rows": 0, "by_key": {}, "searches": {}}
            continue
        with readable(client, about):
            found[label] = {"about": fixed, **answers(client, about, kept["sample"])}
    return found


def compared(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two records, a line each."""
    lines = []
    for label, was in before.items():
        there = now.get(label)
        if was is None:
            continue
        if there is None:
            lines.append(f"{label}: the collection is gone")
            continue
        changed = [key for key in FIXED if not holds(there["about"][key], was["about"][key])]
        lines += [f"{label}: its {key} differ" for key in changed]
        for key in ("aliases", "partitions"):
            gone = sorted(set(was["about"][key]) - set(there["about"][key]))
            lines += [f"{label}: no {key} {', '.join(gone)} any more"] if gone else []
        lines += answer_differences(label, was, there)
    return lines


def holds(now: Any, before: Any) -> bool:
    """Is all of `before` in `now`? A newer server may have more to say of the same."""
    if isinstance(before, dict):
        return isinstance(now, dict) and all(key in now and holds(now[key], before[key]) for key in before)
    if isinstance(before, list):
        return isinstance(now, list) and len(now) == len(before) and all(map(holds, now, before))
    return same(now, before)


def compare_until(login: dict[str, Any], manifest: dict[str, Any], before: dict[str, Any], seconds: float) -> list[str]:
    """What differs. A server that has just started is given so many seconds to answer at all.

    From then on it has `SETTLED_S` to answer as before.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            lines = compared(before, recorded(login, manifest))
            deadline = min(deadline, time.monotonic() + SETTLED_S)
        except Exception as error:
            lines = [f"the server does not answer: {said(error)}"]
        if not lines or time.monotonic() >= deadline:
            return lines
        time.sleep(1)

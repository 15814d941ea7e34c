# SPDX-License-Identifier: MIT
"""What Milvus should hold: databases, users, roles, collections, indexes; and how it differs from what it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from inventory import GpulabError
from inventory.access import milvus_name
from inventory.services import GpuCagra, GpuIvfFlat, Hnsw, IndexProfile, Milvus

#: The role of a tenant; a user is ours when it has one.
ROLE = "gpulab_"


def index_params(index: IndexProfile) -> dict[str, Any]:
    """What `create_index` is told, in Milvus' own words."""
    params: dict[str, Any] = {}
    match index:
        case GpuCagra():
            params = {
                "intermediate_graph_degree": index.intermediate_graph_degree,
                "graph_degree": index.graph_degree,
                "build_algo": index.build_algo,
                "cache_dataset_on_device": str(index.cache_dataset_on_device).lower(),
                "adapt_for_cpu": str(index.adapt_for_cpu).lower(),
            }
        case GpuIvfFlat():
            params = {"nlist": index.nlist}
        case Hnsw():
            params = {"M": index.m, "efConstruction": index.ef_construction}
    return {"index_type": index.type, "metric_type": index.metric, "params": params}


def search_params(index: IndexProfile) -> dict[str, Any]:
    """What a search over such an index is told."""
    match index:
        case GpuCagra(ef=int() as ef):
            return {"ef": ef}
        case GpuCagra():
            return {"itopk_size": index.itopk_size}
        case GpuIvfFlat():
            return {"nprobe": index.nprobe}
        case Hnsw():
            return {"ef": index.ef}
        case _:
            return {}


def profiles(service: Milvus) -> dict[str, Any]:
    """The named ways to index, for users' programs."""
    return {
        name: {**index_params(index), "search": search_params(index), "top_k": index.top_k}
        for name, index in sorted(service.indexes.items())
    }


def collections(service: Milvus) -> list[dict[str, Any]]:
    """The declared collections with all that makes them."""
    return [
        {
            "database": milvus_name(each.tenant),
            "name": each.name,
            "dimension": each.dimension,
            "index": index_params(service.indexes[each.index]),
        }
        for each in service.collections
    ]


def differences(
    found: Mapping[str, Any],
    users: Sequence[str],
    digests: Mapping[str, str],
    wanted: Sequence[Mapping[str, Any]],
    where: str,
) -> list[str]:
    """What has to change, a line each.

    + found: a `MilvusFacts` fact of a server that answers
    + users: the tenants' databases and users
    + digests: of each password, root's included, its keyed digest
    + wanted: `collections()`
    + where: name of the guest, for errors

    Raises:
        GpulabError: a collection is of another shape; no run changes that, since its rows would be lost.
    """
    lines = [
        f"user {name}: {'new password' if name in found['users'] else 'absent -> its own database'}"
        for name in ("root", *users)
        if not found["logins"].get(name) or found["digests"].get(name) != digests[name]
    ]
    lines += [f"database {name}: absent -> empty" for name in users if name not in found["databases"]]
    for name in users:
        role = found["roles"].get(ROLE + name)
        if role is None:
            lines.append(f"role {ROLE}{name}: absent -> all rights in database {name}")
        else:
            lines += [f"role {ROLE}{name}: + {right}" for right in role["missing"]]
            lines += [
                f"role {ROLE}{name}: - {each['object_type']}.{each['privilege']} of {each['object_name']} in database "
                f"{each['db_name']}"
                for each in role["excess"]
            ]
            lines += [f"role {ROLE}{name}: + user {name}"] if name not in role["users"] else []
        others = [other for other, each in found["roles"].items() if name in each["users"] and other != ROLE + name]
        lines += [f"user {name}: - role {other}" for other in sorted(others)]
    for each in wanted:
        lines += _of_collection(found["collections"].get(each["database"], {}).get(each["name"]), each, where)
    return lines


def _of_collection(there: Mapping[str, Any] | None, wanted: Mapping[str, Any], where: str) -> list[str]:
    label = f"collection {wanted['database']}.{wanted['name']}"
    if there is None:
        return [f"{label}: absent -> {wanted['dimension']} dimensions, {wanted['index']['index_type']}"]
    if there["dimension"] != wanted["dimension"]:
        raise GpulabError(
            f"{where}: milvus: {label}: its vectors have {there['dimension'] or 'no'} dimensions, "
            f"declared are {wanted['dimension']}",
            f"It holds {there['rows']} rows, and nothing of it was changed.",
            "declare it under another name and move the rows; or, if they can go, drop it as its tenant and deploy",
        )
    changed = index_changes(there["index"], wanted["index"])
    if changed:
        return [f"{label}: index made anew ({', '.join(changed)}); the rows stay"]
    return [] if there["loaded"] else [f"{label}: not in memory -> loaded"]


def index_changes(there: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> list[str]:
    """`key old -> new` of each parameter; Milvus tells all of them as text."""
    if there is None:
        return [f"absent -> {wanted['index_type']}"]
    keys = {"index_type": wanted["index_type"], "metric_type": wanted["metric_type"], **wanted["params"]}
    changed = {key: value for key, value in keys.items() if there.get(key) != str(value)}
    return [f"{key} {there.get(key, 'default')} -> {value}" for key, value in changed.items()]


def undeclared(found: Mapping[str, Any], users: Sequence[str]) -> list[str]:
    """Users that a run of gpulab made and that nobody declares any more."""
    ours = {user for role, each in found["roles"].items() if role.startswith(ROLE) for user in each["users"]}
    return sorted(ours - set(users) - {"root"})

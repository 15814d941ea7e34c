# SPDX-License-Identifier: MIT
"""Milvus' declared indexes in the words that the server uses for them."""

from __future__ import annotations

from typing import Any

from inventory.services import IndexProfile, Milvus

#: Key of a profile to the server's name of it: of what an index is built with, and of what it is searched with.
BUILT: dict[str, dict[str, str]] = {
    "GPU_CAGRA": {
        name: name
        for name in (
            "intermediate_graph_degree",
            "graph_degree",
            "build_algo",
            "cache_dataset_on_device",
            "adapt_for_cpu",
        )
    },
    "GPU_IVF_FLAT": {"nlist": "nlist"},
    "GPU_BRUTE_FORCE": {},
    "HNSW": {"m": "M", "ef_construction": "efConstruction"},
}
#: Numbers of a vector where no collection says it: those of the usual text embeddings.
DIMENSION = 768
SEARCHED = {"GPU_CAGRA": "itopk_size", "GPU_IVF_FLAT": "nprobe", "HNSW": "ef"}


def built(profile: IndexProfile) -> dict[str, str]:
    """Every parameter of the index, as text."""
    values = profile.model_dump()
    params = {name: values[key] for key, name in BUILT[profile.type].items()}
    words = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in params.items()}
    return {"index_type": profile.type, "metric_type": profile.metric, **words}


def searched(profile: IndexProfile) -> dict[str, Any]:
    """The parameters of a search over it. A graph that is adapted for the CPU is searched as the CPU's own is."""
    values = profile.model_dump()
    if values.get("adapt_for_cpu"):
        return {"ef": values["ef"]}
    key = SEARCHED.get(profile.type)
    return {} if key is None else {key: values[key]}


def to_be_searched(service: Milvus, tenant: str) -> dict[str, dict[str, Any]]:
    """A tenant's declared collections: what each of them is searched with, and its `dimension`."""
    found = {}
    for each in service.collections:
        if each.tenant == tenant:
            profile = service.indexes[each.index]
            found[each.name] = {
                "dimension": each.dimension,
                "metric": profile.metric,
                "top_k": profile.top_k,
                "search": searched(profile),
            }
    return found


def to_be_measured(service: Milvus) -> dict[str, Any]:
    """The index of the first declared collection, else the first that is named: how it is built and searched, and the
    `dimension` of its vectors.
    """
    first = service.collections[0] if service.collections else None
    profile = service.indexes[first.index] if first is not None else next(iter(service.indexes.values()))
    return {
        "dimension": first.dimension if first is not None else DIMENSION,
        "index": built(profile),
        "search": searched(profile),
    }


def shown(service: Milvus) -> dict[str, dict[str, Any]]:
    """What the guest's file tells users of each profile: the index, its parameters as text, and how to search it."""
    return {
        name: {"index": built(profile), "search": searched(profile), "top_k": profile.top_k}
        for name, profile in service.indexes.items()
    }

# SPDX-License-Identifier: MIT
"""What an inventory may say of services, their shares of the card and the way to them, and what its reader gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import inventory
from inventory import budgets
from inventory.cards import RTX_A4000
from tests.unit.test_inventory import GUEST, IMAGE, lab_file, refused

MILVUS: dict[str, Any] = {"image": IMAGE}
TENANTS = [{"name": "astro", "memory_limit_mib": 4096}, {"name": "ml", "services": ["ollama"]}]
CAGRA = {"type": "GPU_CAGRA"}


def guest(**keys: Any) -> dict[str, Any]:
    return {"gpu01": {**GUEST, **keys}}


def milvus(**keys: Any) -> dict[str, Any]:
    return {"services": {"milvus": {**MILVUS, **keys}}, "tenants": TENANTS}


def index(**keys: Any) -> dict[str, Any]:
    return milvus(indexes={"sky": keys})


def ollama(**keys: Any) -> dict[str, Any]:
    return {"services": {"ollama": {"image": IMAGE, **keys}}}


def pytorch(**keys: Any) -> dict[str, Any]:
    return {"services": {"pytorch": {"image": IMAGE, **keys}}, "tenants": TENANTS}


COLLECTION = {"name": "spectra", "tenant": "astro", "dimension": 128, "index": "sky"}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (index(**CAGRA, metric="COSINE"), "GPU indexes know no COSINE; normalise the vectors and use IP"),
        (index(**CAGRA, top_k=1025), "less than or equal to 1024"),
        (index(**CAGRA, graph_degree=128), "expected `graph_degree` below `intermediate_graph_degree` (128), got 128"),
        (index(**CAGRA, adapt_for_cpu=True), "expected `ef` with `adapt_for_cpu`, and not without"),
        (index(**CAGRA, ef=64), "expected `ef` with `adapt_for_cpu`, and not without"),
        (index(**CAGRA, itopk_size=96), "expected `itopk_size` a power of two and at least `top_k` (100), got 96"),
        (index(**CAGRA, itopk_size=64), "expected `itopk_size` a power of two and at least `top_k` (100), got 64"),
        (index(**CAGRA, nlist=64), "nlist = 64: unknown key"),
        (index(type="GPU_IVF_FLAT", nlist=8, nprobe=16), "expected `nprobe` at most `nlist` (8), got 16"),
        (index(type="GPU_BRUTE_FORCE", metric="COSINE"), "normalise the vectors and use IP"),
        (index(type="HNSW", ef=64), "expected `ef` at least `top_k` (100), got 64"),
        (index(type="DISKANN"), "indexes.sky"),
        (milvus(collections=[COLLECTION]), "`index` of collection spectra among `indexes` (none), got sky"),
        (
            milvus(indexes={"sky": CAGRA}, collections=[{**COLLECTION, "tenant": "ml"}]),
            "services.milvus.collections.0.tenant = 'ml': expected a tenant that may use milvus (astro)",
        ),
        (
            milvus(indexes={"sky": CAGRA}, collections=[COLLECTION, COLLECTION]),
            "each collection of a tenant once; got spectra of astro twice",
        ),
        (milvus(port=9091), "`metrics_port` other than `port` (9091)"),
        (milvus(pool_init_mib=2561), "services.milvus.pool_init_mib = 2561: expected at most 2560"),
        ({**index(**CAGRA), "gpu": None}, "services.milvus.indexes.sky.type = 'GPU_CAGRA': expected HNSW"),
        ({**ollama(), "gpu": None}, "services.ollama: expected `gpu` beside it"),
        (ollama(kv_cache_type="q8_0", flash_attention=False), "`flash_attention` beside `kv_cache_type` q8_0"),
        (ollama(models=["tiny", "tiny:latest"]), "each of `models` once; got tiny:latest twice"),
        (ollama(models=[{"name": "own", "gguf": "/srv/data/own.gguf"}]), "`gguf` and `gguf_sha256` together"),
        (
            ollama(models=[{"name": "own", "gguf": "/root/own.gguf", "gguf_sha256": 64 * "a"}]),
            "services.ollama.models.0.gguf = '/root/own.gguf': expected a file below /srv/data/",
        ),
        (ollama(keep_alive="5 minutes"), "keep_alive"),
        ({"services": {"pytorch": {"image": IMAGE}}}, "services.pytorch: expected `tenants` beside it"),
        (
            {**pytorch(), "engine": {"kind": "podman"}},
            "services.pytorch: expected `engine.kind` docker beside it, got podman",
        ),
        (pytorch(time_limit_h="inf"), "services.pytorch.time_limit_h"),
        (
            pytorch(profiles={"mine": {"CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "0=16G", "PYTHONPATH": "/workspace"}}),
            "expected no CUDA_MPS_PINNED_DEVICE_MEM_LIMIT, PYTHONPATH in `profiles.mine`: gpulab sets it",
        ),
        (
            {"services": {"ollama": {"image": IMAGE}, "milvus": {**MILVUS, "port": 11434}}},
            "services.milvus.port = 11434: expected another than services.ollama.port",
        ),
        ({**ollama(), "tenants": [{"name": "ml", "services": ["milvus"]}]}, "tenants.0.services: milvus: expected of"),
        (
            {**ollama(memory_budget_mib=12288), "tenants": TENANTS},
            "memory budgets: services.ollama 12288 + tenants.astro 4096 = 16384 MiB; expected at most 16376 MiB",
        ),
        (
            {**ollama(), "nvidia": {"mps": {"pinned_memory_limit_mib": 4096}}},
            "services.ollama.memory_budget_mib = 8192: expected at most 4096, the value of nvidia.mps",
        ),
        ({"access": {"certificate": "lab.pem"}}, "`certificate` and `key` together"),
        ({"access": {"allow_from": ["192.0.2.0/33"]}}, "access.allow_from.0"),
        ({"python_index": {"url": "http://index.example/simple"}}, "an https:// `url`"),
        (
            {"python_index": {"url": "https://index.example/simple", "ca": "/nowhere/ca.pem"}},
            "gpu01: python_index.ca: /nowhere/ca.pem: No such file or directory; expected a PEM file",
        ),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, keys: dict[str, Any], words: str) -> None:
    assert words in refused(lab_file(tmp_path, guests=guest(**keys)))


def test_shares_fill_the_card_to_the_last_mib(tmp_path: Path) -> None:
    services = {"ollama": {"image": IMAGE}, "milvus": MILVUS, "pytorch": {"image": IMAGE}}
    tenants = [{"name": "astro", "memory_limit_mib": 16376 - 8192 - 3072}, {"name": "ml"}]

    found = inventory.load(lab_file(tmp_path, guests=guest(services=services, tenants=tenants))).guests["gpu01"]

    assert sum(share.memory_mib for share in budgets.budgets(found)) == RTX_A4000.memory_mib


def test_what_a_share_comes_to() -> None:
    assert budgets.ollama_overhead_bytes(8192, 16376) == 8184 * 2**20
    assert budgets.milvus_pool_mib(3072) == 2560
    assert budgets.torch_memory_fraction(4096, 16384, workers=2) == (2048 - 512) / 16384
    assert budgets.torch_memory_fraction(512, 16384, workers=2) == 0
    assert budgets.pinned_limit(4096, processes=2) == "0=2048M"


def test_milvus_needs_no_gpu_with_an_index_of_the_cpu(tmp_path: Path) -> None:
    keys = index(type="HNSW") | {"gpu": None, "tenants": [{"name": "astro"}]}

    found = inventory.load(lab_file(tmp_path, guests=guest(**keys))).guests["gpu01"]

    assert found.services.served().keys() == {"milvus"}

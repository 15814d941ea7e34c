# SPDX-License-Identifier: MIT
"""Every endpoint and answer of the front against the official schema of the API, where that file is at hand."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rehearsal.pve.testing import FakeLab

Schema = dict[str, dict[str, Any]]


def _schema_file() -> Path | None:
    chosen = os.environ.get("GPULAB_PVE_SCHEMA")
    beside = Path(__file__).resolve().parents[3] / "shared" / "data" / "pve-api-9.1.json.gz"
    path = Path(chosen) if chosen else beside
    return path if path.is_file() else None


@pytest.fixture(scope="module")
def schema() -> Schema:
    """`{path: {method: description}}`; the data is Proxmox' own and is not part of this repository."""
    path = _schema_file()
    if path is None:
        pytest.skip("no API viewer data; set GPULAB_PVE_SCHEMA to a pve-api-9.x.json.gz (pve-docs apidata.js) to check")
    with gzip.open(path) as file:
        trees = json.load(file)
    found: Schema = {}

    def walk(node: dict[str, Any]) -> None:
        found[node["path"]] = node.get("info", {})
        for child in node.get("children", []):
            walk(child)

    for tree in trees:
        walk(tree)
    return found


@pytest.fixture(scope="module")
def lab() -> Iterator[FakeLab]:
    with FakeLab() as lab:
        lab.add_vm(101, running=True, memory="2048", scsi0="local-lvm:vm-101-disk-0,size=32G", agent="enabled=1")
        lab.root().cluster.mapping.pci.post(id="a4000", map="node=pve1,path=0000:01:00,id=10de:24b0,iommugroup=14")
        lab.add_image()
        lab.add_backup(101, 1_700_000_000, notes="kept", protected=True)
        lab.root().storage("local").put(**{"prune-backups": "keep-last=2"})
        lab.root().cluster.backup.post(id="nightly", schedule="03:00", vmid="101", storage="local", protected=1)
        yield lab


def test_every_route_is_in_the_schema(schema: Schema, lab: FakeLab) -> None:
    routes = {(route.method, route.template) for route, _ in lab.emulator.routes}
    unknown = {(method, path) for method, path in routes if method not in schema.get(path, {})}
    assert unknown == set()


READS = (
    "/version",
    "/nodes",
    "/cluster/resources",
    "/cluster/nextid",
    "/cluster/mapping/pci",
    "/cluster/mapping/pci/a4000",
    "/nodes/pve1/status",
    "/nodes/pve1/hardware/pci",
    "/nodes/pve1/storage",
    "/nodes/pve1/storage/local/status",
    "/nodes/pve1/storage/local/content",
    "/nodes/pve1/storage/local/content/local:backup/vzdump-qemu-101-2023_11_14-22_13_20.vma.zst",
    "/nodes/pve1/storage/local/prunebackups",
    "/cluster/backup",
    "/cluster/backup/nightly",
    "/cluster/backup-info/not-backed-up",
    "/nodes/pve1/qemu",
    "/nodes/pve1/qemu/101/config",
    "/nodes/pve1/qemu/101/pending",
    "/nodes/pve1/qemu/101/status/current",
    "/nodes/pve1/qemu/101/cloudinit",
    "/nodes/pve1/qemu/101/snapshot",
    "/nodes/pve1/tasks",
    "/nodes/pve1/certificates/info",
    "/access/users",
    "/access/roles",
    "/access/acl",
    "/storage",
)
# Where real nodes differ from their own schema: the next id is text, and a mapping without description has none.
LOOSE = {("/cluster/nextid", ""), ("/cluster/mapping/pci", "description")}


@pytest.mark.parametrize("path", READS)
def test_answer_has_the_required_fields_of_the_schema(schema: Schema, lab: FakeLab, path: str) -> None:
    found = lab.emulator.find("GET", path)
    assert found is not None
    returns = schema[found[0].template]["GET"]["returns"]
    problems = list(_problems(returns, lab.root()(path.strip("/")).get(), ""))
    assert [problem for problem in problems if (path, problem[0]) not in LOOSE] == []


def _problems(returns: dict[str, Any], value: Any, where: str) -> Iterator[tuple[str, str]]:
    """(field, complaint) of everything that the schema requires or types otherwise."""
    kind = returns.get("type")
    if kind == "array":
        if not isinstance(value, list):
            yield where, f"expected a list, got {value!r}"
            return
        for entry in value:
            yield from _problems(returns.get("items", {}), entry, where)
    elif kind == "object":
        if not isinstance(value, dict):
            yield where, f"expected an object, got {value!r}"
            return
        for name, part in returns.get("properties", {}).items():
            if name in value:
                yield from _problems(part, value[name], name)
            elif not part.get("optional") and "[n]" not in name:
                yield name, "missing"
    elif kind == "integer" and not (isinstance(value, int) and not isinstance(value, bool)):
        yield where, f"expected an integer, got {value!r}"
    elif kind == "number" and not isinstance(value, int | float):
        yield where, f"expected a number, got {value!r}"
    elif kind == "boolean" and value not in (0, 1):
        yield where, f"expected 0 or 1, got {value!r}"
    if "enum" in returns and str(value) not in [str(choice) for choice in returns["enum"]]:
        yield where, f"expected one of {returns['enum']}, got {value!r}"

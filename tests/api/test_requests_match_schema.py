# SPDX-License-Identifier: MIT
"""What gpulab asks of the API, against the API's own schema: of PVE 9 in fakepve, of PVE 8.4 where its file is."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakepve import schema as fakepve

import inventory
from operations import step
from operations.proxmox import client as client_module
from operations.proxmox import mapping, vm
from operations.proxmox.client import Client
from rehearsal.pve.testing import Exchange

from .conftest import Bench, make_bench
from .test_mapping_and_access import CARD

#: (method, path) of every request that the scenarios below have to make, ids left open.
ASKED = {
    ("GET", "/version"),
    ("GET", "/access/permissions"),
    ("GET", "/nodes/{node}/status"),
    ("GET", "/nodes/{node}/storage"),
    ("GET", "/nodes/{node}/storage/{storage}/content"),
    ("POST", "/nodes/{node}/storage/{storage}/download-url"),
    ("GET", "/nodes/{node}/tasks"),
    ("GET", "/nodes/{node}/tasks/{upid}/status"),
    ("GET", "/nodes/{node}/tasks/{upid}/log"),
    ("GET", "/nodes/{node}/qemu"),
    ("POST", "/nodes/{node}/qemu"),
    ("GET", "/nodes/{node}/qemu/{vmid}/config"),
    ("PUT", "/nodes/{node}/qemu/{vmid}/config"),
    ("PUT", "/nodes/{node}/qemu/{vmid}/resize"),
    ("GET", "/nodes/{node}/qemu/{vmid}/status/current"),
    ("GET", "/nodes/{node}/qemu/{vmid}/agent/file-read"),
    ("GET", "/cluster/mapping/pci"),
    ("POST", "/cluster/mapping/pci"),
    ("GET", "/cluster/mapping/pci/{id}"),
    ("PUT", "/cluster/mapping/pci/{id}"),
}
#: Requests of code that needs a running guest or a rebuild to be reached, as it writes them.
DECLARED: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("GET", "/nodes/pve1/qemu/101/pending", {}),
    ("GET", "/nodes/pve1/qemu/101/snapshot", {}),
    ("GET", "/nodes/pve1/qemu/101/config", {"snapshot": "before"}),
    ("GET", "/nodes/pve1/qemu/101/config", {"current": 1}),
    (
        "PUT",
        "/nodes/pve1/qemu/101/config",
        {"scsi0": "local-lvm:vm-101-disk-0,size=64G,discard=on", "digest": 40 * "0"},
    ),
    ("PUT", "/nodes/pve1/qemu/101/cloudinit", {}),
    ("POST", "/nodes/pve1/qemu/101/status/start", {}),
    ("POST", "/nodes/pve1/qemu/101/status/shutdown", {"forceStop": 1, "timeout": 120}),
    ("PUT", "/nodes/pve1/qemu/101/config", {"delete": "hostpci1,net1", "digest": 40 * "0"}),
    ("PUT", "/nodes/pve1/qemu/101/config", {"description": "marker", "protection": 0, "digest": 40 * "0"}),
    ("POST", "/nodes/pve1/qemu/101/config", {"scsi0": "local-lvm:0,import-from=local:import/a.qcow2,discard=on"}),
    ("PUT", "/nodes/pve1/qemu/101/config", {"scsi30": "local-lvm:vm-101-disk-3", "digest": 40 * "0"}),
    ("PUT", "/nodes/pve1/qemu/101/resize", {"disk": "scsi0", "size": "64G", "digest": 40 * "0"}),
    ("GET", "/nodes/pve1/storage/local-lvm/status", {}),
    ("GET", "/nodes/pve1/storage/local-lvm/content", {"content": "images", "vmid": 101}),
    # A backup, its restore into a spare id, and the jobs, which go through pvesh on the node.
    (
        "POST",
        "/nodes/pve1/vzdump",
        {
            "vmid": "101",
            "storage": "local",
            "mode": "snapshot",
            "compress": "zstd",
            "protected": 0,
            "notes-template": "gpulab: {{guestname}}",
            "prune-backups": "keep-daily=7,keep-weekly=4",
        },
    ),
    ("GET", "/nodes/pve1/storage/local/content", {"content": "backup", "vmid": 101}),
    ("GET", "/nodes/pve1/storage/local/status", {}),
    ("GET", "/cluster/resources", {"type": "vm"}),
    (
        "POST",
        "/nodes/pve1/qemu",
        {
            "vmid": 901,
            "archive": "local:backup/vzdump-qemu-101-2026_11_22-03_00_00.vma.zst",
            "storage": "local-lvm",
            "unique": 1,
            "name": "gpu01-restored",
            "description": "Restored by gpulab.",
            "tags": "gpulab;gpulab-restore",
            "onboot": 0,
            "protection": 0,
            "memory": 2048,
        },
    ),
    ("POST", "/nodes/pve1/qemu/901/status/stop", {}),
    ("DELETE", "/nodes/pve1/qemu/901", {"purge": 1}),
    ("GET", "/cluster/backup", {}),
    *(
        (
            method,
            path,
            {
                **more,
                "comment": "gpulab: gpu01",
                "compress": "zstd",
                "enabled": "1",
                "mode": "snapshot",
                "node": "pve1",
                "prune-backups": "keep-daily=7,keep-weekly=4",
                "schedule": "mon..fri 22:00",
                "storage": "local",
                "vmid": "101",
            },
        )
        for method, path, more in (
            ("POST", "/cluster/backup", {"id": "gpulab-gpu01"}),
            ("PUT", "/cluster/backup/gpulab-gpu01", {"delete": "all,pool"}),
        )
    ),
    ("DELETE", "/cluster/backup/gpulab-gpu01", {}),
    ("GET", "/nodes/pve1/tasks", {"source": "active", "vmid": "101"}),
    ("GET", "/nodes/pve1/tasks", {"source": "all", "typefilter": "qmcreate", "vmid": "101"}),
    ("GET", "/cluster/resources", {"type": "vm"}),
    ("GET", "/cluster/nextid", {"vmid": 901}),
    (
        "POST",
        "/nodes/pve1/qemu",
        {
            "vmid": 901,
            "name": "gpu01-keeper",
            "memory": "16",
            "onboot": "0",
            "protection": "1",
            "tags": "gpulab;gpulab-keeper",
            "description": "gpulab-keeper guest=gpu01 vmid=101 data=scsi1=local-lvm:vm-101-disk-2@214748364800",
        },
    ),
    (
        "POST",
        "/nodes/pve1/qemu/101/move_disk",
        {
            "disk": "scsi1",
            "target-vmid": 901,
            "target-disk": "scsi1",
            "digest": 40 * "0",
            "target-digest": 40 * "1",
        },
    ),
    ("PUT", "/nodes/pve1/qemu/901/config", {"scsi1": "local-lvm:vm-901-disk-0,discard=on", "digest": 40 * "0"}),
    ("DELETE", "/nodes/pve1/qemu/101", {"purge": 1}),
)
_CONFIG = "/nodes/{node}/qemu/{vmid}/config"
#: What PVE 8.4 does not know though 9 does: (path, parameter), from both API viewers.
ONLY_9 = {
    *(("/nodes/{node}/qemu", name) for name in ("ha-managed", "intel-tdx", "allow-ksm")),
    *((_CONFIG, name) for name in ("intel-tdx", "allow-ksm")),
    *(("/nodes/{node}/qemu/{vmid}/agent/file-read", name) for name in ("count", "decode", "offset")),
    ("/nodes/{node}/qemu/{vmid}/status/start", "with-conntrack-state"),
}
#: The same inside a value: (family of keys, option).
ONLY_9_OPTIONS = {
    ("hostpci", "driver"),
    ("machine", "aw-bits"),
    ("agent", "freeze-fs"),
    ("agent", "guest-fsfreeze"),
    ("tpmstate", "format"),
}


@pytest.fixture
def sent(api: Any, bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Exchange]:
    """The requests of a node and a guest made, changed and looked at, and of those of earlier tests."""
    for name in ("PAUSE_S", "LONGEST_PAUSE_S"):
        monkeypatch.setattr(client_module, name, 0.01)
    # The node: its mapping, made and then changed.
    guest = bench.host
    bench.host = bench.state.inventory.get_host("pve1")
    monkeypatch.setattr(step, "read", lambda fact, **_: {"0000:01:00": dict(CARD)})
    bench.apply(mapping.mappings, devices={"a4000": "0000:01:00"})
    api.state.mappings["a4000"].map = ["id=10de:24b0,iommugroup=9,node=pve1,path=0000:02:00"]
    bench.apply(mapping.mappings, devices={"a4000": "0000:01:00"})
    # The guest: preflight, image, creation with a lost answer, a change and growth.
    bench.host = guest
    bench.commands(vm.preflight)
    api.fail_task("download", "download failed", log=["no route"])
    with pytest.raises(AssertionError, match="download failed"):
        bench.apply(vm.image)
    api.add_image()
    api.drop_reply("POST", "/qemu$")
    bench.apply(vm.create_or_update)
    other = make_bench(api, tmp_path, monkeypatch, cores=4, system_disk_gib=80)
    other.apply(vm.create_or_update)
    api.state.vms[101].config["hostpci1"] = "mapping=a4000"
    other.apply(vm.create_or_update)
    # The agent: whatever it says, it is asked in this way.
    client = Client(inventory.of_run(bench.state).nodes["pve1"], retry_s=0)
    with pytest.raises(client_module.ApiError):
        client.get("nodes", "pve1", "qemu", 101, "agent", "file-read", file="/etc/ssh/ssh_host_ed25519_key.pub")
    return [call for call in api.calls if call.agent == "gpulab" and call.status not in (400, 501)]


def requests(sent: list[Exchange]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    yield from ((call.method, call.path, dict(call.parameters)) for call in sent)
    yield from DECLARED


def problems(schema: fakepve.Schema, sent: list[Exchange]) -> list[str]:
    """What the schema finds wrong: path, method, names and values of parameters."""
    found = []
    for method, path, parameters in requests(sent):
        match = schema.match(path)
        if match is None or method not in match.methods:
            found.append(f"{method} {path}: no such call")
            continue
        _, errors = fakepve.validate(match.methods[method].get("parameters"), {**parameters, **match.params})
        found += [f"{method} {match.template}: {name}: {text}" for name, text in errors.items()]
    return sorted(set(found))


def test_scenarios_make_every_call(sent: list[Exchange]) -> None:
    made = {(call.method, fakepve.load().match(call.path).template) for call in sent}

    assert ASKED - made == set()


def test_requests_match_the_schema_of_pve_9(sent: list[Exchange]) -> None:
    assert problems(fakepve.load(), sent) == []


def test_requests_match_the_schema_of_pve_8_4(sent: list[Exchange]) -> None:
    assert problems(_of_8_4(), sent) == []


def test_requests_use_nothing_that_only_pve_9_knows(sent: list[Exchange]) -> None:
    schema = fakepve.load()
    used, options = set(), set()
    for _, path, parameters in requests(sent):
        match = schema.match(path)
        assert match is not None
        for name, value in parameters.items():
            used.add((match.template, name))
            options |= {(name.rstrip("0123456789"), part.partition("=")[0]) for part in str(value).split(",")}

    assert used & ONLY_9 == set()
    assert options & ONLY_9_OPTIONS == set()


def test_table_of_differences_is_complete_for_the_calls_we_make(sent: list[Exchange]) -> None:
    new, old = fakepve.load(), _of_8_4()
    calls = {(method, new.match(path).template) for method, path, _ in requests(sent)}
    missing = {
        (template, name)
        for method, template in calls
        for name in _names(new, method, template) - _names(old, method, template)
    }

    assert missing == ONLY_9


def _names(schema: fakepve.Schema, method: str, template: str) -> set[str]:
    return set(schema.paths[template][method].get("parameters", {}).get("properties", {}))


def test_check_finds_wrong_names_values_and_calls() -> None:
    """The check itself is no rubber stamp."""
    bad = [
        Exchange("PUT", "/nodes/pve1/qemu/101/config", {"coers": "2", "memory": "2048"}, "gpulab", 200),
        Exchange("PUT", "/nodes/pve1/qemu/101/config", {"balloon": "none"}, "gpulab", 200),
        Exchange("PATCH", "/nodes/pve1/qemu/101/config", {}, "gpulab", 200),
        Exchange("GET", "/nodes/pve1/qumu", {}, "gpulab", 200),
        Exchange("PUT", "/nodes/pve1/qemu/101/resize", {"disk": "scsi0"}, "gpulab", 200),
    ]

    assert problems(fakepve.load(), bad) == [
        "GET /nodes/pve1/qumu: no such call",
        "PATCH /nodes/pve1/qemu/101/config: no such call",
        "PUT /nodes/{node}/qemu/{vmid}/config: balloon: type check ('integer') failed - got 'none'",
        "PUT /nodes/{node}/qemu/{vmid}/config: coers: property is not defined in schema and the schema does not "
        "allow additional properties",
        "PUT /nodes/{node}/qemu/{vmid}/resize: size: property is missing and it is not optional",
    ]


def _of_8_4() -> fakepve.Schema:
    """The API viewer's data, which is Proxmox' own and not part of this project, as fakepve checks with it."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data" / "pve-api-8.4.json.gz"
    for file in (Path(os.environ.get("GPULAB_PVE_SCHEMA") or beside), beside):
        if file.is_file() and "allow-ksm" not in _names(schema := _read(file), "POST", "/nodes/{node}/qemu"):
            return schema
    pytest.skip("not run (no 8.4 schema)")


def _read(file: Path) -> fakepve.Schema:
    paths: dict[str, Any] = {}

    def walk(node: dict[str, Any]) -> None:
        paths[node["path"]] = node.get("info", {})
        for child in node.get("children", []):
            walk(child)

    with gzip.open(file) as content:
        for tree in json.load(content):
            walk(tree)
    return fakepve.Schema(paths)

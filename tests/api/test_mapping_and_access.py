# SPDX-License-Identifier: MIT
"""Resource mappings and the rights of the token."""

from __future__ import annotations

from typing import Any

import pytest

from inventory import GpulabError, Node
from inventory.schema import Passthrough, PassthroughDevice
from operations import step
from operations.proxmox import access, mapping

from .conftest import Bench

CARD = {"path": "0000:01:00", "id": "10de:24b0", "subsystem_id": "10de:14ad", "iommu_group": 14}
NODE = Node(
    name="pve1",
    ssh_hostname="192.0.2.11",
    passthrough=Passthrough(devices=[PassthroughDevice(address="0000:01:00")]),
)


@pytest.fixture
def on_node(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """The node's own steps; its PCI tree is what `CARD` says."""
    bench.host = bench.state.inventory.get_host("pve1")
    monkeypatch.setattr(step, "read", lambda fact, **_: {"0000:01:00": dict(CARD)})
    return bench


def test_mapping_names_the_card_and_then_stays(api: Any, on_node: Bench) -> None:
    assert on_node.apply(mapping.mappings, devices={"a4000": "0000:01:00"}) == 1
    assert on_node.commands(mapping.mappings, devices={"a4000": "0000:01:00"}) == []

    found = api.api().cluster.mapping.pci("a4000").get()
    assert found["map"] == ["id=10de:24b0,iommugroup=14,node=pve1,path=0000:01:00,subsystem-id=10de:14ad"]


def test_device_that_is_declared_by_its_id_is_named_by_its_address(
    api: Any, on_node: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "read", lambda fact, **_: {"10de:24b0": dict(CARD)})

    on_node.apply(mapping.mappings, devices={"a4000": "10de:24b0"})

    assert "path=0000:01:00" in api.api().cluster.mapping.pci("a4000").get()["map"][0]


def test_entry_of_another_node_is_kept(api: Any, on_node: Bench) -> None:
    other = "id=10de:24b0,iommugroup=3,node=pve2,path=0000:81:00"
    stale = "id=10de:24b0,iommugroup=9,node=pve1,path=0000:02:00"
    api.api().cluster.mapping.pci.post(id="a4000", map=[other, stale])

    on_node.apply(mapping.mappings, devices={"a4000": "0000:01:00"})

    entries = api.api().cluster.mapping.pci("a4000").get()["map"]
    assert other in entries and stale not in entries and len(entries) == 2


def test_device_that_the_node_lacks_is_refused(api: Any, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.host = bench.state.inventory.get_host("pve1")
    monkeypatch.setattr(step, "read", lambda fact, **_: {"0000:81:00": None})

    with pytest.raises(GpulabError, match=r"pve1: no PCI device 0000:81:00 for mapping a4000"):
        bench.commands(mapping.mappings, devices={"a4000": "0000:81:00"})


BARE = {
    "version": "9.1.1",
    "roles": {},
    "user": False,
    "acl": [],
    "tokens": [],
    "storage": {"local": "iso,vztmpl,backup", "local-lvm": "images,rootdir"},
    "ca": "pem",
}


def test_bare_node_gets_role_user_rights_and_contents() -> None:
    commands = access.bootstrap_commands(BARE, NODE)

    assert [command[:3] for command in commands[:2]] == [("pveum", "role", "add"), ("pveum", "user", "add")]
    assert [command[3] for command in commands if command[1] == "acl"] == list(access.paths(NODE))
    assert commands[-1] == ("pvesm", "set", "local", "--content", "iso,vztmpl,backup,import,snippets")


def test_prepared_node_gets_nothing() -> None:
    prepared = {
        **BARE,
        "roles": {"Gpulab": ",".join(access.privileges(9))},
        "user": True,
        "acl": [[path, "gpulab@pve", "Gpulab"] for path in access.paths(NODE)],
        "storage": {"local": "import,snippets"},
    }

    assert access.bootstrap_commands(prepared, NODE) == []


@pytest.mark.parametrize(
    ("major", "has", "lacks"), [(8, "VM.Monitor", "VM.GuestAgent.Audit"), (9, "VM.GuestAgent.FileRead", "VM.Monitor")]
)
def test_role_follows_the_version(major: int, has: str, lacks: str) -> None:
    assert has in access.privileges(major)
    assert lacks not in access.privileges(major)


def test_unknown_image_storage_is_named() -> None:
    with pytest.raises(GpulabError, match=r"image_storage = 'local': no such storage") as caught:
        access.bootstrap_commands({**BARE, "storage": {"nfs": ""}}, NODE)
    assert "The node has nfs." in str(caught.value)


def test_rights_of_the_role_are_all_that_a_deploy_asks_for() -> None:
    granted = {path: dict.fromkeys(access.privileges(9), 1) for path in access.paths(NODE)}

    assert access.missing(granted, NODE, 9, {"local-lvm"}) == []
    del granted["/mapping/pci"]["Mapping.Use"]
    assert access.missing(granted, NODE, 9, {"local-lvm"}) == ["Mapping.Use on /mapping/pci"]

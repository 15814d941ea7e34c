# SPDX-License-Identifier: MIT
"""Resource mappings and the rights of the token."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import inventory
from inventory import GpulabError, Node
from inventory.schema import Passthrough, PassthroughDevice
from operations import step
from operations.proxmox import access, client, mapping
from operations.proxmox.client import Client
from rehearsal.pve.state import Mapping

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


def writes(api: Any) -> list[str]:
    return [method for method, path in api.requests if path.startswith("/cluster/mapping") and method != "GET"]


def test_mapping_that_pve_finds_wrong_fails_with_its_words(
    api: Any, on_node: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device moved to another IOMMU group after the node's PCI tree was read."""
    monkeypatch.setattr(step, "read", lambda fact, **_: {"0000:01:00": {**CARD, "iommu_group": 15}})

    with pytest.raises(AssertionError, match=r"does not match for 'a4000' \(14 != 15\)") as caught:
        on_node.apply(mapping.mappings, devices={"a4000": "0000:01:00"})
    assert "pve1: mapping a4000 does not fit the node: 'iommugroup' does not match" in str(caught.value)


def test_token_that_cannot_see_the_mapping_is_told_so(api: Any, on_node: Bench) -> None:
    """Lists come empty without a right; the mapping's absence there is not silence."""
    api.meanwhile("GET", "/cluster/mapping/pci$", lambda: api.state.mappings.clear())

    with pytest.raises(AssertionError, match="not there after it was made, or the token may not see it"):
        on_node.apply(mapping.mappings, devices={"a4000": "0000:01:00"})


def test_other_mapping_changed_in_between_is_no_conflict(
    api: Any, on_node: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digest is that of the whole file."""
    monkeypatch.setattr(client, "PAUSE_S", 0.01)
    other = "id=10de:24b0,iommugroup=3,node=pve2,path=0000:81:00"
    api.api().cluster.mapping.pci.post(id="a4000", map=[other])
    api.requests.clear()
    api.meanwhile("PUT", "/cluster/mapping/pci/a4000", lambda: api.state.mappings.update(l4=Mapping(map=[other])))

    on_node.apply(mapping.mappings, devices={"a4000": "0000:01:00"})

    assert len(api.api().cluster.mapping.pci("a4000").get()["map"]) == 2
    assert writes(api) == ["PUT", "PUT"]


def test_mapping_made_by_somebody_else_meanwhile_is_added_to(api: Any, on_node: Bench) -> None:
    other = "id=10de:24b0,iommugroup=3,node=pve2,path=0000:81:00"
    api.meanwhile("POST", "/cluster/mapping/pci$", lambda: api.state.mappings.update(a4000=Mapping(map=[other])))

    on_node.apply(mapping.mappings, devices={"a4000": "0000:01:00"})

    entries = api.api().cluster.mapping.pci("a4000").get()["map"]
    assert other in entries and len(entries) == 2


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_lost_answer_to_a_mapping_is_looked_up(
    api: Any, on_node: Bench, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(client, "PAUSE_S", 0.01)
    if method == "PUT":
        api.api().cluster.mapping.pci.post(id="a4000", map=["id=10de:24b0,iommugroup=9,node=pve1,path=0000:02:00"])
    api.requests.clear()
    api.drop_reply(method, "/cluster/mapping/pci")

    on_node.apply(mapping.mappings, devices={"a4000": "0000:01:00"})

    assert writes(api) == [method]


def test_nodes_of_one_cluster_make_the_mapping_once(api: Any, bench: Bench) -> None:
    names = ["pve1", "pve2", "pve3"]
    node = inventory.of_run(bench.state).nodes["pve1"]
    nodes = [node.model_copy(update={"name": name, "cluster": "pve1"}) for name in names]
    entries = {name: mapping.Device(**CARD).entry(name) for name in names}
    api.requests.clear()

    with ThreadPoolExecutor() as threads:
        for done in [threads.submit(mapping._write, Client(one), one, "a4000", entries[one.name]) for one in nodes]:
            done.result()

    assert sorted(api.api().cluster.mapping.pci("a4000").get()["map"]) == sorted(entries.values())
    assert writes(api) == ["POST", "PUT", "PUT"]


@pytest.mark.parametrize("privilege", sorted({*access.privileges(9)} - {"Mapping.Audit"}))
def test_token_without_one_privilege_is_found_by_comparing_rights(api: Any, bench: Bench, privilege: str) -> None:
    node = inventory.of_run(bench.state).nodes["pve1"]
    api.take_away(privilege)

    lacking = access.missing(Client(node).get("access", "permissions"), node, 9, {"local-lvm"}, "local")

    assert {line.split(" on ")[0] for line in lacking} == {privilege}


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


def test_deepest_listed_path_decides() -> None:
    """An entry on a path replaces what comes from above, and need not reach what is below."""
    granted = {path: dict.fromkeys(access.privileges(9), 1) for path in access.paths(NODE)}

    granted["/storage/local-lvm"] = {"Datastore.Audit": 1}
    assert access.missing(granted, NODE, 9, {"local-lvm"}) == ["Datastore.AllocateSpace on /storage/local-lvm"]
    granted["/storage/local-lvm"] = {"Datastore.Audit": 1, "Datastore.AllocateSpace": 0}
    assert access.missing(granted, NODE, 9, {"local-lvm"}) == []
    granted["/storage"]["Datastore.AllocateTemplate"] = 0
    assert access.missing(granted, NODE, 9, {"local-lvm"}) == ["Datastore.AllocateTemplate on /storage/local"]


@pytest.mark.parametrize("release", ["8.4.1", "9.1.1"])
def test_each_single_missing_privilege_is_found(release: str) -> None:
    major = int(release[0])
    full = {path: dict.fromkeys(access.privileges(major), 1) for path in access.paths(NODE)}
    assert access.missing(full, NODE, major, {"local-lvm"}) == []

    silent = {
        privilege
        for privilege in access.privileges(major)
        if not access.missing(
            {path: {name: 1 for name in found if name != privilege} for path, found in full.items()},
            NODE,
            major,
            {"local-lvm"},
            "local",
        )
    }
    # Mapping.Use lists and reads mappings as well.
    assert silent <= {"Mapping.Audit"}

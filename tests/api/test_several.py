# SPDX-License-Identifier: MIT
"""Several at once: two guests with a GPU each on one node, three nodes behind one API, two nodes on their own."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from pyinfra.api import Config, State
from pyinfra.api.exceptions import ConnectError
from pyinfra.api.state import StateStage
from pyinfra.context import ctx_host, ctx_state

import inventory
from inventory import GpulabError
from inventory.resolve import resolve
from inventory.secrets import Secrets
from operations import record, step
from operations.proxmox import access, mapping, vm
from operations.proxmox.mapping import PciDevices
from rehearsal.pve.power import A4000
from rehearsal.pve.testing import FakeLab

from .conftest import GUEST
from .sites import NEW_KEY, PUBLIC_KEY, ImageServer, stand_in
from .test_mapping_and_access import CARD

CARDS = {"0000:01:00": CARD, "0000:02:00": {**CARD, "path": "0000:02:00", "iommu_group": 15}}


@dataclass
class Run:
    """One run over several hosts. As pyinfra does, each step runs on all hosts at once, then the next one."""

    state: State
    failed: dict[str, str] = field(default_factory=dict)
    did: Counter[str] = field(default_factory=Counter)

    def deploy(self) -> Run:
        """The steps of deploy.py that talk to the API."""
        lab = inventory.of_run(self.state)
        nodes, guests = list(lab.nodes), list(lab.guests)
        self.on(guests, lambda host: host.connector.connect())
        self.on(guests, lambda host: self.step(host, vm.preflight))
        self.on(nodes, lambda host: self.step(host, mapping.mappings, devices=_devices(lab.nodes[host.name])))
        for each in (vm.image, vm.create_or_update, vm.started):
            self.on(guests, lambda host, each=each: self.step(host, each))
        return self

    def on(self, names: Sequence[str], act: Callable[[Any], None]) -> None:
        going = [name for name in names if name not in self.failed]
        with ctx_state.use(self.state), ThreadPoolExecutor(max(1, len(going))) as threads:
            for done in [threads.submit(self._one, name, act) for name in going]:
                done.result(120)

    def _one(self, name: str, act: Callable[[Any], None]) -> None:
        host = self.state.inventory.get_host(name)
        with ctx_host.use(host):
            try:
                act(host)
            except (GpulabError, ConnectError) as error:
                self.failed[name] = str(error)

    def step(self, host: Any, operation: Any, **arguments: Any) -> None:
        for command in operation._inner(**arguments):
            self.did[host.name] += 1
            if command.execute(self.state, host, {}) is False:
                raise GpulabError(record.of_run(self.state).failures[host.name])


def _devices(node: Any) -> dict[str, str]:
    return {device.name: device.address for device in node.passthrough.devices}


@dataclass
class Several:
    """An inventory of several hosts, deployed as often as wanted."""

    folder: Path
    image: dict[str, str]
    nodes: list[dict[str, Any]] = field(default_factory=list)
    guests: list[dict[str, Any]] = field(default_factory=list)

    @property
    def state_dir(self) -> Path:
        return self.folder / "state"

    def node(self, api: FakeLab, name: str, cluster: str | None = None, cards: Sequence[str] = ("0000:01:00",)) -> None:
        """A node behind this API, with its token and its CA."""
        word = cluster or name
        (self.state_dir / "ca").mkdir(parents=True, exist_ok=True)
        shutil.copy(api.ca, self.state_dir / "ca" / f"{word}.pem")
        Secrets(self.state_dir).put(word, "api_token", f"{api.user}!{api.token_name}={api.token}")
        names = ["a4000", "second"]
        self.nodes.append(
            {
                "name": name,
                "ssh_hostname": f"192.0.2.{10 + len(self.nodes)}",
                "state_dir": str(self.state_dir),
                "api": {"host": api.host, "port": api.port, "timeout_s": 10},
                "passthrough": {"devices": [{"name": names[n], "address": address} for n, address in enumerate(cards)]},
                **({"cluster": cluster} if cluster else {}),
            }
        )

    def guest(self, name: str, node: str, vmid: int, **keys: Any) -> None:
        address = f"192.0.2.{100 + len(self.guests)}/24"
        own = {"name": name, "node": node, "vmid": vmid, "address": address, "state_dir": str(self.state_dir)}
        self.guests.append({**GUEST, "image": self.image, **own, **keys})

    def deploy(self) -> Run:
        def listed(kind: str, hosts: list[dict[str, Any]]) -> list[Any]:
            return [
                (f"@{kind}/{host['name']}", {key: value for key, value in host.items() if key != "name"})
                for host in hosts
            ]

        path = self.folder / "lab.py"
        path.write_text(f"nodes = {listed('node', self.nodes)!r}\nguests = {listed('guest', self.guests)!r}\n")
        state = State(resolve(path, {}), Config())
        state.set_stage(StateStage.Execute)
        return Run(state).deploy()


@pytest.fixture(scope="module")
def images() -> Iterator[ImageServer]:
    server = ImageServer()
    yield server
    server.stop()


@pytest.fixture
def several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: ImageServer) -> Several:
    stand_in(monkeypatch)
    monkeypatch.setenv("GPULAB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(
        step,
        "read",
        lambda fact, places=(), **_: (
            {place: dict(CARDS[place]) for place in places} if fact is PciDevices else {"finished": True}
        ),
    )
    return Several(tmp_path, images.image)


def ready(api: FakeLab, nodes: Sequence[str] = ("pve1",)) -> None:
    """As after `make bootstrap`, with guests whose agents answer."""
    for name in nodes:
        for path in (*_paths(name),):
            api.grant(api.user, path, " ".join(access.privileges(9)))
    for power in (api.power, *api.others.values()):
        power.snippets["snippets/gpulab-vendor.yaml"] = "#cloud-config\n"
        power.answers[PUBLIC_KEY] = (0, NEW_KEY.encode() + b" root@guest\n")


def _paths(node: str) -> tuple[str, ...]:
    return ("/vms", "/storage", f"/nodes/{node}", "/mapping/pci", "/sdn/zones/localnetwork")


def changes(api: FakeLab, path: str = "") -> list[str]:
    return [f"{method} {found}" for method, found in api.requests if method != "GET" and re.search(path, found)]


def started(state: FakeLab, node: str) -> set[int]:
    power = state.power if node == state.node else state.others[node]
    return set(power.started)


# Two guests, two cards, one node.


@pytest.fixture
def two_cards(api: FakeLab, several: Several) -> Several:
    second = [replace(device, address=device.address.replace(":01:", ":02:"), iommu_group=15) for device in A4000]
    api.hardware.devices = [*api.hardware.devices, *second]
    ready(api)
    several.node(api, "pve1", cards=("0000:01:00", "0000:02:00"))
    several.guest("gpu01", "pve1", 101)
    several.guest("gpu02", "pve1", 102, gpu="second")
    return several


def cards_of(api: FakeLab) -> dict[int, str]:
    """The card that each running VM has got."""
    return {vmid: guest.gpus[0].address for vmid, guest in api.power.started.items()}


def test_two_guests_get_a_card_each(api: FakeLab, two_cards: Several) -> None:
    """The image is downloaded once though both need it, and nobody's digest is out of date."""
    before = len(api.calls)
    assert two_cards.deploy().failed == {}

    assert cards_of(api) == {101: "0000:01:00.0", 102: "0000:02:00.0"}
    assert len(changes(api, "download-url$")) == 1
    assert Counter(changes(api, "/cluster/mapping")) == {"POST /cluster/mapping/pci": 2}
    assert [call for call in api.calls[before:] if call.method != "GET" and call.status != 200] == []
    assert two_cards.deploy().did == {}


def test_change_of_two_guests_at_once_is_two_changes(api: FakeLab, two_cards: Several) -> None:
    two_cards.deploy()
    for guest in two_cards.guests:
        guest["cores"] = 4
    api.requests.clear()

    assert two_cards.deploy().failed == {}

    assert {vmid: api.state.vms[vmid].config["cores"] for vmid in (101, 102)} == {101: 4, 102: 4}
    written = Counter(changes(api, "/config$"))
    assert written == {"PUT /nodes/pve1/qemu/101/config": 1, "PUT /nodes/pve1/qemu/102/config": 1}
    assert cards_of(api) == {101: "0000:01:00.0", 102: "0000:02:00.0"}


def test_neither_guest_takes_a_card_that_the_other_has(api: FakeLab, two_cards: Several) -> None:
    """The inventory is turned round while both run: each would have to get the other's card."""
    two_cards.deploy()
    two_cards.guests[0]["gpu"], two_cards.guests[1]["gpu"] = "second", "a4000"
    api.requests.clear()

    run = two_cards.deploy()

    assert "gpu01: gpu = 'second': VM 102 (gpu02) is using it" in run.failed["gpu01"]
    assert "gpu02: gpu = 'a4000': VM 101 (gpu01) is using it" in run.failed["gpu02"]
    assert changes(api, "/qemu/") == []


def test_failure_of_one_guest_is_not_the_others(api: FakeLab, two_cards: Several) -> None:
    api.fail_task("qmcreate", "lvcreate error: insufficient free space", after="successfully created disk")

    run = two_cards.deploy()

    assert len(run.failed) == 1
    assert len(api.power.started) == 1
    assert two_cards.deploy().failed == {}
    assert cards_of(api) == {101: "0000:01:00.0", 102: "0000:02:00.0"}


# Three nodes of one cluster, behind the API of the first.

THREE = ("pve1", "pve2", "pve3")


@pytest.fixture(scope="module")
def _cluster() -> Iterator[FakeLab]:
    with FakeLab(others=THREE[1:]) as api:
        yield api


@pytest.fixture
def cluster(_cluster: FakeLab, several: Several) -> Several:
    _cluster.reset()
    ready(_cluster, THREE)
    for number, name in enumerate(THREE, 1):
        several.node(_cluster, name, cluster="lab")
        several.guest(f"gpu0{number}", name, 100 + number)
    return several


def test_guests_of_a_cluster_are_made_on_their_nodes(_cluster: FakeLab, cluster: Several) -> None:
    first = cluster.deploy()

    assert first.failed == {}
    assert {name: set(_cluster.at(name).vms) for name in THREE} == {"pve1": {101}, "pve2": {102}, "pve3": {103}}
    assert {name: started(_cluster, name) for name in THREE} == {"pve1": {101}, "pve2": {102}, "pve3": {103}}
    # Each node has a storage of its own under the same name.
    assert sorted(changes(_cluster, "download-url$")) == [
        f"POST /nodes/{name}/storage/local/download-url" for name in THREE
    ]
    assert cluster.deploy().did == {}


def test_mapping_of_a_cluster_has_an_entry_of_each_node(_cluster: FakeLab, cluster: Several) -> None:
    cluster.deploy()

    entries = _cluster.state.mappings["a4000"].map
    assert sorted(re.findall(r"node=(\w+)", ";".join(entries))) == list(THREE)
    assert Counter(changes(_cluster, "/cluster/mapping")) == {
        "POST /cluster/mapping/pci": 1,
        "PUT /cluster/mapping/pci/a4000": 2,
    }


def test_every_request_about_a_guest_goes_to_its_node(_cluster: FakeLab, cluster: Several) -> None:
    cluster.deploy()

    asked = {
        tuple(found.groups()) for _, path in _cluster.requests if (found := re.match(r"/nodes/(\w+)/qemu/(\d+)", path))
    }
    assert asked == {("pve1", "101"), ("pve2", "102"), ("pve3", "103")}


def test_offline_node_fails_only_what_is_its_own(
    _cluster: FakeLab, cluster: Several, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("operations.proxmox.client.Patience", _short())
    _cluster.offline.add("pve2")

    run = cluster.deploy()

    assert set(run.failed) == {"pve2", "gpu02"}
    assert run.failed["gpu02"].startswith("waits for pve2: GET /nodes/pve2/qemu/102/config: 595 No route to host")
    assert (started(_cluster, "pve1"), started(_cluster, "pve3")) == ({101}, {103})

    _cluster.offline.clear()
    assert cluster.deploy().failed == {}
    assert started(_cluster, "pve2") == {102}
    assert cluster.deploy().did == {}


def test_id_that_another_node_of_the_cluster_uses_is_refused(_cluster: FakeLab, cluster: Several) -> None:
    _cluster.add_vm(102, name="mail")

    run = cluster.deploy()

    assert set(run.failed) == {"gpu02"}
    assert "VM 102 already exists on node 'pve1'" in run.failed["gpu02"]
    assert dict(_cluster.state.vms[102].config) == {"name": "mail"}


def _short() -> Any:
    from operations.proxmox import client

    class Short(client.Patience):
        def __init__(self, seconds: float) -> None:
            super().__init__(min(seconds, 0.2))

    return Short


# Two nodes, each a cluster of its own.


@pytest.fixture(scope="module")
def _second() -> Iterator[FakeLab]:
    with FakeLab("pve2") as api:
        yield api


@pytest.fixture
def apart(api: FakeLab, _second: FakeLab, several: Several) -> Several:
    """The same ids and names on both; another token on each."""
    _second.reset()
    _second.token_name, _second.token = "other", _second.add_token(_second.user, "other", privsep=False)
    ready(api)
    ready(_second, ["pve2"])
    several.node(api, "pve1")
    several.node(_second, "pve2")
    several.guest("gpu01", "pve1", 101)
    several.guest("gpu02", "pve2", 101)
    return several


def test_standalone_nodes_know_nothing_of_each_other(api: FakeLab, _second: FakeLab, apart: Several) -> None:
    assert apart.deploy().failed == {}

    for each, name, guest in ((api, "pve1", "gpu01"), (_second, "pve2", "gpu02")):
        assert each.state.vms[101].config["name"] == guest
        assert [re.findall(r"node=(\w+)", entry) for entry in each.state.mappings["a4000"].map] == [[name]]
        assert {path.split("/")[2] for _, path in each.requests if path.startswith("/nodes/")} == {name}
        assert len(changes(each, "download-url$")) == 1
    assert apart.deploy().did == {}


def test_refused_token_of_one_node_is_not_the_others(api: FakeLab, _second: FakeLab, apart: Several) -> None:
    _second.revoke_token()

    run = apart.deploy()

    assert set(run.failed) == {"pve2", "gpu02"}
    assert run.failed["gpu02"].startswith("waits for pve2: the API refuses the token")
    assert 101 in api.power.started
    assert _second.token not in str(run.failed)


def test_certificate_of_the_other_node_is_refused(api: FakeLab, _second: FakeLab, apart: Several) -> None:
    """Each cluster has its own CA; the other's is no proof."""
    authorities = apart.state_dir / "ca"
    (authorities / "pve2.pem").write_text((authorities / "pve1.pem").read_text())
    api.requests.clear()
    _second.requests.clear()

    run = apart.deploy()

    assert set(run.failed) == {"pve2", "gpu02"}
    assert "the API's certificate does not check against" in run.failed["gpu02"]
    assert _second.requests == []

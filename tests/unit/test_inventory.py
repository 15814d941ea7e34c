# SPDX-License-Identifier: MIT
"""What an inventory may hold, and what the reader gets when it is wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import pytest

import inventory
from inventory import InventoryError
from inventory.gpu import too_new
from inventory.packages import DISTRIBUTIONS
from inventory.secrets import Secrets, variable
from inventory.sharing import Client, client

NODE = {"ssh_hostname": "192.0.2.11", "passthrough": {"devices": [{"address": "0000:01:00"}]}}
GUEST: dict[str, Any] = {
    "node": "pve1",
    "vmid": 101,
    "address": "192.0.2.101/24",
    "gateway": "192.0.2.1",
    "ssh_public_key": "ssh-ed25519 AAAA user@host",
    "image": {
        "url": "https://images.example/debian.qcow2",
        "checksum": "sha256:" + 64 * "a",
        "filename": "debian.qcow2",
    },
}
IMAGE = "ollama/ollama@sha256:" + 64 * "a"
CHECKSUM = "sha256:" + 64 * "a"
FIRST = {"address": "192.0.2.101/24", "gateway": "192.0.2.1"}
#: In place of the guest's address and gateway.
CARDS = {"address": None, "gateway": None}


def lab_file(folder: Path, nodes: Mapping[str, Any] | None = None, guests: Mapping[str, Any] | None = None) -> Path:
    path = folder / "lab.py"
    hosts = {
        "nodes": [(f"@node/{name}", data) for name, data in ({"pve1": NODE} if nodes is None else nodes).items()],
        "guests": [(f"@guest/{name}", data) for name, data in ({"gpu01": GUEST} if guests is None else guests).items()],
    }
    path.write_text("".join(f"{key} = {value!r}\n" for key, value in hosts.items()))
    return path


def refused(path: Path, *data: str) -> str:
    with pytest.raises(InventoryError) as caught:
        inventory.load(path, data)
    return str(caught.value)


def test_fifteen_lines_describe_a_lab(tmp_path: Path) -> None:
    lab = inventory.load(lab_file(tmp_path))

    guest = lab.guests["gpu01"]
    assert guest.ssh_hostname == "192.0.2.101"
    assert guest.memory_mib == 16384
    card = lab.card_of(guest)
    assert card is not None and card.name == "NVIDIA RTX A4000"
    assert lab.nodes["pve1"].cluster_name == "pve1"


@pytest.mark.parametrize(
    ("branch", "minor", "toolkit", "fits"),
    [
        ("580", False, "13.0", True),
        ("580", False, "12.9", True),
        ("580", False, "11.8", True),
        ("580", False, "13.1", False),
        ("580", True, "13.4", True),
        ("575", True, "13.0", False),
        ("590", False, "13.1", True),
        ("580", True, "14.0", False),
        # A branch that the table does not know is judged by its number alone.
        ("630", False, "13.4", True),
        ("630", False, "14.0", False),
    ],
)
def test_toolkits_that_a_driver_branch_runs(branch: str, minor: bool, toolkit: str, fits: bool) -> None:
    assert (too_new(toolkit, branch, minor) == "") is fits


def test_tenants_client_has_its_own_limits(tmp_path: Path) -> None:
    tenant = {"name": "astro", "active_thread_percentage": 40, "memory_limit_mib": 4096, "priority": "below-normal"}
    guest = inventory.load(lab_file(tmp_path, guests={"gpu01": {**GUEST, "tenants": [tenant]}})).guests["gpu01"]

    found = client(guest, guest.tenants[0])

    assert (found.user, found.ipc, found.mounts) == ("850:850", "host", {"/run/nvidia-mps": "/run/nvidia-mps"})
    assert found.environment == {
        "CUDA_MPS_PIPE_DIRECTORY": "/run/nvidia-mps",
        "CUDA_MPS_LOG_DIRECTORY": "/var/log/nvidia-mps",
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "40",
        "CUDA_MPS_CLIENT_PRIORITY": "1",
        "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "0=4096M",
    }


def test_nothing_lasts_without_persistence_and_nothing_has_to(tmp_path: Path) -> None:
    nvidia = {"persistence": False, "accounting": False, "thermal": None, "sharing": "time-slice"}

    guest = inventory.load(lab_file(tmp_path, guests={"gpu01": {**GUEST, "nvidia": nvidia}})).guests["gpu01"]

    assert guest.nvidia.forgotten() == []


@pytest.mark.parametrize("sharing", ["time-slice", "exclusive"])
def test_without_mps_a_client_needs_nothing(tmp_path: Path, sharing: str) -> None:
    guests = {"gpu01": {**GUEST, "nvidia": {"sharing": sharing}}}

    assert client(inventory.load(lab_file(tmp_path, guests=guests)).guests["gpu01"]) == Client()


@pytest.mark.parametrize(
    ("branch", "names"),
    [
        ("580", ("nvidia-utils-580", "libnvidia-compute-580", "nvidia-dkms-580-open", "nvidia-compute-utils-580")),
        ("590", ("nvidia-utils", "libnvidia-compute", "nvidia-dkms-open", "nvidia-compute-utils")),
    ],
)
def test_ubuntus_names_carry_the_branch_up_to_580(branch: str, names: tuple[str, ...]) -> None:
    found = DISTRIBUTIONS["ubuntu2404"].of_branch(branch)
    assert (found.driver, found.mps) == (names, names[-1])


def test_group_data_is_resolved_as_pyinfra_does(tmp_path: Path) -> None:
    path = lab_file(tmp_path)
    (tmp_path / "group_data").mkdir()
    (tmp_path / "group_data" / "guests.py").write_text("cores = 3\n_sudo = True\n")

    assert inventory.load(path).guests["gpu01"].cores == 3
    assert inventory.load(path, ["cores=5"]).guests["gpu01"].cores == 5


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"vmdi": 101}, "gpu01: vmdi = 101: unknown key; did you mean `vmid`?"),
        ({"vmid": "101"}, "gpu01: vmid = '101': expected a valid integer"),
        ({"vmid": None}, "gpu01: vmid = None: expected a valid integer"),
        ({"vmid": 99}, "gpu01: vmid = 99: expected greater than or equal to 100"),
        ({"address": "192.0.2.101"}, "gpu01: address = '192.0.2.101': expected an address with its prefix length"),
        ({"gateway": "198.51.100.1"}, "gpu01: expected `gateway` inside 192.0.2.0/24, got 198.51.100.1"),
        ({"gpu": "a5000"}, "gpu01: gpu = 'a5000': expected a passthrough device of pve1 (a4000)"),
        ({"node": "pve7"}, "gpu01: node = 'pve7': expected a host of the group nodes (pve1)"),
        ({"data_disk": {"size": 10}}, "gpu01: data_disk.size = 10: unknown key; did you mean `size_gib`?"),
        ({"services": {"ollama": {"image": "ollama/ollama:latest"}}}, "gpu01: services.ollama.image"),
        (
            {"services": {"ollama": {"image": IMAGE, "memory_budget_mib": 17000}}},
            "gpu01: memory budgets: services.ollama 17000 = 17000 MiB; expected at most 16376 MiB",
        ),
        (
            {"nvidia": {"repository": "http://mirror.example/repos"}},
            "gpu01: nvidia: expected `key_sha256` beside http://mirror.example/repos",
        ),
        ({"nvidia": {"version": "590.44.01"}}, "gpu01: nvidia: expected `version` of branch 580, got 590.44.01"),
        ({"gateway": None}, "gpu01: expected one `gateway`, the guest's default route; got none"),
        ({"networks": [FIRST]}, "gpu01: expected `address` inside `networks`, not beside it"),
        ({**CARDS, "networks": [{}]}, "gpu01: expected `address` in the first of `networks`"),
        (
            {**CARDS, "networks": [FIRST, {"vlan": 5000}]},
            "gpu01: networks.1.vlan = 5000: expected less than or equal to 4094",
        ),
        ({**CARDS, "networks": [FIRST, {"gateway": "192.0.2.1"}]}, "expected `address` beside `gateway`"),
        (
            {**CARDS, "networks": [FIRST, {"address": "198.51.100.7/24", "gateway": "198.51.100.1"}]},
            "gpu01: expected one `gateway`, the guest's default route; got 2",
        ),
        ({**CARDS, "networks": [FIRST, {"mac": "03:24:11:00:00:02"}]}, "gpu01: networks.1.mac = '03:24:11:00:00:02'"),
        (
            {**CARDS, "networks": [{**FIRST, "mac": "02:00:00:00:00:aa"}, {"mac": "02:00:00:00:00:AA"}]},
            "gpu01: expected a different `mac` for each card",
        ),
        ({"nameserver": "dns.example"}, "gpu01: nameserver.0 = 'dns.example'"),
        ({"hugepages": "1G"}, "gpu01: expected `numa` beside `hugepages`"),
        ({"hugepages": "1G", "numa": True, "memory_mib": 16000}, "expected `memory_mib` in whole huge pages of 1G"),
        (
            {"numa_nodes": [{"cpus": "0-3", "memory_mib": 1024}]},
            "gpu01: expected `numa_nodes` with 16384 MiB in all, as `memory_mib`; got 1024",
        ),
        ({"numa_nodes": [{"cpus": "0", "memory_mib": 16384, "policy": "bind"}]}, "`host_nodes` and `policy` together"),
        ({"affinity": "0-3;rm -rf /"}, "gpu01: affinity = '0-3;rm -rf /'"),
        ({"startup": {}}, "gpu01: startup: expected at least one of `order`, `up_s` and `down_s`"),
        ({"tags": ["A b"]}, "gpu01: tags.0 = 'A b'"),
        ({"machine": "pc"}, "gpu01: machine = 'pc'"),
        ({"distribution": "fedora"}, "expected one of debian12, debian13, ubuntu2204, ubuntu2404"),
        (
            {"image": {"name": "fedora", "release": "1", "checksum": CHECKSUM}},
            "gpu01: image: expected `name` to be one of debian12, debian13, ubuntu2204, ubuntu2404, got 'fedora'",
        ),
        ({"image": {"name": ["debian13"], "release": "1", "checksum": CHECKSUM}}, "got ['debian13']"),
        (
            {"image": {"name": "ubuntu2404", "checksum": CHECKSUM}},
            "gpu01: image: expected `release` beside `name`, such as 20251113",
        ),
        (
            {"image": {"name": "debian13", "release": "20251117-2299", "checksum": CHECKSUM, "url": "https://a.b/c"}},
            "gpu01: image: expected `name` and `release`, or `url` and `filename`; got `name` and `url`",
        ),
        ({"image": {"name": "debian13", "release": "20251117-2299"}}, "gpu01: image.checksum: missing"),
        ({"image": {**GUEST["image"], "release": "20251117"}}, "gpu01: image: expected `name` beside `release`"),
        ({"image": {**GUEST["image"], "filename": "noble.img"}}, "gpu01: image.filename = 'noble.img'"),
        (
            {
                "image": {"name": "ubuntu2404", "release": "20251113", "checksum": CHECKSUM},
                "distribution": "debian13",
            },
            "gpu01: expected `distribution` ubuntu2404, as the image's; got debian13",
        ),
        (
            {"distribution": "debian12", "engine": {"kind": "podman"}},
            "gpu01: expected `engine.kind` docker on debian12: its Podman is too old (newer: debian13)",
        ),
        (
            {"engine": {"repository": "http://mirror.example/docker"}},
            "gpu01: engine: expected `key_sha256` beside http://mirror.example/docker",
        ),
        (
            {"nvidia": {"sharing": "mig"}},
            "gpu01: nvidia.sharing = 'mig': expected mps, time-slice or exclusive: no card of the card table has MIG",
        ),
        ({"nvidia": {"toolkit_version": "1.17.7-1"}}, "nvidia.toolkit_version = '1.17.7-1': expected at least 1.17.8"),
        (
            {"nvidia": {"power_limit_w": 300}},
            "gpu01: nvidia.power_limit_w = 300: expected 100 to 140 W (the NVIDIA RTX A4000)",
        ),
        (
            {"nvidia": {"clocks": {"min_mhz": 210, "max_mhz": 3000}}},
            "nvidia.clocks.max_mhz = 3000: expected 210 to 2100",
        ),
        (
            {"nvidia": {"clocks": {"min_mhz": 900, "max_mhz": 800}}},
            "nvidia.clocks: expected `min_mhz` at most `max_mhz`",
        ),
        ({"nvidia": {"mps": {"active_thread_percentage": 0}}}, "nvidia.mps.active_thread_percentage = 0"),
        (
            {"nvidia": {"mps": {"pinned_memory_limit_mib": 20000}}},
            "nvidia.mps.pinned_memory_limit_mib = 20000: expected at most its 16376 MiB",
        ),
        ({"nvidia": {"thermal": {"warning_c": 95}}}, "nvidia.thermal: expected `warning_c` below `critical_c`"),
        (
            {"nvidia": {"persistence": False, "power_limit_w": 120, "clocks": {"min_mhz": 900, "max_mhz": 900}}},
            "gpu01: nvidia: expected `persistence`, or none of what the driver forgets when the card's last client "
            'leaves: accounting, power_limit_w, clocks, thermal.action = "lower-power", sharing = "mps"',
        ),
        (
            {"nvidia": {"persistence": False, "accounting": False, "thermal": {"action": "log"}}},
            'the card\'s last client leaves: sharing = "mps"\n',
        ),
        ({"nvidia": {"cuda": ["cuda"]}}, "nvidia.cuda.0 = 'cuda'"),
        (
            {"nvidia": {"cuda": ["12.9", "13.4"]}},
            "gpu01: nvidia: expected a toolkit up to 13.0 with driver branch 580, or branch 615, or "
            "`cuda_minor_compatibility`; got cuda 13.4",
        ),
        (
            {"nvidia": {"branch": "570", "cuda": ["13.0"], "cuda_minor_compatibility": True}},
            "gpu01: nvidia: expected a toolkit up to 12.8 with driver branch 570, or branch 580; got cuda 13.0",
        ),
        (
            {"nvidia": {"mps": {"active_thread_percentage": 50}}, "tenants": [{"name": "astro"}]},
            "gpu01: tenants.0.active_thread_percentage = 100: expected at most 50, the value of nvidia.mps",
        ),
        (
            {"tenants": [{"name": "astro", "memory_limit_mib": 20000}]},
            "gpu01: tenants.0.memory_limit_mib = 20000: expected at most 16376, the memory of the NVIDIA RTX A4000",
        ),
        (
            {"tenants": [{"name": "ml"}, {"name": "ml"}]},
            "gpu01: tenants.1.name = 'ml': expected a different name for each tenant",
        ),
        ({"gpu": None, "tenants": [{"name": "ml"}]}, "gpu01: tenants: expected `gpu` or `services` beside it"),
    ],
)
def test_wrong_value_is_named_with_what_would_be_right(
    tmp_path: Path, change: dict[str, object], expected: str
) -> None:
    message = refused(lab_file(tmp_path, guests={"gpu01": {**GUEST, **change}}))

    assert expected in message
    assert "nothing was changed" in message


@pytest.mark.parametrize(
    ("name", "release", "url"),
    [
        (
            "debian12",
            "20251112-2294",
            "cloud.debian.org/images/cloud/bookworm/20251112-2294/debian-12-genericcloud-amd64",
        ),
        (
            "debian13",
            "20251117-2299",
            "cloud.debian.org/images/cloud/trixie/20251117-2299/debian-13-genericcloud-amd64",
        ),
        ("ubuntu2204", "20251112", "cloud-images.ubuntu.com/releases/jammy/release-20251112/ubuntu-22.04-server"),
        ("ubuntu2404", "20251113.1", "cloud-images.ubuntu.com/releases/noble/release-20251113.1/ubuntu-24.04-server"),
    ],
)
def test_named_image_says_where_it_comes_from_and_what_it_holds(
    tmp_path: Path, name: str, release: str, url: str
) -> None:
    image = {"name": name, "release": release, "checksum": CHECKSUM}
    guest = inventory.load(lab_file(tmp_path, guests={"gpu01": {**GUEST, "image": image}})).guests["gpu01"]

    assert guest.image.url.startswith(f"https://{url}")
    # A release of its own file, under a name that PVE imports.
    assert guest.image.filename == f"{name}-{release}.qcow2"
    assert guest.distribution == name
    assert guest.packages.nvidia_repository == f"{name}/x86_64"


def test_driver_packages_of_ubuntu_carry_the_branch(tmp_path: Path) -> None:
    guest = {**GUEST, "distribution": "ubuntu2404", "nvidia": {"branch": "570"}}

    packages = inventory.load(lab_file(tmp_path, guests={"gpu01": guest})).guests["gpu01"].packages
    assert "nvidia-dkms-570-open" in packages.driver


def test_first_network_is_where_the_guest_is_reached(tmp_path: Path) -> None:
    networks = [{**FIRST, "bridge": "vmbr7", "vlan": 4}, {"mtu": 9000}]
    guest = inventory.load(lab_file(tmp_path, guests={"gpu01": {**GUEST, **CARDS, "networks": networks}})).guests[
        "gpu01"
    ]

    assert (guest.ssh_hostname, str(guest.address), guest.bridge) == ("192.0.2.101", "192.0.2.101/24", "vmbr7")
    assert [(card.bridge, card.vlan, card.mtu) for card in guest.cards] == [("vmbr7", 4, None), ("vmbr0", None, 9000)]


def test_one_nameserver_or_several(tmp_path: Path) -> None:
    def servers(value: object) -> list[str]:
        guests: dict[str, object] = {"gpu01": {**GUEST, "nameserver": value}}
        return [str(server) for server in inventory.load(lab_file(tmp_path, guests=guests)).guests["gpu01"].nameserver]

    assert servers("192.0.2.53") == ["192.0.2.53"]
    assert servers(["192.0.2.53", "2001:db8::53"]) == ["192.0.2.53", "2001:db8::53"]
    assert servers(None) == []


@pytest.mark.parametrize("short", ["AB:CD", 20 * "ab", ""])
def test_fingerprint_of_another_kind_is_refused(tmp_path: Path, short: str) -> None:
    """SHA-1 is what some tools still show."""
    told = refused(lab_file(tmp_path, {"pve1": {**NODE, "api": {"fingerprint": short}}}))
    assert f"pve1: api.fingerprint = '{short}': expected" in told


def test_missing_value_is_named(tmp_path: Path) -> None:
    without = {key: value for key, value in GUEST.items() if key != "vmid"}

    assert "gpu01: vmid: missing; expected a value" in refused(lab_file(tmp_path, guests={"gpu01": without}))


def test_all_errors_of_all_hosts_come_at_once(tmp_path: Path) -> None:
    message = refused(lab_file(tmp_path, {"pve1": {**NODE, "ssh_prot": 2}, "pve2": {}}, {"gpu01": {**GUEST, "x": 1}}))

    assert "pve2: ssh_hostname: missing" in message
    assert "gpu01: x = 1: unknown key" in message


def test_host_outside_of_the_connectors_is_named(tmp_path: Path) -> None:
    path = tmp_path / "lab.py"
    path.write_text(f"nodes = [('pve1', {NODE!r})]\n")

    assert "pve1: written as 'pve1'; expected '@node/pve1'" in refused(path)


@pytest.mark.parametrize("key", ["vmid", "address", "gpu"])
def test_two_guests_share_no_id_address_or_gpu(tmp_path: Path, key: str) -> None:
    other = {**GUEST, "vmid": 102, "address": "192.0.2.102/24", "gpu": None}
    other[key] = {**GUEST, "gpu": "a4000"}[key]

    message = refused(lab_file(tmp_path, guests={"gpu01": GUEST, "gpu02": other}))

    assert re.search(rf"gpu02: {key} = .*: already used by gpu01", message)


@pytest.mark.parametrize(
    ("mine", "other", "used"),
    [
        (101, {}, "the vmid of gpu01"),
        (102, {}, "the vmid of gpu02"),
        (903, {"backup": {"spare_vmid": 903}}, "the spare_vmid of gpu02"),
        (904, {"keeper_vmid": 904}, "the keeper_vmid of gpu02"),
    ],
)
def test_keeper_has_an_id_of_its_own(tmp_path: Path, mine: int, other: dict[str, Any], used: str) -> None:
    second = {**GUEST, "vmid": 102, "address": "192.0.2.102/24", "gpu": None, **other}
    guests = {"gpu01": {**GUEST, "keeper_vmid": mine}, "gpu02": second}

    message = refused(lab_file(tmp_path, guests=guests))
    assert f"gpu01: keeper_vmid = {mine}: expected an id that nothing else has; it is {used}" in message
    guests["gpu01"]["keeper_vmid"] = 950
    assert inventory.load(lab_file(tmp_path, guests=guests)).guests["gpu01"].keeper_vmid == 950


def with_mac(mac: str, number: int, **card: Any) -> dict[str, Any]:
    """A guest with a second card of that MAC address."""
    address = {"address": f"192.0.2.{100 + number}/24", "gateway": "192.0.2.1"}
    return {**GUEST, **CARDS, "vmid": 100 + number, "gpu": None, "networks": [address, {"mac": mac, **card}]}


def test_two_guests_share_no_mac_on_a_bridge(tmp_path: Path) -> None:
    one = with_mac("bc:24:11:00:00:02", 1)

    assert (
        "gpu02: networks.1.mac = 'BC:24:11:00:00:02': already used by gpu01 on vmbr0; expected another one"
    ) in refused(lab_file(tmp_path, guests={"gpu01": one, "gpu02": with_mac("BC:24:11:00:00:02", 2)}))
    # Another bridge is another network.
    assert inventory.load(
        lab_file(tmp_path, guests={"gpu01": one, "gpu02": with_mac("BC:24:11:00:00:02", 2, bridge="vmbr1")})
    )


def test_nodes_of_one_cluster_share_a_bridge_by_its_name(tmp_path: Path) -> None:
    one, other = with_mac("bc:24:11:00:00:02", 1), {**with_mac("bc:24:11:00:00:02", 2), "node": "pve2"}
    guests: dict[str, object] = {"gpu01": one, "gpu02": other}

    assert inventory.load(lab_file(tmp_path, {"pve1": NODE, "pve2": {**NODE, "ssh_hostname": "192.0.2.12"}}, guests))
    nodes: dict[str, object] = {name: {**NODE, "cluster": "lab"} for name in ("pve1", "pve2")}
    assert "gpu02: networks.1.mac = 'bc:24:11:00:00:02': already used by gpu01" in refused(
        lab_file(tmp_path, nodes, guests)
    )


def node_with(pages: dict[str, object] | None) -> dict[str, Any]:
    devices = [{"name": "a4000", "address": "0000:01:00"}, {"name": "second", "address": "0000:02:00"}]
    return {**NODE, "passthrough": {"devices": devices, **({} if pages is None else {"hugepages": pages})}}


@pytest.mark.parametrize(
    ("pages", "wanted", "expected"),
    [
        (
            None,
            "1G",
            "gpu01: hugepages = '1G': pve1 sets no huge pages aside; expected `passthrough.hugepages` of pve1",
        ),
        (None, "any", "gpu01: hugepages = 'any': pve1 sets no huge pages aside"),
        (
            {"size": "2M", "count": 20000},
            "1G",
            "gpu01: hugepages = '1G': pve1 sets aside pages of 2M; expected '2M' (or another passthrough",
        ),
        ({"size": "1G", "count": 40}, "2M", "gpu01: hugepages = '2M': pve1 sets aside pages of 1G; expected '1G'"),
        (
            {"size": "1G", "count": 31},
            "1G",
            "pve1: passthrough.hugepages.count = 31: 31744 MiB, and its guests take gpu01 16384 + gpu02 16384 = "
            "32768 MiB; expected at least 32",
        ),
        ({"size": "2M", "count": 16383}, "any", "= 32768 MiB; expected at least 16384"),
        ({"size": "1G", "count": 32}, "1G", None),
        ({"size": "2M", "count": 16384}, "any", None),
    ],
)
def test_huge_pages_come_out_of_what_the_node_sets_aside(
    tmp_path: Path, pages: dict[str, object] | None, wanted: str, expected: str | None
) -> None:
    one = {**GUEST, "numa": True, "hugepages": wanted}
    other = {**one, "vmid": 102, "address": "192.0.2.102/24", "gpu": "second"}
    path = lab_file(tmp_path, {"pve1": node_with(pages)}, {"gpu01": one, "gpu02": other})

    if expected is None:
        assert inventory.load(path)
    else:
        assert expected in refused(path)


@pytest.mark.parametrize(
    ("program", "word", "of"),
    [
        ("deploy.py", "rollback", "rebuild.py"),
        ("deploy.py", "take_over", "rebuild.py"),
        ("deploy.py", "keep_old", "rebuild.py"),
        ("deploy.py", "destroy", "rebuild.py"),
        ("deploy.py", "keep", "restore.py"),
        ("restore.py", "confirm", "rebuild.py"),
        ("deploy.py", "from_backup", "milvus.py"),
        ("milvus.py", "upgrade_without_backup", "deploy.py"),
        ("rebuild.py", "fresh", "restore.py"),
        ("rebuild.py", "rollback", None),
        ("rebuild.py", "keep_old", None),
        ("restore.py", "archive", None),
        ("milvus.py", "from_backup", None),
        ("operations.proxmox.access.bootstrap", "rollback", None),
    ],
)
def test_word_of_another_program_is_refused(program: str, word: str, of: str | None) -> None:
    with click.Context(click.Command("pyinfra")) as command:
        command.params = {"operations": (f"some/where/{program}",)}
        if of is None:
            inventory._check_words([word, "cores"])
            return
        with pytest.raises(InventoryError) as caught:
            inventory._check_words(["cores", word])
    assert f"--data {word}=…: {program} does nothing with it" in str(caught.value)
    assert f"it is for {of} --limit GUEST" in str(caught.value)


def test_two_standalone_nodes_may_use_one_vmid(tmp_path: Path) -> None:
    other_node = {**NODE, "ssh_hostname": "192.0.2.12"}
    other = {**GUEST, "node": "pve2", "address": "192.0.2.102/24"}

    assert inventory.load(lab_file(tmp_path, {"pve1": NODE, "pve2": other_node}, {"gpu01": GUEST, "gpu02": other}))


def test_nodes_of_one_cluster_may_not_use_one_vmid(tmp_path: Path) -> None:
    nodes = {name: {**NODE, "cluster": "lab"} for name in ("pve1", "pve2")}
    other = {**GUEST, "node": "pve2", "address": "192.0.2.102/24"}

    assert "gpu02: vmid = '101': already used by gpu01" in refused(
        lab_file(tmp_path, nodes, {"gpu01": GUEST, "gpu02": other})
    )


def test_shipped_lab_names_only_what_a_user_has_to_fill_in() -> None:
    message = refused(Path("inventory/lab.py"), "ssh_public_key=ssh-ed25519 AAAA user@host")

    assert message.count("gpu01:") == 2
    assert "image.checksum" in message and "services.ollama.image" in message


def test_missing_file_is_no_traceback(tmp_path: Path) -> None:
    assert "no such inventory file" in refused(tmp_path / "nope.py")


def test_secrets_survive_and_are_private(tmp_path: Path) -> None:
    secrets = Secrets(tmp_path / "state")
    secrets.put("pve1", "api_token", "one")
    secrets.put("pve1", "password", "two", host="gpu01")

    assert secrets.get("pve1", "api_token") == "one"
    assert secrets.get("pve1", "password", "gpu01") == "two"
    assert secrets.path.stat().st_mode & 0o777 == 0o600


def test_a_key_is_made_once(tmp_path: Path) -> None:
    secrets = Secrets(tmp_path / "state")
    key = secrets.once("pve1", "containers.key")

    assert len(key) > 40
    assert Secrets(tmp_path / "state").once("pve1", "containers.key") == key
    assert secrets.once("pve1", "containers.key", "gpu01") != key


def test_environment_overrides_the_secrets_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Secrets(tmp_path).put("pve1", "api_token", "file")
    monkeypatch.setenv("GPULAB_SECRET_PVE1_API_TOKEN", "environment")

    assert Secrets(tmp_path).get("pve1", "api_token") == "environment"
    assert variable("lab", "key", "gpu-01") == "GPULAB_SECRET_LAB_GPU_01_KEY"


def test_readable_secrets_file_is_refused(tmp_path: Path) -> None:
    secrets = Secrets(tmp_path)
    secrets.put("pve1", "api_token", "s3cr3t")
    secrets.path.chmod(0o644)

    with pytest.raises(inventory.GpulabError, match="mode 0644") as caught:
        secrets.get("pve1", "api_token")
    assert "s3cr3t" not in str(caught.value)

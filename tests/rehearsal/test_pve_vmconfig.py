# SPDX-License-Identifier: MIT
"""What PVE makes of a VM's configuration: values read back from real nodes."""

from __future__ import annotations

import pytest

from rehearsal.pve import cloudinit, vmconfig
from rehearsal.pve.errors import ApiError
from rehearsal.pve.running import interfaces_view

MAC = "BC:24:11:00:00:01"


@pytest.mark.parametrize(
    ("key", "sent", "stored"),
    [
        ("tags", "GPU,iac gpulab;Zed", "gpu;gpulab;iac;zed"),
        ("tags", "", None),
        ("net0", "virtio,bridge=vmbr0", f"virtio={MAC},bridge=vmbr0"),
        ("net0", "virtio=bc:24:11:DE:e2:24,tag=5,bridge=vmbr0", "virtio=bc:24:11:DE:e2:24,bridge=vmbr0,tag=5"),
        ("net0", "model=virtio,bridge=vmbr0,macaddr=BC:24:11:00:00:09", "virtio=BC:24:11:00:00:09,bridge=vmbr0"),
        ("description", "two lines\n\n", "two lines"),
        ("description", "", None),
        ("boot", "", " "),
        ("memory", "2048", "2048"),
        ("cores", "4", 4),
        ("onboot", "1", 1),
        ("cipassword", "secret", "**********"),
        ("agent", "enabled=1,type=virtio", "enabled=1,type=virtio"),
        ("sshkeys", "ssh-ed25519%20AAAA%0A", "ssh-ed25519%20AAAA%0A"),
    ],
)
def test_value_is_stored_as_pve_does(key: str, sent: str, stored: object) -> None:
    assert vmconfig.normalised(key, sent, MAC) == stored


def test_disk_options_are_sorted_and_lose_what_only_the_request_needs() -> None:
    volume, options = vmconfig.parse_disk("file=local:101/a.raw,ssd=on,format=raw,iothread=no,discard=on,import-from=x")
    assert vmconfig.disk_text(volume, options) == "local:101/a.raw,discard=on,iothread=0,ssd=1"


@pytest.mark.parametrize(
    ("size", "text"), [(540672, "528K"), (64 * 1024**2, "64M"), (3 * 1024**3, "3G"), (1024**4, "1T"), (1001, "1001")]
)
def test_size_is_written_in_the_largest_unit(size: int, text: str) -> None:
    assert vmconfig.size_text(size) == text
    assert vmconfig.parse_size(text) == size


@pytest.mark.parametrize("value", ["mapping=a4000,pcie=1", "host=0000:01:00,rombar=0", "01:00.0;01:00.1,pcie=on"])
def test_hostpci_grammar_accepts(value: str) -> None:
    vmconfig.check_hostpci("hostpci0", value, "9.1.1")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a4000", "invalid format - format error\nhostpci0.host: value does not match the regex pattern\n"),
        ("host=0000:01:0G", "invalid format - format error\nhostpci0.host: value does not match the regex pattern\n"),
        ("mapping=a4000,bogus=1", "invalid format - invalid key in comma-separated list property: bogus\n"),
    ],
)
def test_hostpci_grammar_refuses(value: str, message: str) -> None:
    with pytest.raises(ApiError) as refused:
        vmconfig.check_hostpci("hostpci0", value, "9.1.1")
    assert refused.value.status == 400
    assert refused.value.errors == {"hostpci0": message}


def test_hostpci_driver_is_unknown_to_release_8() -> None:
    vmconfig.check_hostpci("hostpci0", "mapping=a4000,driver=keep", "9.1.1")
    with pytest.raises(ApiError):
        vmconfig.check_hostpci("hostpci0", "mapping=a4000,driver=keep", "8.4.21")


def test_user_data_is_what_pve_generates() -> None:
    """The text of GET cloudinit/dump?type=user of a real node."""
    config: dict[str, int | str] = {
        "name": "gpu",
        "ciuser": "debian",
        "sshkeys": "ssh-ed25519%20AAAAC3NzaC1lZDI1NTE5AAAAIPLACEHOLDER%20a%40b%0A",
    }
    assert cloudinit.user_data(101, config) == (
        "#cloud-config\nhostname: gpu\nmanage_etc_hosts: true\nfqdn: gpu\nuser: debian\nssh_authorized_keys:\n"
        "  - ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPLACEHOLDER a@b\nchpasswd:\n  expire: False\nusers:\n  - default\n"
        "package_upgrade: true\n"
    )


def test_instance_id_follows_the_network_and_not_the_vendor_data() -> None:
    """cloud-init then runs once more after a new address, and not after another snippet."""
    config: dict[str, int | str] = {"net0": f"virtio={MAC},bridge=vmbr0", "ipconfig0": "ip=10.0.0.5/24,gw=10.0.0.1"}
    before = cloudinit.meta_data(101, config)
    assert cloudinit.meta_data(101, config | {"cicustom": "vendor=local:snippets/a.yml"}) == before
    assert cloudinit.meta_data(101, config | {"ipconfig0": "ip=10.0.0.6/24,gw=10.0.0.1"}) != before


def test_network_config_for_a_container_names_its_interface_and_no_mac() -> None:
    config: dict[str, int | str] = {
        "net0": f"virtio={MAC},bridge=vmbr0",
        "ipconfig0": "ip=10.0.0.5/24,gw=10.0.0.1",
        "nameserver": "10.0.0.2",
    }
    text = cloudinit.network_config(config, interface="host0")
    assert "name: host0" in text
    assert MAC.lower() not in text
    assert "netmask: '255.255.255.0'" in text
    assert "gateway: '10.0.0.1'" in text
    assert "- '10.0.0.2'" in text


def test_agent_interfaces_are_read_from_ip() -> None:
    links = "1: lo: <UP> mtu 65536 \\    link/loopback 00:00:00:00:00:00 brd 00:00:00:00:00:00\n"
    links += "2: host0@if9: <UP> mtu 1500 \\    link/ether ee:e1:84:27:31:73 brd ff:ff:ff:ff:ff:ff\n"
    addresses = "2: host0    inet 10.0.0.5/24 brd 10.0.0.255 scope global host0\\  valid_lft forever\n"
    host0 = interfaces_view(addresses, links)[1]
    assert host0["name"] == "host0"
    assert host0["hardware-address"] == "ee:e1:84:27:31:73"
    assert host0["ip-addresses"] == [{"ip-address": "10.0.0.5", "ip-address-type": "ipv4", "prefix": 24}]

# SPDX-License-Identifier: MIT
"""Real hosts: up, crash, down, and what is left on the machine. In a lab of its own beside any that is up."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from rehearsal import host, image, lab, machine, network, paths, processes
from rehearsal.host import HostSpec

pytestmark = pytest.mark.lab
SUBNET = "10.66.99.0/24"


@pytest.fixture
def own_lab(tmp_path_factory, monkeypatch):
    """A lab folder and subnet of this test, with the image of the real cache. It is down before and after."""
    machine.check()
    ready = image.ensure().parent.parent
    folder = tmp_path_factory.mktemp("lab")
    monkeypatch.setenv("GPULAB_CACHE", str(folder))
    monkeypatch.setenv("GPULAB_SUBNET", SUBNET)
    (folder / "image").symlink_to(ready)
    yield network.current()
    lab.down()


@pytest.fixture
def guest(own_lab):
    """A started host with a data disk on /dev/sdb, and without cloud-init."""
    network.up(own_lab)
    paths.lab().mkdir(exist_ok=True)
    disk = paths.lab() / "data.raw"
    with open(disk, "wb") as file:
        file.truncate(64 << 20)
    loop = subprocess.run(
        ["losetup", "--find", "--show", disk], capture_output=True, text=True, check=True
    ).stdout.strip()
    spec = HostSpec(
        name="gpu01",
        address=own_lab.address(101),
        gateway=own_lab.gateway,
        lower=image.root(),
        upper=paths.lab() / "disks" / "101",
        devices=[("/dev/sdb", "b", 7, int(loop.removeprefix("/dev/loop")))],
    )
    host.start(spec)
    _wait_booted("gpu01")
    return spec


def _wait_booted(name: str) -> None:
    deadline = time.monotonic() + 60
    while (done := _sh(name, "systemctl is-system-running --wait || true")).stdout.strip() in ("", "offline"):
        assert time.monotonic() < deadline, done
    assert done.stdout == "running\n"


def _sh(name: str, script: str) -> subprocess.CompletedProcess[str]:
    deadline = time.monotonic() + 30
    while True:
        done = host.run(name, ["sh", "-ec", script], timeout=60)
        # In the first moments of a boot there is no bus to ask.
        if "Failed to connect to" not in done.stderr or time.monotonic() > deadline:
            return done
        time.sleep(0.1)


def _left_behind(net: network.Network) -> list[str]:
    """Everything on the machine that carries the lab's name or folder."""
    folder = str(paths.cache())
    found = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f"{folder}/lab" in line]
    found += [str(path) for path in Path("/sys/fs/cgroup").rglob(f"*-{net.bridge}*")]
    found += [str(path) for path in Path("/sys/class/net").iterdir() if path.name == net.bridge]
    found += [str(path) for path in Path("/run/systemd/nspawn").glob(f"*/*-{net.bridge}")]
    loops = subprocess.run(["losetup", "--json", "--list"], capture_output=True, text=True, check=True).stdout
    found += [line for line in loops.splitlines() if folder in line]
    tables = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout
    found += [line for line in tables.splitlines() if line.endswith(net.bridge)]
    found += [str(process) for process in processes.members()] + [str(entry) for entry in host.inits()]
    return found


def _kill_everything() -> None:
    """What a crash or an impatient user does to the lab's processes on the control machine."""
    killed = processes.members()
    for process in killed:
        process.send(signal.SIGKILL)
    assert processes.wait_gone(killed, 5) == []


def _reboot(name: str) -> None:
    before = host.boot_id(name)
    host.request_reboot(name)
    deadline = time.monotonic() + 30
    while host.boot_id(name) in (None, before):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    _wait_booted(name)


def test_disk_is_mounted_by_uuid_in_the_same_boot_and_after_a_reboot(guest):
    made = _sh(
        "gpu01",
        "mkfs.ext4 -q /dev/sdb; mkdir /srv/data;"
        'uuid=$(blkid -s UUID -o value /dev/sdb); echo "UUID=$uuid /srv/data ext4 defaults,nofail 0 2" >> /etc/fstab;'
        "systemctl daemon-reload; timeout 5 sh -c 'until [ -n \"$(ls /dev/disk/by-uuid)\" ]; do sleep 0.05; done';"
        "systemctl start srv-data.mount; echo kept > /srv/data/file",
    )
    assert made.returncode == 0, made.stderr
    _reboot("gpu01")
    assert _sh("gpu01", "findmnt -n -o SOURCE /srv/data; cat /srv/data/file").stdout == "/dev/sdb\nkept\n"


def test_time_service_counts_as_active(guest):
    assert _sh("gpu01", "systemctl is-active systemd-timesyncd").stdout == "active\n"


def test_stop_powers_off_and_leaves_nothing_of_the_host(guest):
    host.stop("gpu01")
    assert not host.running("gpu01")
    assert not [line for line in _left_behind(network.current()) if "gpu01" in line]


def test_host_can_be_started_again_and_keeps_its_files(guest):
    _sh("gpu01", "echo kept > /root/file")
    host.stop("gpu01")
    host.start(guest)
    _wait_booted("gpu01")
    assert _sh("gpu01", "cat /root/file").stdout == "kept\n"


def test_down_after_kill_9_of_everything_leaves_nothing(guest, own_lab):
    _sh("gpu01", "mkfs.ext4 -q /dev/sdb; mount /dev/sdb /mnt")
    _kill_everything()
    # Nobody looks after the container any more, and it runs on.
    assert not host.running("gpu01")
    lab.down()
    assert _left_behind(own_lab) == []


def test_killed_host_can_be_started_again(guest):
    _kill_everything()
    host.start(guest)
    _wait_booted("gpu01")
    assert len(host.inits()) == 1


def test_node_gives_the_card_to_vfio_after_a_reboot_only(own_lab):
    lab.up()
    node = "pve1"
    assert json.loads((paths.lab() / "lab.json").read_text())["nodes"] == {node: own_lab.address(11)}
    _sh(
        node,
        "echo 'options vfio-pci ids=10de:24b0,10de:228b' > /etc/modprobe.d/x.conf;"
        "echo 'softdep nouveau pre: vfio-pci' >> /etc/modprobe.d/x.conf; update-initramfs -u -k all",
    )
    assert "Kernel driver in use: nouveau" in _sh(node, "lspci -nnk -s 01:00.0").stdout
    _reboot(node)
    assert "Kernel driver in use: vfio-pci" in _sh(node, "lspci -nnk -s 01:00.0").stdout
    lab.up()  # beside itself: says so and changes nothing
    assert lab.down()
    assert _left_behind(own_lab) == []

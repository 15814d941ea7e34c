# SPDX-License-Identifier: MIT
"""VMs as containers: a system disk is an overlay on an image of the lab, a data disk a loop device, the agent a way in.

Each volume is a folder. What a VM start hands over (seed, disks, devices of the card) becomes files of the guest.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from inventory import GpulabError
from rehearsal import host, paths
from rehearsal.host import Device, HostSpec
from rehearsal.nvidia import guest as nvidia_guest
from rehearsal.pve import images
from rehearsal.pve.errors import TaskError
from rehearsal.pve.power import GuestStart, PciDevice
from rehearsal.pve.state import Volume

# Where a guest finds what the lab says about its hardware.
GPU_FILE = "/var/lib/lab-hardware/gpu.json"
_LINKS_FILE = "/etc/tmpfiles.d/lab-disk-links.conf"
_AGENT = "/usr/sbin/qemu-ga"
# The folder of the `local` storage on the node.
_LOCAL = "/var/lib/vz"
# Folders that cannot lie on an overlay because Docker and Podman make overlays of their own there.
_REAL_FOLDERS = ("docker", "containerd", "containers")
_NAMESPACE = uuid.UUID("6c2f6f6e-7a52-4a49-9c0c-3a0f7f1f6d53")
_POLL_S = 0.1
# A tree with all that an overlay's upper folder needs: owners, white-outs, the overlay's own attributes.
_TREE = ("--numeric-owner", "--xattrs", "--xattrs-include=*", "--acls", "--warning=no-file-ignored")


@dataclass(frozen=True)
class ContainerPower:
    """`folder` holds the node's volumes; `names` is the file that says which host of the lab a VM was last."""

    node: str
    folder: Path
    names: Path
    lock: threading.Lock

    def running(self, vmid: int) -> bool:
        return self._name(vmid) is not None

    def start(self, guest: GuestStart) -> None:
        """Start the VM's container; it boots on after this returns, as a VM does."""
        if guest.system is None:
            raise TaskError("the rehearsal lab only boots disks imported from its image (simulated)")
        system = self._path(guest.system)
        name = self._claim(guest, system)
        links, devices = [], []
        for letter, (slot, volume) in zip("bcdefghijklmnop", guest.data, strict=False):
            major, minor = _loop(self._raw(volume))
            disk: Device = (f"/dev/sd{letter}", "b", major, minor)
            devices.append(disk)
            links.append(_link(slot, disk[0]))
        files = {_LINKS_FILE: ("".join(links), 0o644)}
        # Undeclared since the last start, the card must not still be there.
        (system / "up" / GPU_FILE.lstrip("/")).unlink(missing_ok=True)
        if guest.gpus:
            files |= {GPU_FILE: (gpu_file(guest.node, guest.gpus), 0o644), **nvidia_guest.files()}
        spec = HostSpec(
            name=name,
            address=guest.address.partition("/")[0],
            gateway=guest.gateway,
            lower=images.root_of(guest.system.origin),
            upper=system,
            binds=[f"{system / part}:/var/lib/{part}" for part in _REAL_FOLDERS],
            seed=dict(guest.seed),
            files=files,
            devices=devices,
            link_up=guest.link_up,
        )
        try:
            host.start(spec)
        except GpulabError as error:
            raise TaskError(f"start failed: {error.brief} (simulated)") from error

    def stop(self, vmid: int) -> None:
        name = self._name(vmid)
        if name is not None:
            host.stop(name, timeout=0)

    def shutdown(self, vmid: int, timeout: float) -> bool:
        """Power the guest off as ACPI would: its init decides."""
        deadline = time.monotonic() + timeout
        asked = False
        while (name := self._name(vmid)) is not None:
            if not asked and host.leader(name) is not None:
                asked = host.run(name, ["systemctl", "--no-block", "poweroff"]).returncode == 0
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True

    def agent_runs(self, vmid: int) -> bool:
        """The agent's package is installed (cloud images come without it) and the guest is up."""
        name = self._name(vmid)
        if name is None or host.leader(name) is None:
            return False
        return host.inside(host.root(name), _AGENT).exists()

    def run(self, vmid: int, argv: Sequence[str], stdin: bytes) -> subprocess.CompletedProcess[bytes]:
        name = self._name(vmid) or ""
        try:
            words = [*host.enter(name), *argv]
        except GpulabError as error:
            raise TaskError("QEMU guest agent is not running") from error
        return subprocess.run(words, input=stdin, capture_output=True, check=False)

    def attach(self, vmid: int, slot: str, volume: Volume) -> None:
        """Make the disk's node and link in the running guest; at the next start they are made at boot."""
        major, minor = _loop(self._raw(volume))
        script = (
            "for letter in b c d e f g h; do [ -e /dev/sd$letter ] || break; done; "
            f"mknod -m 660 /dev/sd$letter b {major} {minor}; mkdir -p /dev/disk/by-id; "
            f'ln -sfn ../../sd$letter "/dev/disk/by-id/{_disk_id(slot)}"'
        )
        self.run(vmid, ["sh", "-c", script], b"")

    def resize(self, vmid: int, volume: Volume) -> None:
        if volume.origin:
            # A folder has no size; the configuration says what was asked for.
            return
        raw = self._raw(volume)
        os.truncate(raw, volume.size)
        for device in _loops_of(raw):
            _checked("losetup", "--set-capacity", device)

    def create_volume(self, volume: Volume) -> None:
        folder = self._path(volume)
        if volume.origin:
            for part in ("up", "work", *_REAL_FOLDERS):
                (folder / part).mkdir(parents=True, exist_ok=True)
            return
        folder.mkdir(parents=True, exist_ok=True)
        with self._raw(volume).open("wb") as file:
            file.truncate(volume.size)

    def remove_volume(self, volume: Volume) -> None:
        _detach(self._raw(volume))
        shutil.rmtree(self._path(volume), ignore_errors=True)

    def rename_volume(self, old: Volume, new: Volume) -> None:
        _detach(self._raw(old))
        self._path(new).parent.mkdir(parents=True, exist_ok=True)
        self._path(old).rename(self._path(new))

    def freeze(self, vmid: int) -> None:
        """Freeze the guest's data disks; its system tree lies on an overlay, which cannot be (simulated)."""
        self._fsfreeze(vmid, "--freeze")

    def thaw(self, vmid: int) -> None:
        self._fsfreeze(vmid, "--unfreeze")

    def _fsfreeze(self, vmid: int, action: str) -> None:
        script = (
            "findmnt --noheadings --raw --output SOURCE,TARGET --types ext2,ext3,ext4,xfs,btrfs | "
            f'while read -r source target; do case "$source" in /dev/sd*) fsfreeze {action} "$target" || exit 1;; '
            "esac; done"
        )
        done = self.run(vmid, ["sh", "-c", script], b"")
        if done.returncode:
            raise TaskError(f"Agent error: fsfreeze failed: {done.stderr.decode(errors='replace').strip()}")

    def pack(self, target: Path, volumes: Mapping[str, Volume]) -> None:
        """A zstd-compressed tar with a folder for each drive: a system disk's trees, or the sparse `disk.raw`.

        Files of a running guest's system may change while they are read: as after a power failure, but not all of
        the same moment.
        """
        with tempfile.TemporaryDirectory(prefix="gpulab-vzdump-") as names:
            found = []
            for key, volume in sorted(volumes.items()):
                # The name in the archive is the drive's, whatever the volume's folder is called.
                link, folder = Path(names) / _drive(key), self._path(volume)
                link.symlink_to(folder)
                parts = ("up", *_REAL_FOLDERS) if volume.origin else ("disk.raw",)
                found += [f"{link.name}/{part}" for part in parts if (folder / part).exists()]
            compress = "--use-compress-program=zstd -1 -T0"
            _checked_tar("--create", "--sparse", *_TREE, compress, f"--file={target}", f"--directory={names}", *found)

    def unpack(self, source: Path, volumes: Mapping[str, Volume]) -> None:
        """Unpacked beside the volumes first and then moved in: a volume has all of it or nothing."""
        scratch = self.folder / f".restore-{uuid.uuid4()}"
        scratch.mkdir(parents=True)
        try:
            _checked_tar("--extract", *_TREE, "--zstd", f"--file={source}", f"--directory={scratch}")
            for key, volume in volumes.items():
                for part in (scratch / _drive(key)).iterdir():
                    kept = self._path(volume) / part.name
                    shutil.rmtree(kept) if kept.is_dir() else kept.unlink(missing_ok=True)
                    part.rename(kept)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def snippet(self, volume_path: str) -> str | None:
        path = host.inside(host.root(self.node), f"{_LOCAL}/{volume_path}")
        return path.read_text() if path.is_file() else None

    def reboot_node(self) -> None:
        host.request_reboot(self.node)

    def _path(self, volume: Volume) -> Path:
        return self.folder / volume.storage / volume.name

    def _raw(self, volume: Volume) -> Path:
        return self._path(volume) / "disk.raw"

    def _name(self, vmid: int) -> str | None:
        """The running host that is this VM; None when it is stopped.

        A name alone proves nothing, since another VM may have it by now: the system disk does.
        """
        name, system = self._known().get(str(vmid), ("", ""))
        return name if name and host.running(name) and _disk_of(name) == system else None

    def _known(self) -> dict[str, tuple[str, str]]:
        """VM id to (host, path of its system disk), of each VM's last start."""
        try:
            known: dict[str, tuple[str, str]] = json.loads(self.names.read_text())
        except FileNotFoundError:
            return {}
        return known

    def _claim(self, guest: GuestStart, system: Path) -> str:
        """The name that the guest's host gets: the VM's, unless another host of the lab runs under it."""
        with self.lock:
            name = f"{guest.name}-{guest.node}-{guest.vmid}" if host.running(guest.name) else guest.name
            known = {**self._known(), str(guest.vmid): (name, str(system))}
            scratch = self.names.with_suffix(".new")
            scratch.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_text(json.dumps(known))
            scratch.replace(self.names)
        return name


def _disk_of(name: str) -> str:
    """The folder that a host of the lab was started from."""
    try:
        return str(json.loads((paths.host(name) / "spec.json").read_text())["upper"])
    except FileNotFoundError:
        return ""


def gpu_file(node: str, devices: Sequence[PciDevice]) -> str:
    """What the guest is told about its cards: `devices`, each with address, class, id, subsystem, uuid.

    Each host slot becomes a slot of its own in the guest, from 01:00 on; the UUID stays with the host's card.
    """
    slots = list(dict.fromkeys(device.address.rpartition(".")[0] for device in devices))
    entries = []
    for device in devices:
        slot, _, function = device.address.rpartition(".")
        entries.append(
            {
                "address": f"0000:{slots.index(slot) + 1:02x}:00.{function}",
                "class": device.pci_class,
                "id": f"{device.vendor}:{device.device}",
                "subsystem": f"{device.subsystem_vendor or '0000'}:{device.subsystem_device or '0000'}",
                "name": device.name,
                "uuid": f"GPU-{uuid.uuid5(_NAMESPACE, f'{node}/{slot}')}",
                "host": f"{node}/{device.address}",
            }
        )
    return json.dumps({"simulated": True, "devices": entries}, indent=1) + "\n"


def _disk_id(slot: str) -> str:
    """QEMU's name for a disk, as udev links it."""
    return f"scsi-0QEMU_QEMU_HARDDISK_drive-{slot}"


def _link(slot: str, device: str) -> str:
    """A tmpfiles.d line: no udev runs in a container."""
    return f"L+ /dev/disk/by-id/{_disk_id(slot)} - - - - ../../{device.rpartition('/')[2]}\n"


def _drive(key: str) -> str:
    """A drive's folder in an archive."""
    return f"drive-{key}"


def _checked_tar(*argv: str) -> None:
    """tar's status 1 says that files changed while it read them, which a running guest's do."""
    # It ends with the front: nobody would wait for it.
    words = ["setpriv", "--pdeathsig", "KILL", "--", "tar", *argv]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise TaskError(f"`tar {argv[0]}` ended with {done.returncode}: {done.stderr.strip()[-500:]} (simulated)")


def _loop(raw: Path) -> tuple[int, int]:
    """(major, minor) of the loop device on a file, attached now unless it is already."""
    known = _loops_of(raw)
    device = known[0] if known else _checked("losetup", "--find", "--show", str(raw)).strip()
    number = os.stat(device).st_rdev
    return os.major(number), os.minor(number)


def _loops_of(raw: Path) -> list[str]:
    lines = _checked("losetup", "--noheadings", "--output", "NAME", "--associated", str(raw)).splitlines()
    return [line.strip() for line in lines if line.strip()]


def _detach(raw: Path) -> None:
    if raw.exists():
        for device in _loops_of(raw):
            _checked("losetup", "--detach", device)


def _checked(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TaskError(f"`{' '.join(argv)}` ended with {done.returncode}: {done.stderr.strip()} (simulated)")
    return done.stdout

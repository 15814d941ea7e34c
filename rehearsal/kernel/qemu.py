# SPDX-License-Identifier: MIT
"""The QEMU process of a kernel machine: whether this computer can run it, how fast, and its command line."""

from __future__ import annotations

import functools
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rehearsal.kernel.pci_device import Function
from rehearsal.kernel.topology import TOPOLOGY, Part

QEMU = "qemu-system-x86_64"
#: Every Debian package that the kernel tier needs on the control machine, and what for.
PACKAGES = {
    "qemu-system-x86": "runs the kernel machines",
    "qemu-utils": "makes their disks' overlays",
    "gdisk": "partitions their disk",
    "mmdebstrap": "builds their root file system",
    "debian-archive-keyring": "verifies its packages",
    "e2fsprogs": "makes the file system on the disk",
    "openssh-client": "SSH keys and connections",
}
#: A program of each, and which package has it.
PROGRAMS = {
    QEMU: "qemu-system-x86",
    "qemu-img": "qemu-utils",
    "sgdisk": "gdisk",
    "mmdebstrap": "mmdebstrap",
    "mke2fs": "e2fsprogs",
    "ssh": "openssh-client",
}
#: Where Debian keeps programs that a user's PATH may leave out.
SEARCH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

Iommu = Literal["intel", "amd"]
Accelerator = Literal["kvm", "tcg"]
VENDORS: dict[Iommu, str] = {"intel": "GenuineIntel", "amd": "AuthenticAMD"}
IOMMUS: dict[Iommu, str] = {"intel": "intel-iommu,intremap=on,caching-mode=on", "amd": "amd-iommu"}

#: The probe's guest ends QEMU with this: isa-debug-exit makes 2n+1 of the value 42.
PROBE_STATUS = 85
#: TCG needs 0.2 s for it, a KVM that works far less.
PROBE_S = 5.0


@dataclass(frozen=True)
class Spec:
    """What one QEMU process is started with. `port`: the guest's SSH on 127.0.0.1. Sizes in MiB."""

    disk: Path
    serial: Path
    port: int
    iommu: Iommu = "intel"
    accelerator: Accelerator = "tcg"
    parts: tuple[Part, ...] = TOPOLOGY
    memory_mib: int = 1024
    #: More than one is not much faster, and two that reach for the same function of ours can lock QEMU 7.2 up: each
    #: holds the lock that the other needs (its own one lock, and the function's).
    cpus: int = 1

    def functions(self) -> list[Function]:
        """Those parts that we serve, in their order."""
        return [part.what for part in self.parts if isinstance(part.what, Function)]

    def plain(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            **vars(self),
            "disk": str(self.disk),
            "serial": str(self.serial),
            "parts": [part.plain() for part in self.parts],
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Spec:
        parts = tuple(Part.from_plain(part) for part in plain["parts"])
        return cls(**{**plain, "disk": Path(plain["disk"]), "serial": Path(plain["serial"]), "parts": parts})


def missing() -> str:
    """Why no kernel machine can run here; empty when one can."""
    if platform.machine() != "x86_64":
        return f"the kernel machines' disk is built on x86_64 alone, this is {platform.machine()}"
    absent = [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]
    if absent:
        packages = " ".join(PROGRAMS[name] for name in absent)
        return f"no {', '.join(absent)} here; `apt-get install --no-install-recommends {packages}`"
    return ""


def command(spec: Spec, qmp: int, functions: Sequence[int]) -> list[str]:
    """QEMU's command line. `qmp` and `functions` are descriptors of sockets that it inherits, one for each function."""
    # A warm reset under TCG can hang in GRUB for minutes, so a reset ends this process instead; it waits (-no-shutdown)
    # until it is told to quit, so that why it stopped is always known.
    words = [
        QEMU, "-nodefaults", "-display", "none", "-no-reboot", "-no-shutdown",
        "-machine", "q35,kernel-irqchip=split,usb=off,vmport=off,sata=off,smbus=off,memory-backend=memory",
        # The protocol of our functions shares the guest's memory.
        "-object", f"memory-backend-memfd,id=memory,size={spec.memory_mib}M,share=on", "-m", str(spec.memory_mib),
        "-accel", "kvm" if spec.accelerator == "kvm" else "tcg,thread=multi",
        "-cpu", f"{'host' if spec.accelerator == 'kvm' else 'qemu64'},vendor={VENDORS[spec.iommu]}",
        "-smp", str(spec.cpus),
        "-chardev", f"socket,id=qmp,fd={qmp}", "-mon", "chardev=qmp,mode=control",
        "-chardev", f"file,id=serial,path={spec.serial},append=on", "-serial", "chardev:serial",
        "-device", IOMMUS[spec.iommu],
        "-drive", f"file={spec.disk},if=none,id=disk,cache=unsafe,discard=unmap",
        "-device", "virtio-blk-pci,drive=disk,bus=pcie.0,addr=8.0",
        "-netdev", f"user,id=network,ipv6=off,hostfwd=tcp:127.0.0.1:{spec.port}-:22",
        "-device", "virtio-net-pci,netdev=network,romfile=,bus=pcie.0,addr=9.0",
        "-object", "rng-random,id=random,filename=/dev/urandom",
        "-device", "virtio-rng-pci,rng=random,bus=pcie.0,addr=a.0",
    ]  # fmt: skip
    descriptors = iter(functions)
    for part in spec.parts:
        words += ["-device", ",".join(_device(part, descriptors))]
    return words


def _device(part: Part, descriptors: Iterator[int]) -> list[str]:
    place = [f"bus={part.bus}", f"addr={part.slot}"]
    if isinstance(part.what, str):
        return [part.what, *place]
    extra = ["multifunction=on"] if part.what.multifunction else []
    return ["x-pci-proxy-dev", f"fd={next(descriptors)}", *place, *extra]


@functools.cache
def accelerator() -> Accelerator:
    """KVM when it really runs a guest's code, else TCG. That /dev/kvm opens and makes a virtual CPU proves nothing."""
    return "kvm" if runs("kvm") else "tcg"


def runs(name: Accelerator) -> bool:
    """Does a guest of 33 million loops end as it should with this accelerator?"""
    with tempfile.NamedTemporaryFile(suffix=".rom") as rom:
        rom.write(probe_rom())
        rom.flush()
        argv = [
            QEMU, "-nodefaults", "-display", "none", "-machine", "q35,kernel-irqchip=split", "-accel", name, "-m", "64",
            "-device", "isa-debug-exit,iobase=0xf4,iosize=1", "-bios", rom.name,
        ]  # fmt: skip
        try:
            done = subprocess.run(argv, capture_output=True, timeout=PROBE_S, check=False)
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == PROBE_STATUS


def probe_rom() -> bytes:
    """64 KiB of firmware: from the reset vector into a long loop, then `out 0xf4, 42`."""
    code = bytes([
        0x66, 0xB9, 0x00, 0x00, 0x00, 0x02,  # mov ecx, 0x2000000
        0x66, 0x49,  # dec ecx
        0x75, 0xFC,  # jnz to the line above
        0xBA, 0xF4, 0x00,  # mov dx, 0xf4
        0xB0, 0x2A,  # mov al, 42
        0xEE,  # out dx, al
        0xF4, 0xEB, 0xFD,  # hlt, for ever
    ])  # fmt: skip
    start, vector = 0xFF00, 0xFFF0
    rom = bytearray(b"\xf4" * 0x10000)
    rom[start : start + len(code)] = code
    # jmp near, relative to the instruction behind it
    rom[vector : vector + 3] = b"\xe9" + ((start - vector - 3) & 0xFFFF).to_bytes(2, "little")
    return bytes(rom)

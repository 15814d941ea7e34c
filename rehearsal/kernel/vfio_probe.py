# SPDX-License-Identifier: MIT
"""`python3 vfio_probe.py 0000:01:00.0`: use a PCI function as QEMU would, through vfio, and say in JSON what is there.

It runs in the machine, alone and with Python's standard library. It writes nothing but the bit of the command register
that lets the function answer at its BAR.

While a function is given to vfio and taken back, nothing else should happen in the machine, and its answer is printed
after that: with `iommu=pt`, QEMU 7.2's Intel IOMMU drops interrupts that come meanwhile (its log then says "Blocked
re-entrant IO on MemoryRegion: vtd-ir"), and a disk or network card that lost one is silent for ever.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import mmap
import os
import struct
import sys
import time
from typing import Any

#: Requests of linux/vfio.h: _IO(';', 100 + n).
GET_API_VERSION, CHECK_EXTENSION, SET_IOMMU, GROUP_GET_STATUS, GROUP_SET_CONTAINER = (0x3B64 + n for n in range(5))
GROUP_GET_DEVICE_FD, DEVICE_GET_INFO, DEVICE_GET_REGION_INFO = (0x3B6A + n for n in range(3))
API_VERSION = 0
TYPE1_V2 = 3
VIABLE = 1
#: argsz, flags, index, capability offset, size, offset in the device's file
REGION = struct.Struct("<IIIIQQ")
BAR0_REGION, CONFIG_REGION = 0, 7
COMMAND, MEMORY_ENABLED = 4, 2
PAGE = 4096


def probe(address: str) -> dict[str, Any]:
    """The function at `address` through vfio: its group, whether all of the group is free, and what BAR 0 shows.

    Raises:
        OSError: it is in no group, its driver is not vfio-pci, or somebody else uses it.
    """
    group = os.path.basename(os.readlink(f"/sys/bus/pci/devices/{address}/iommu_group"))
    with contextlib.ExitStack() as stack:

        def opened(path: str) -> int:
            descriptor = os.open(path, os.O_RDWR)
            stack.callback(os.close, descriptor)
            return descriptor

        container = opened("/dev/vfio/vfio")
        version, type1 = fcntl.ioctl(container, GET_API_VERSION), fcntl.ioctl(container, CHECK_EXTENSION, TYPE1_V2)
        if version != API_VERSION or not type1:
            raise OSError("this kernel's vfio has another interface, or no type 1 IOMMU")
        members = opened(f"/dev/vfio/{group}")
        status = bytearray(struct.pack("<II", 8, 0))
        fcntl.ioctl(members, GROUP_GET_STATUS, status)
        if not struct.unpack("<II", status)[1] & VIABLE:
            # Some other member belongs to a driver of the node: vfio gives out nothing of the group.
            return {"group": int(group), "viable": False, "device_id": None, "bar0_size": None, "word0": None}
        fcntl.ioctl(members, GROUP_SET_CONTAINER, struct.pack("<i", container))
        fcntl.ioctl(container, SET_IOMMU, TYPE1_V2)
        device = _device(members, address)
        stack.callback(os.close, device)
        return {"group": int(group), "viable": True, **_look(device)}


def _look(device: int) -> dict[str, Any]:
    """PCI id, bytes of BAR 0 and the 32-bit word at its begin (None without a BAR 0)."""
    _, config = _region(device, CONFIG_REGION)
    vendor, product, command = struct.unpack("<HHH", os.pread(device, 6, config))
    os.pwrite(device, struct.pack("<H", command | MEMORY_ENABLED), config + COMMAND)
    size, offset = _region(device, BAR0_REGION)
    word0 = None
    if size:
        with mmap.mmap(device, PAGE, mmap.MAP_SHARED, mmap.PROT_READ, offset=offset) as memory:
            # One access of four bytes, as a driver makes it: slices are copied byte by byte.
            with memoryview(memory) as view, view.cast("I") as words:
                word0 = words[0]
    return {"device_id": f"{vendor:04x}:{product:04x}", "bar0_size": size, "word0": word0}


def _device(group: int, address: str) -> int:
    """A descriptor of the function. Not with `fcntl.ioctl`: that would take the answer for the changed argument."""
    libc = ctypes.CDLL(None, use_errno=True)
    device = libc.ioctl(group, ctypes.c_ulong(GROUP_GET_DEVICE_FD), ctypes.c_char_p(address.encode()))
    if device < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), address)
    return int(device)


def _region(device: int, index: int) -> tuple[int, int]:
    """Size of a region, and where it begins in the device's file."""
    region = bytearray(REGION.pack(REGION.size, 0, index, 0, 0, 0))
    fcntl.ioctl(device, DEVICE_GET_REGION_INFO, region)
    *_, size, offset = REGION.unpack(region)
    return size, offset


if __name__ == "__main__":
    # What brought this program here, over the network, is over by then, and so is what the disk has to do.
    os.sync()
    time.sleep(0.5)
    answer = probe(sys.argv[1])
    time.sleep(0.5)
    print(json.dumps(answer))

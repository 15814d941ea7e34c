# SPDX-License-Identifier: MIT
"""What a guest of the lab shows of the GPU it was given, before any driver: the device in /sys/bus/pci/devices.

`files()` is for whoever starts a guest; the program itself runs in the guest at boot, as lab-gpu.service, from a copy
of this file, and so needs nothing but the standard library. What the guest was given stands in gpu.json:
`{"simulated": true, "devices": [{"address": "0000:01:00.0", "class": "0x030000", "id": "10de:24b0", "subsystem":
"10de:14ad", "uuid": "GPU-…"}, …]}`; without that file it has no GPU.
"""

from __future__ import annotations

import json
import struct
import subprocess
from pathlib import Path
from typing import Any

HARDWARE = Path("/var/lib/lab-hardware")
LAID_OUT = Path("/run/lab-hardware/pci")
DEVICES = Path("/sys/bus/pci/devices")
REVISION = 0xA1

PROGRAM = "/usr/lib/lab-hardware/guest.py"
UNIT = "/etc/systemd/system/lab-gpu.service"
UNIT_TEXT = f"""\
[Unit]
Description=Show the simulated PCI devices that this guest was given
DefaultDependencies=no
After=local-fs.target systemd-tmpfiles-setup.service
Before=sysinit.target
ConditionPathExists={HARDWARE}/gpu.json

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/bin/python3 -IS {PROGRAM}

[Install]
WantedBy=sysinit.target
"""


def files() -> dict[str, tuple[str, int]]:
    """Path to (text, mode): what each guest's root must hold, the unit switched on."""
    return {
        PROGRAM: (Path(__file__).read_text(), 0o644),
        UNIT: (UNIT_TEXT, 0o644),
        "/etc/systemd/system/sysinit.target.d/lab-gpu.conf": ("[Unit]\nWants=lab-gpu.service\n", 0o644),
    }


def lay_out(device: dict[str, Any], root: Path) -> None:
    """One device's folder, with what lspci reads: ids, class and 256 bytes of configuration space."""
    vendor, product = (int(part, 16) for part in device["id"].split(":"))
    sub_vendor, sub_product = (int(part, 16) for part in device["subsystem"].split(":"))
    kind = int(device["class"], 16)
    config = bytearray(256)
    struct.pack_into("<HH", config, 0x00, vendor, product)
    # The revision's byte and the class's three are one word.
    struct.pack_into("<I", config, 0x08, kind << 8 | REVISION)
    # Header type: function 0 says that there are others.
    config[0x0E] = 0x80
    struct.pack_into("<HH", config, 0x2C, sub_vendor, sub_product)
    folder = root / device["address"]
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {
        "vendor": f"0x{vendor:04x}",
        "device": f"0x{product:04x}",
        "class": f"0x{kind:06x}",
        "subsystem_vendor": f"0x{sub_vendor:04x}",
        "subsystem_device": f"0x{sub_product:04x}",
        "irq": "0",
        "revision": f"0x{REVISION:02x}",
        "modalias": f"pci:v{vendor:08X}d{product:08X}sv{sub_vendor:08X}sd{sub_product:08X}"
        f"bc{kind >> 16:02X}sc{kind >> 8 & 0xFF:02X}i{kind & 0xFF:02X}",
        "resource": "0x0000000000000000 0x0000000000000000 0x0000000000000000\n" * 12 + "0x0 0x0 0x0",
    }
    for name, text in numbers.items():
        (folder / name).write_text(f"{text}\n")
    (folder / "config").write_bytes(bytes(config))


def main() -> None:
    for device in json.loads((HARDWARE / "gpu.json").read_text())["devices"]:
        lay_out(device, LAID_OUT)
    subprocess.run(["mount", "--bind", str(LAID_OUT), str(DEVICES)], check=True)


if __name__ == "__main__":
    main()

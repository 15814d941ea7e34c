# SPDX-License-Identifier: MIT
"""What a kernel machine is plugged together from, and the PCI address that each part has in the guest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rehearsal.kernel.pci_device import Function

VGA, AUDIO = 0x0300, 0x0403
NVIDIA = 0x10DE
A4000_SUBSYSTEM = (NVIDIA, 0x14AD)
#: What GA104, the A4000's chip, has in its first register: nouveau looks there.
GA104 = 0x174000A1

A4000 = Function(
    NVIDIA, 0x24B0, VGA, A4000_SUBSYSTEM, revision=0xA1, bar0_bytes=16 << 20, multifunction=True, word0=GA104
)
A4000_AUDIO = Function(NVIDIA, 0x228B, AUDIO, A4000_SUBSYSTEM, revision=0xA1, bar0_bytes=16 << 10)
#: A server board's own graphics (XGI Z11). Debian has no driver for it, so it costs no time at boot.
ONBOARD_VGA = Function(0x18CA, 0x0027, VGA, bar0_bytes=1 << 20)


@dataclass(frozen=True)
class Part:
    """Something in a PCI slot: a function of ours, or what QEMU emulates (`model`: the words of its -device).

    `bus` is QEMU's name of it, `slot` device.function on that bus. Bus numbers in the guest follow from the order of
    the slots, as the firmware walks them.
    """

    what: Function | str
    bus: str
    slot: str

    def plain(self) -> dict[str, Any]:
        """As JSON takes it."""
        what = self.what if isinstance(self.what, str) else self.what.plain()
        return {"what": what, "bus": self.bus, "slot": self.slot}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Part:
        what = plain["what"]
        return cls(what if isinstance(what, str) else Function.from_plain(what), plain["bus"], plain["slot"])


#: The screen of the machine, so that no card is.
SCREEN = "0000:00:02.0"
#: The declared card, behind a root port of its own.
CARD, CARD_AUDIO = "0000:01:00.0", "0000:01:00.1"
#: Its twin of the same ids, behind another.
TWIN, TWIN_AUDIO = "0000:02:00.0", "0000:02:00.1"
#: A third card, behind a PCIe-to-PCI bridge where it shares its IOMMU group with a network card of the node.
SHARED_BRIDGE, SHARED_CARD, SHARED_NETWORK = "0000:03:00.0", "0000:04:01.0", "0000:04:02.0"
#: QEMU's teaching device, [1234:11e8], behind a root port of its own.
EDU = "0000:05:00.0"


def root_port(number: int) -> Part:
    """A root port whose bus is `port{number}` in QEMU."""
    options = f"id=port{number},chassis={number},slot={number},hotplug=off"
    return Part(f"pcie-root-port,{options}", "pcie.0", f"{0x10 + number:x}.0")


#: Many mechanisms for the price of one boot.
TOPOLOGY = (
    Part(ONBOARD_VGA, "pcie.0", "2.0"),
    root_port(1),
    Part(A4000, "port1", "0.0"),
    Part(A4000_AUDIO, "port1", "0.1"),
    root_port(2),
    Part(A4000, "port2", "0.0"),
    Part(A4000_AUDIO, "port2", "0.1"),
    root_port(3),
    Part("pcie-pci-bridge,id=bridge", "port3", "0.0"),
    Part(Function(NVIDIA, 0x24B0, VGA, A4000_SUBSYSTEM, 0xA1, 16 << 20, word0=GA104), "bridge", "1.0"),
    Part("e1000,romfile=", "bridge", "2.0"),
    root_port(4),
    Part("edu", "port4", "0.0"),
)

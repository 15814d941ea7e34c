# SPDX-License-Identifier: MIT
"""The node: how it boots, which driver has its GPUs, the reboot between the two, and the way back."""

from operations.hypervisor.boot import boot_configuration, refresh_boot
from operations.hypervisor.devices import Device, Wanted, wanted
from operations.hypervisor.passthrough import preflight, ready
from operations.hypervisor.restart import guests_back, reboot
from operations.hypervisor.rollback import restore, restored

__all__ = [
    "Device",
    "Wanted",
    "boot_configuration",
    "guests_back",
    "preflight",
    "ready",
    "reboot",
    "refresh_boot",
    "restore",
    "restored",
    "wanted",
]

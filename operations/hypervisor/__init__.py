# SPDX-License-Identifier: MIT
"""The node: how it boots, which driver has its GPUs, and the reboot between the two."""

from operations.hypervisor.boot import boot_configuration, refresh_boot
from operations.hypervisor.devices import Device, Wanted, wanted
from operations.hypervisor.passthrough import preflight, ready
from operations.hypervisor.restart import reboot

__all__ = ["Device", "Wanted", "boot_configuration", "preflight", "ready", "reboot", "refresh_boot", "wanted"]

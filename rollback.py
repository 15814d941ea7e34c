# SPDX-License-Identifier: MIT
"""The way back: a node as it was before gpulab, with the reboot that this takes.

    pyinfra inventory/lab.py rollback.py --limit pve1 --dry     what would change
    pyinfra inventory/lab.py rollback.py --limit pve1           make it so

Guests, mappings and the API's role, user and token stay; a guest loses nothing but the node's settings.
"""

from operations import hypervisor, run

with run.of_host() as part:
    if node := part.node:
        hypervisor.restore(
            name="Restore the files of before gpulab",
            allowed=node.allow_reboot,
            allow_guest_shutdown=node.allow_guest_shutdown,
        )
        hypervisor.refresh_boot(name="Refresh initramfs and boot loader", wanted=None)
        hypervisor.reboot(
            name="Reboot the node where it still runs as gpulab set it up",
            wanted=None,
            allowed=node.allow_reboot,
            timeout_s=node.reboot_timeout_s,
            allow_guest_shutdown=node.allow_guest_shutdown,
            guest_shutdown_timeout_s=node.guest_shutdown_timeout_s,
            cluster=node.cluster_name,
        )
        hypervisor.guests_back(name="Start the guests that a killed run had stopped")
        hypervisor.restored(name="Check that the node runs as before gpulab")

# SPDX-License-Identifier: MIT
"""One guest from scratch: a new system disk from the image, then the deploy; its data disk and identity stay.

    pyinfra inventory/lab.py rebuild.py --limit gpu01 --dry              what would happen
    pyinfra inventory/lab.py rebuild.py --limit gpu01                    make it so; run again, it goes on
    pyinfra inventory/lab.py rebuild.py --limit gpu01 --data rollback=1  the old system disk comes back

The old system disk is deleted last, once verify has passed. `--data keep_old=7` keeps it for seven days.
"""

from pyinfra import local

from operations import run
from operations.proxmox import order, rebuild, vm

with run.of_host():
    if order.current().rollback:
        rebuild.rollback_preflight(name="Check that there is an old system disk")
        rebuild.stopped(name="Shut the VM down")
        rebuild.marked(name="Note in the VM what is about to happen")
        rebuild.old_disk_back(name="Put the old system disk back")
        rebuild.connection_opened(name="Forget the SSH host key of the system that went")
        vm.started(name="Start the VM and wait for its old system")
        rebuild.rollback_finished(name="Forget the rebuild")
    else:
        vm.preflight(name="Check the token's rights and the node's resources")
        vm.image(name="Download the cloud image before anything is stopped")
        rebuild.preflight(name="Check that the VM can be rebuilt")

        rebuild.stopped(name="Shut the VM down")
        rebuild.marked(name="Note in the VM what is about to happen")
        rebuild.leftovers_removed(name="Remove what an earlier rebuild left")
        rebuild.swapped(name="Import the new system disk, keep the old one")
        rebuild.prepared(name="Size the new disk, make cloud-init's drive anew")
        rebuild.connection_opened(name="Forget the SSH host key of the system that went")

        local.include("deploy.py")

        rebuild.verified(name="Verify the guest")
        rebuild.old_disk_deleted(name="Delete the old system disk, or note how long it is kept")

# SPDX-License-Identifier: MIT
"""One guest from scratch: a new system disk from the image, then the deploy; its data disk and identity stay.

    pyinfra inventory/lab.py rebuild.py --limit gpu01 --dry              what would happen
    pyinfra inventory/lab.py rebuild.py --limit gpu01                    make it so; run again, it goes on
    pyinfra inventory/lab.py rebuild.py --limit gpu01 --data rollback=1  the old system disk comes back
    pyinfra inventory/lab.py rebuild.py --limit gpu01 --data destroy=1   the VM is deleted and made anew

The old system disk is deleted last, once verify has passed. `--data keep_old=7` keeps it for seven days. destroy=1
asks for the guest's name; its data disks lie with a keeper VM meanwhile.
"""

from pyinfra import local

from operations import run
from operations.proxmox import destroy, order, rebuild, vm

with run.of_host():
    if order.current().rollback:
        rebuild.rollback_preflight(name="Check that there is an old system disk")
        rebuild.stopped(name="Shut the VM down")
        rebuild.marked(name="Note in the VM what is about to happen")
        rebuild.old_disk_back(name="Put the old system disk back")
        rebuild.connection_opened(name="Forget the SSH host key of the system that went")
        vm.started(name="Start the VM and wait for its old system")
        rebuild.rollback_finished(name="Forget the rebuild")
    elif order.current().destroy:
        vm.preflight(name="Check the token's rights and the node's resources")
        vm.image(name="Download the cloud image before anything is stopped")
        destroy.preflight(name="Check that the VM can be destroyed and made anew")

        destroy.stopped(name="Shut the VM down")
        destroy.marked(name="Note in the VM what is about to happen")
        destroy.backed_up(name="Back the VM up")
        destroy.keeper_made(name="Make the keeper VM")
        destroy.disks_away(name="Move the data disks to the keeper")
        destroy.deleted(name="Delete the VM")
        destroy.created(name="Create the VM with its identity, without a data disk")
        destroy.disks_back(name="Move the data disks back")
        destroy.keeper_removed(name="Delete the empty keeper")
        destroy.connection_opened(name="Forget the SSH host key of the system that went")

        local.include("deploy.py")

        rebuild.verified(name="Verify the guest")
        destroy.finished(name="Forget the destruction")
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

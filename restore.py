# SPDX-License-Identifier: MIT
"""A backup proven: restored into a spare id, without GPU and network, and its data compared with the guest's.

    pyinfra inventory/lab.py restore.py --limit gpu01 --dry                   what would happen
    pyinfra inventory/lab.py restore.py --limit gpu01                         the newest backup
    pyinfra inventory/lab.py restore.py --limit gpu01 --data fresh=1          a backup taken now
    pyinfra inventory/lab.py restore.py --limit gpu01 --data archive=VOLID    that one

The guest's own VM is read and never written. `--data keep=1` leaves the restored VM, stopped. docs/backup.md says how
to restore for real.
"""

from operations import run
from operations.proxmox import backup, restore

with run.of_host():
    restore.preflight(name="Check that a backup can be tested")
    restore.cleared(name="Remove what an earlier test left")
    if restore.current().fresh:
        backup.taken(name="Take a backup")
    restore.restored(name="Restore the backup into the spare id, without GPU and network")
    restore.started(name="Start the restored VM")
    restore.compared(name="Compare its data with the guest's")
    restore.removed(name="Remove the restored VM")

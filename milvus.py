# SPDX-License-Identifier: MIT
"""Backups of Milvus' collections, and their restore: schema, indexes, aliases, partitions and rows.

    pyinfra inventory/lab.py milvus.py --limit gpu01                              back all collections up
    pyinfra inventory/lab.py milvus.py --limit gpu01 --data label=before-tuning   so; it is never pruned
    pyinfra inventory/lab.py milvus.py --limit gpu01 --data from_backup=newest    make absent ones anew of it
    … --data from_backup=NAME --data collection=astro.spectra                     that one (`astro`: its database)
    … --data from_backup=NAME --data collection=astro.spectra --data into=old     under another name
    … --data from_backup=NAME --data collection=astro.spectra --data over=1       in the place of what is there

`--dry` says what would happen, and `gpulab-milvus list` on the guest which backups there are. A deploy that changes the
server's image makes one first: docs/milvus.md.
"""

from pyinfra import state

from operations import containers, run

with run.of_host() as part:
    if part.guest and part.guest.services.milvus:
        words = dict(state.inventory.override_data)
        if words.get("from_backup"):
            containers.milvus.restored(
                name="Restore collections of a backup",
                backup=str(words["from_backup"]),
                collection=str(words.get("collection", "")),
                into=str(words.get("into", "")),
                over=bool(words.get("over")),
                new_keys=bool(words.get("new_keys")),
            )
        else:
            containers.milvus.backed_up(name="Back Milvus' collections up", label=str(words.get("label", "")))

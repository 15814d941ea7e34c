# SPDX-License-Identifier: MIT
"""New bearer tokens for the tenants, without downtime: the old ones stay valid until the new ones were answered.

    pyinfra inventory/lab.py rotate.py --limit gpu01 --dry                                     what would happen
    pyinfra inventory/lab.py rotate.py --limit gpu01                                           all of its tokens
    pyinfra inventory/lab.py rotate.py --limit gpu01 --data tenant=astro --data service=ollama
    pyinfra inventory/lab.py rotate.py --limit gpu01 --data keep_previous=1                    old ones stay as well

What `keep_previous=1` left valid ends with the next run without it, which makes no further tokens then. docs/access.md
says how users get theirs.
"""

from pyinfra import state

from operations import containers, run

with run.of_host() as part:
    if guest := part.guest:
        containers.rotated(
            name="Give tenants new tokens", lab=part.lab, guest=guest, words=dict(state.inventory.override_data)
        )

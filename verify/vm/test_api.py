# SPDX-License-Identifier: MIT
"""Does the node's API answer with the lab's token, and has the node no VM of ours that nobody declares?"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from inventory import Lab, Node
from verify.observations import Observation
from verify.verdicts import not_run

pytestmark = pytest.mark.on("apis")


@pytest.mark.critical
@pytest.mark.promise("vm.api.reachable", "api_host", "api.user", "api.token_name", fix="make bootstrap LAB={lab}")
def test_api_takes_the_token_over_checked_tls(node: Node, api: Observation, seen: Callable[[str], None]) -> None:
    assert not api["error"], api["error"]
    seen(f"{node.name}: Proxmox VE {api['version']}")


@pytest.mark.minor
@pytest.mark.promise("vm.undeclared", fix="on {host}: qm config ID says what it is; declare it, or remove it by hand")
def test_node_has_no_vm_of_ours_that_nobody_declares(
    lab: Lab, node: Node, api: Observation, seen: Callable[[str], None]
) -> None:
    if api["error"]:
        not_run(api["state"])
    declared = {guest.vmid for guest in lab.guests.values() if guest.node == node.name}
    strange = [
        f"VM {vm['id']} ({vm['name'] or 'no name'}, tags {vm['tags']})"
        for vm in api["vms"]
        if "gpulab" in re.split(r"[;, ]+", vm["tags"]) and vm["id"] not in declared
    ]
    told = f"{node.name}: with our tag and not in the inventory: {', '.join(strange)}"
    assert not strange, f"{told}; a keeper holds data disks, a restored VM is a test's"
    seen(f"none among {len(api['vms'])} VMs")

# SPDX-License-Identifier: MIT
"""Does the node's API answer with the lab's token?"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from inventory import Node
from verify.observations import Observation

pytestmark = pytest.mark.on("apis")


@pytest.mark.critical
@pytest.mark.promise("vm.api.reachable", fix="make bootstrap LAB={lab}")
def test_api_takes_the_token_over_checked_tls(node: Node, api: Observation, seen: Callable[[str], None]) -> None:
    assert not api["error"], api["error"]
    seen(f"{node.name}: Proxmox VE {api['version']}")

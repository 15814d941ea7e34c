# SPDX-License-Identifier: MIT
"""`@node/NAME`: a Proxmox VE host, reached by SSH as root."""

from __future__ import annotations

from connectors.base import LabConnector


class NodeConnector(LabConnector):
    """SSH to a node. Its host key is pinned by `make bootstrap`."""

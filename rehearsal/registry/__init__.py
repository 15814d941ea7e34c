# SPDX-License-Identifier: MIT
"""The lab's image registry, filled with stand-ins for images that can't be had: `service.py` builds and serves it."""

from __future__ import annotations

from rehearsal.registry.service import host, prepare, read, start

__all__ = ["host", "prepare", "read", "start"]

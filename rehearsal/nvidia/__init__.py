# SPDX-License-Identifier: MIT
"""NVIDIA's package repositories, in the lab: same layout, names and versions, simulated content, signatures of our own.

`service.py` builds and serves them, `guest.py` is the guest's side, `source/` what the packages hold.
"""

from __future__ import annotations

from rehearsal.nvidia.service import Repository, prepare, read, start

__all__ = ["Repository", "prepare", "read", "start"]

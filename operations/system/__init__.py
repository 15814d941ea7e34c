# SPDX-License-Identifier: MIT
"""The guest's base: its data disk, base packages, clock and security upgrades."""

from operations.system.base import base
from operations.system.data_disk import data_disk
from operations.system.upgrades import upgrades

__all__ = ["base", "data_disk", "upgrades"]

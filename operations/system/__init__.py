# SPDX-License-Identifier: MIT
"""The guest's base: its data disk, base packages and clock."""

from operations.system.base import base
from operations.system.data_disk import data_disk

__all__ = ["base", "data_disk"]

# SPDX-License-Identifier: MIT
"""The guest itself: address, clock, data disk, base packages."""

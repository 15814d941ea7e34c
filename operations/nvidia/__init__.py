# SPDX-License-Identifier: MIT
"""NVIDIA in the guest: package repositories, driver, persistence, container toolkit and health."""

from operations.nvidia.driver import driver, loaded
from operations.nvidia.health import health
from operations.nvidia.persistence import persistence
from operations.nvidia.repository import repository
from operations.nvidia.toolkit import toolkit

__all__ = ["driver", "health", "loaded", "persistence", "repository", "toolkit"]

# SPDX-License-Identifier: MIT
"""NVIDIA in the guest: package repositories, driver, persistence and container toolkit."""

from operations.nvidia.cuda import cuda
from operations.nvidia.driver import driver, loaded
from operations.nvidia.kernels import kernels
from operations.nvidia.persistence import persistence
from operations.nvidia.repository import repository
from operations.nvidia.toolkit import toolkit

__all__ = ["cuda", "driver", "kernels", "loaded", "persistence", "repository", "toolkit"]

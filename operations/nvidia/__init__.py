# SPDX-License-Identifier: MIT
"""NVIDIA in the guest: repositories, driver, CUDA, settings, thermal policy, sharing, container toolkit and health."""

from operations.nvidia.cuda import cuda
from operations.nvidia.driver import driver, loaded
from operations.nvidia.health import health
from operations.nvidia.kernels import kernels
from operations.nvidia.mps import sharing
from operations.nvidia.repository import repository
from operations.nvidia.settings import settings
from operations.nvidia.thermal import thermal
from operations.nvidia.toolkit import toolkit

__all__ = [
    "cuda",
    "driver",
    "health",
    "kernels",
    "loaded",
    "repository",
    "settings",
    "sharing",
    "thermal",
    "toolkit",
]

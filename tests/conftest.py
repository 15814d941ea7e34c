# SPDX-License-Identifier: MIT
"""Settings of all tests."""

from hypothesis import HealthCheck, settings

# How fast this machine is, is no property of the code.
settings.register_profile("gpulab", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("gpulab")

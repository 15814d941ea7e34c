# SPDX-License-Identifier: MIT
"""What the converged node shows, seen by stock testinfra."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.mark.parametrize("function", ["0", "1"])
def test_every_function_of_the_card_is_bound_to_vfio(host: Any, function: str) -> None:
    assert host.check_output(f"readlink /sys/bus/pci/devices/0000:01:00.{function}/driver").endswith("/vfio-pci")


def test_kernel_was_booted_with_iommu_passthrough(host: Any) -> None:
    assert "iommu=pt" in host.file("/proc/cmdline").content_string.split()

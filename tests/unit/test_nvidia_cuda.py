# SPDX-License-Identifier: MIT
"""A CUDA toolkit brings no driver: what apt's simulation says, read line by line."""

from __future__ import annotations

import pytest

from operations.nvidia.cuda import drivers_moved, others

TOOLKIT = """\
NOTE: This is only a simulation!
Inst cuda-cudart-13-0 (13.0.96-1 NVIDIA CUDA [amd64])
Inst cuda-toolkit-13-0 (13.0.2-1 NVIDIA CUDA [amd64])
Conf cuda-toolkit-13-0 (13.0.2-1 NVIDIA CUDA [amd64])
"""


@pytest.mark.parametrize(
    ("line", "moved"),
    [
        ("", []),
        # A part of the same driver that was not there yet changes nothing.
        ("Inst libnvidia-nvvm4 (580.95.05-1 NVIDIA CUDA [amd64])", []),
        ("Inst nvidia-container-toolkit [1.19.1-1] (1.20.0-1 NVIDIA [amd64])", []),
        ("Inst libcuda1 [580.95.05-1] (590.44.01-1 NVIDIA [amd64])", ["libcuda1: 580.95.05-1 -> 590.44.01-1"]),
        ("Inst libcuda1 [580.95.05-1] (580.105.08-1 NVIDIA [amd64])", ["libcuda1: 580.95.05-1 -> 580.105.08-1"]),
        ("Inst cuda-drivers (590.44.01-1 NVIDIA [amd64])", ["cuda-drivers: absent -> 590.44.01-1"]),
        ("Remv nvidia-driver-cuda [580.95.05-1]", ["nvidia-driver-cuda: 580.95.05-1 -> removed"]),
        ("Remv cuda-toolkit-12-9 [12.9.1-1]", []),
        # A kernel's version is no driver's.
        ("Inst linux-image-amd64 [6.12.48-1] (6.12.63-1 Debian [amd64])", []),
    ],
)
def test_a_toolkit_that_would_move_the_driver(line: str, moved: list[str]) -> None:
    assert drivers_moved(f"{TOOLKIT}{line}\n", "580.95.05") == moved


def test_a_guest_without_driver_gets_none_by_a_toolkit() -> None:
    assert drivers_moved("Inst libcuda1 (580.95.05-1 NVIDIA [amd64])\n", None) == ["libcuda1: absent -> 580.95.05-1"]


def test_undeclared_toolkits_are_named() -> None:
    found = {"toolkits": {"cuda-toolkit-12-8": "12.8.1-1", "cuda-toolkit-13-0": "13.0.2-1"}}
    assert others(found, ["cuda-toolkit-13-0"]) == "; left alone, not declared: cuda-toolkit-12-8"
    assert others(found, list(found["toolkits"])) == ""

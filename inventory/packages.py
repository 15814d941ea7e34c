# SPDX-License-Identifier: MIT
"""The package table: what each guest distribution calls the things that a deploy installs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Distribution:
    """Package names and repository paths of one guest distribution (`ID` + `VERSION_ID` of os-release)."""

    nvidia_repository: str
    base: tuple[str, ...]
    driver: tuple[str, ...]
    engine: tuple[str, ...]
    headers: str


DEBIAN_13 = Distribution(
    nvidia_repository="debian13/x86_64",
    base=("ca-certificates", "curl", "gnupg", "e2fsprogs", "python3", "systemd-timesyncd"),
    # Compute only, open modules: NVIDIA driver installation guide, Debian. notes: no X, no GL.
    driver=("nvidia-driver-cuda", "nvidia-kernel-open-dkms", "nvidia-persistenced"),
    # docker.io 26.1 is the first of Debian's that reads CDI 0.7 specs.
    # Without AppArmor's parser Docker runs every container unconfined.
    engine=("docker.io", "docker-cli", "apparmor"),
    headers="linux-headers-amd64",
)

DISTRIBUTIONS: dict[str, Distribution] = {"debian13": DEBIAN_13}

#: The container toolkit's own packages, pinned together (NVIDIA container toolkit installation guide).
TOOLKIT = (
    "nvidia-container-toolkit",
    "nvidia-container-toolkit-base",
    "libnvidia-container-tools",
    "libnvidia-container1",
)

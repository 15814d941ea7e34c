# SPDX-License-Identifier: MIT
"""The package table: what each guest distribution calls the things that a deploy installs, and its cloud images."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Distribution:
    """Package names and repository paths of one guest distribution (`ID` + `VERSION_ID` of os-release)."""

    nvidia_repository: str
    base: tuple[str, ...]
    #: `{branch}` stands for the driver's branch, where package names carry it.
    driver: tuple[str, ...]
    engine: tuple[str, ...]
    headers: str
    #: Does its container engine read CDI specs?
    cdi: bool = True

    def of_branch(self, branch: str) -> Distribution:
        """The same with the names of one driver branch, such as `580`."""
        return replace(self, driver=tuple(name.format(branch=branch) for name in self.driver))


@dataclass(frozen=True)
class CloudImage:
    """Where a publisher keeps a cloud image, by `{release}`; `example` shows a release's form."""

    url: str
    example: str


_BASE = ("ca-certificates", "curl", "gnupg", "e2fsprogs", "python3", "systemd-timesyncd")

DEBIAN_13 = Distribution(
    nvidia_repository="debian13/x86_64",
    base=_BASE,
    # Compute only, open modules: NVIDIA driver installation guide, Debian. notes: no X, no GL.
    driver=("nvidia-driver-cuda", "nvidia-kernel-open-dkms", "nvidia-persistenced"),
    # docker.io 26.1 is the first of Debian's that reads CDI 0.7 specs.
    # Without AppArmor's parser Docker runs every container unconfined.
    engine=("docker.io", "docker-cli", "apparmor"),
    headers="linux-headers-amd64",
)

DEBIAN_12 = replace(
    DEBIAN_13,
    nvidia_repository="debian12/x86_64",
    # 20.10, command line included: no CDI.
    engine=("docker.io", "apparmor"),
    cdi=False,
)

UBUNTU_24_04 = Distribution(
    nvidia_repository="ubuntu2404/x86_64",
    base=_BASE,
    # NVIDIA's names for Ubuntu carry the branch up to 580; nvidia-compute-utils holds MPS and persistenced.
    driver=(
        "libnvidia-compute-{branch}",
        "nvidia-dkms-{branch}-open",
        "nvidia-utils-{branch}",
        "nvidia-compute-utils-{branch}",
    ),
    engine=("docker.io", "apparmor"),
    headers="linux-headers-generic",
)

UBUNTU_22_04 = replace(UBUNTU_24_04, nvidia_repository="ubuntu2204/x86_64")

DISTRIBUTIONS: dict[str, Distribution] = {
    "debian12": DEBIAN_12,
    "debian13": DEBIAN_13,
    "ubuntu2204": UBUNTU_22_04,
    "ubuntu2404": UBUNTU_24_04,
}


def _debian(number: int, name: str) -> CloudImage:
    folder = f"https://cloud.debian.org/images/cloud/{name}/{{release}}"
    return CloudImage(f"{folder}/debian-{number}-genericcloud-amd64-{{release}}.qcow2", "20251117-2299")


def _ubuntu(number: str, name: str) -> CloudImage:
    folder = f"https://cloud-images.ubuntu.com/releases/{name}/release-{{release}}"
    return CloudImage(f"{folder}/ubuntu-{number}-server-cloudimg-amd64.img", "20251113")


#: The images that an inventory may name. Beside each lies the publisher's SHA512SUMS (Debian) or SHA256SUMS (Ubuntu).
IMAGES: dict[str, CloudImage] = {
    "debian12": _debian(12, "bookworm"),
    "debian13": _debian(13, "trixie"),
    "ubuntu2204": _ubuntu("22.04", "jammy"),
    "ubuntu2404": _ubuntu("24.04", "noble"),
}

#: The container toolkit's own packages, pinned together (NVIDIA container toolkit installation guide).
TOOLKIT = (
    "nvidia-container-toolkit",
    "nvidia-container-toolkit-base",
    "libnvidia-container-tools",
    "libnvidia-container1",
)

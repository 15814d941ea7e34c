# SPDX-License-Identifier: MIT
"""The package table: what each guest distribution calls the things that a deploy installs, and its cloud images."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Distribution:
    """Package names and repository paths of one guest distribution (`ID` + `VERSION_ID` of os-release)."""

    #: Folder below `nvidia.repository`.
    nvidia_repository: str
    base: tuple[str, ...]
    #: `{branch}` stands for the driver's branch, where package names carry it. The one that brings nvidia-smi first.
    driver: tuple[str, ...]
    #: Which of them brings nvidia-cuda-mps-control.
    mps: str
    #: The package that follows the kernel's headers, and the same for kernels.
    headers: str
    kernel: str
    docker: tuple[str, ...]
    #: `ID CODENAME` below `engine.repository`, where the distribution's own Docker is too old. None: its own is taken.
    docker_repository: tuple[str, str] | None = None
    #: None: its Podman is too old for Quadlet (4.4) or for the toolkit's CDI specifications (5.1).
    podman: tuple[str, ...] | None = None

    def of_branch(self, branch: str) -> Distribution:
        """The same with the names of one driver branch, such as `580`."""
        numbered = int(branch) < UNNUMBERED_BRANCH

        def named(name: str) -> str:
            return name.replace("-{branch}", f"-{branch}" if numbered else "")

        return replace(self, driver=tuple(map(named, self.driver)), mps=named(self.mps))


@dataclass(frozen=True)
class CloudImage:
    """Where a publisher keeps a cloud image, by `{release}`; `example` shows a release's form."""

    url: str
    example: str


_BASE = ("ca-certificates", "curl", "gnupg", "e2fsprogs", "python3", "systemd-timesyncd")

DEBIAN_13 = Distribution(
    nvidia_repository="debian13/x86_64",
    base=_BASE,
    # Compute only, open modules: NVIDIA driver installation guide, Debian. No X, no GL.
    driver=("nvidia-driver-cuda", "nvidia-kernel-open-dkms", "nvidia-persistenced"),
    mps="nvidia-driver-cuda",
    headers="linux-headers-amd64",
    kernel="linux-image-amd64",
    # docker.io 26.1 is the first of Debian's that reads CDI 0.7 specs.
    # Without AppArmor's parser Docker runs every container unconfined.
    docker=("docker.io", "docker-cli", "apparmor"),
    podman=("podman", "crun", "netavark", "aardvark-dns", "apparmor"),
)

DEBIAN_12 = replace(
    DEBIAN_13,
    nvidia_repository="debian12/x86_64",
    # docker.io is 20.10 and podman 4.3: neither reads CDI 0.7.
    docker=("docker-ce", "docker-ce-cli", "containerd.io", "apparmor"),
    docker_repository=("debian", "bookworm"),
    podman=None,
)

UBUNTU_24_04 = Distribution(
    nvidia_repository="ubuntu2404/x86_64",
    base=_BASE,
    # NVIDIA's names for Ubuntu carry the branch up to 580; nvidia-compute-utils holds MPS and persistenced.
    driver=(
        "nvidia-utils-{branch}",
        "libnvidia-compute-{branch}",
        "nvidia-dkms-{branch}-open",
        "nvidia-compute-utils-{branch}",
    ),
    mps="nvidia-compute-utils-{branch}",
    headers="linux-headers-generic",
    kernel="linux-image-generic",
    # 28.2 in the updates of both releases; podman 3.4 and 4.9.
    docker=("docker.io", "apparmor"),
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

#: From this branch on NVIDIA's Ubuntu packages carry no branch in their names (driver guide, recent updates).
UNNUMBERED_BRANCH = 590

#: The CUDA version that each driver branch brings, hence the newest toolkit whose PTX it takes (CUDA release notes,
#: table 3; 13.2 and later from the driver branch's own release notes).
BRANCH_CUDA: dict[str, tuple[int, int]] = {
    "535": (12, 2),
    "550": (12, 4),
    "560": (12, 6),
    "570": (12, 8),
    "575": (12, 9),
    "580": (13, 0),
    "590": (13, 1),
    "595": (13, 2),
    "610": (13, 3),
    "615": (13, 4),
}

#: The lowest driver branch that runs programs of a CUDA major version (CUDA compatibility guide, minor version
#: compatibility): without PTX, which needs the branch of `BRANCH_CUDA`.
CUDA_LEAST_BRANCH: dict[int, int] = {11: 450, 12: 525, 13: 580}

#: The container toolkit's own packages, pinned together (NVIDIA container toolkit installation guide).
TOOLKIT = (
    "nvidia-container-toolkit",
    "nvidia-container-toolkit-base",
    "libnvidia-container-tools",
    "libnvidia-container1",
)

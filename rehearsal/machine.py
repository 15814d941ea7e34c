# SPDX-License-Identifier: MIT
"""What the control machine must be and have for the lab; missing packages are installed, and said."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

from inventory import GpulabError
from rehearsal.image import os_release

#: Every Debian package that the lab needs on the control machine, and what for.
PACKAGES = {
    "systemd-container": "systemd-nspawn runs the hosts",
    "mmdebstrap": "builds their image",
    "debian-archive-keyring": "verifies the image's packages",
    "nftables": "translates the lab's addresses",
    "iproute2": "makes the bridge",
    "openssh-client": "SSH keys of the lab",
    "e2fsprogs": "file systems of the lab's disks",
    "gnupg": "signs the lab's package repository",
    "gpgv": "checks its signatures in the tests",
    "dpkg-dev": "indexes it",
    "dosfstools": "makes EFI partitions in the tests",
    "mtools": "fills them",
    "gcc": "compiles the NVML stand-in",
    "libc6-dev": "compiles the NVML stand-in",
}
RELEASES = {"12", "13"}
#: How many inotify instances one user may have; Debian's 128 are too few, because all hosts' services run as one root.
INOTIFY = Path("/proc/sys/fs/inotify/max_user_instances")
INOTIFY_INSTANCES = 1024


def check() -> None:
    """Refuse a machine on which the lab cannot run.

    Raises:
        GpulabError: not root, not Debian 12 or 13, or not x86_64.
    """
    if os.geteuid() != 0:
        raise GpulabError(
            "The rehearsal lab needs root: it runs containers, a bridge and mounts",
            resolution="run it as root on a machine that may be used for it, a virtual machine for example",
        )
    release = os_release()
    seen = f"{release.get('PRETTY_NAME', 'an unknown system')} on {platform.machine()}"
    if release.get("ID") != "debian" or release.get("VERSION_ID") not in RELEASES or platform.machine() != "x86_64":
        raise GpulabError("The rehearsal lab runs on Debian 12 or 13, x86_64", f"This machine is {seen}.")
    if "overlay" not in Path("/proc/filesystems").read_text():
        # A module that is not loaded yet does not stand there.
        done = subprocess.run(["modprobe", "overlay"], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise GpulabError("This kernel has no overlayfs", done.stderr.strip())


def install(report: Callable[[str], None], packages: Iterable[str] = PACKAGES) -> None:
    """Install what is missing of `packages`.

    Raises:
        GpulabError: apt cannot, or the user is not root.
    """
    missing = missing_packages(packages)
    if not missing:
        return
    if os.geteuid() != 0:
        raise GpulabError(f"Missing packages: {' '.join(missing)}", resolution=f"apt-get install {' '.join(missing)}")
    report(f"installing {', '.join(missing)}")
    if not _known(missing) or not _apt("install", *missing):
        # No package lists yet, or lists so old that the mirror has dropped what they name.
        report("updating the package lists")
        _apt("update", must=True)
        _apt("install", *missing, must=True)


def raise_limits(report: Callable[[str], None], path: Path = INOTIFY) -> None:
    """Let several hosts run: services fail with `Too many open files` otherwise. The setting ends with a reboot."""
    found = int(path.read_text())
    if found < INOTIFY_INSTANCES:
        report(f"raising fs.inotify.max_user_instances from {found} to {INOTIFY_INSTANCES}")
        path.write_text(f"{INOTIFY_INSTANCES}\n")


def missing_packages(packages: Iterable[str] = PACKAGES) -> list[str]:
    """Those that are not installed."""
    return [name for name in packages if not _installed(name)]


def _installed(name: str) -> bool:
    query = ["dpkg-query", "--show", "--showformat=${db:Status-Status}", name]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout == "installed"


def _known(names: list[str]) -> bool:
    """Do the package lists have a candidate for each?"""
    done = subprocess.run(["apt-cache", "policy", *names], capture_output=True, text=True, check=False)
    candidates = [line.split()[-1] for line in done.stdout.splitlines() if line.startswith("  Candidate:")]
    return len(candidates) == len(names) and "(none)" not in candidates


def _apt(command: str, *names: str, must: bool = False) -> bool:
    words = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=120"]
    if command == "install":
        words += ["-y", "--no-install-recommends"]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run([*words, command, *names], capture_output=True, text=True, env=environment, check=False)
    if must and done.returncode != 0:
        raise GpulabError(f"`apt-get {command}` ended with {done.returncode}", done.stderr.strip())
    return done.returncode == 0

# SPDX-License-Identifier: MIT
"""NVIDIA's package repositories: keys, sources and the pin that keeps driver and toolkit at their versions."""

from __future__ import annotations

from collections.abc import Sequence

from operations import repositories, step
from operations.files import File, render
from operations.repositories import Source

SOURCES = "/etc/apt/sources.list.d/gpulab-nvidia.sources"
KEY = "/usr/share/keyrings/gpulab-nvidia.gpg"
TOOLKIT_SOURCES = "/etc/apt/sources.list.d/gpulab-nvidia-toolkit.sources"
#: Armoured, as downloaded: it can be compared with its digest at any time.
TOOLKIT_KEY = "/usr/share/keyrings/gpulab-nvidia-toolkit.asc"
PIN = "/etc/apt/preferences.d/gpulab-nvidia"


def sources(
    distribution_path: str, url: str, key_sha256: str | None, toolkit_url: str, toolkit_key_sha256: str | None
) -> tuple[Source, Source]:
    """The driver's and the toolkit's repository, in NVIDIA's own layout."""
    flat = f"{url}/{distribution_path}/"
    driver = Source(flat, f"{flat}cuda-archive-keyring.gpg", key_sha256, SOURCES, KEY)
    armoured = f"{toolkit_url}/gpgkey"
    toolkit = Source(f"{toolkit_url}/stable/deb/$(ARCH)/", armoured, toolkit_key_sha256, TOOLKIT_SOURCES, TOOLKIT_KEY)
    return driver, toolkit


def pin(branch: str, version: str | None, toolkit: Sequence[str], toolkit_version: str) -> str:
    """The preferences file: the driver's branch, or its exact version, and the toolkit's exact version."""
    driver = f"{version}-*" if version else f"{branch}.*"
    return render("nvidia/gpulab-nvidia.pref.j2", driver=driver, toolkit=toolkit, toolkit_version=toolkit_version)


@step.step
def repository(
    distribution_path: str,
    url: str,
    toolkit_url: str,
    branch: str,
    toolkit: Sequence[str],
    toolkit_version: str,
    version: str | None = None,
    key_sha256: str | None = None,
    toolkit_key_sha256: str | None = None,
) -> step.Commands:
    """
    Ensure that apt knows NVIDIA's repositories, trusts their keys and keeps to the declared versions.

    + distribution_path: the driver repository's folder for the guest: `debian13/x86_64`
    + url: base of the driver repositories, without the folder
    + toolkit_url: base of the container toolkit's repository
    + branch: driver branch, such as `580`
    + toolkit: the toolkit's packages, pinned together
    + toolkit_version: their exact package version
    + version: exact driver version; None: any of the branch
    + key_sha256: SHA-256 of the driver repository's key file; None: trust the HTTPS download
    + toolkit_key_sha256: the same for the toolkit's
    """
    both = sources(distribution_path, url, key_sha256, toolkit_url, toolkit_key_sha256)
    wanted: dict[str, File | None] = {
        source.sources: File(render("nvidia/gpulab-nvidia.sources.j2", uri=source.uri, key=source.key))
        for source in both
    }
    wanted[PIN] = File(pin(branch, version, toolkit, toolkit_version))
    yield from repositories.known(both, wanted, noop="apt knows both repositories, their keys and the pin")

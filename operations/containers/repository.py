# SPDX-License-Identifier: MIT
"""Docker's package repository, for a distribution whose own Docker is too old to be given a GPU."""

from __future__ import annotations

from operations import repositories, step
from operations.files import File, render
from operations.repositories import Source

SOURCES = "/etc/apt/sources.list.d/gpulab-docker.sources"
#: Armoured, as downloaded: it can be compared with its digest at any time.
KEY = "/usr/share/keyrings/gpulab-docker.asc"
PIN = "/etc/apt/preferences.d/gpulab-docker"


def source(url: str, distribution: str, suite: str, key_sha256: str | None) -> Source:
    """The repository of one distribution, in Docker's own layout."""
    folder = f"{url}/{distribution}"
    return Source(folder, f"{folder}/gpg", key_sha256, SOURCES, KEY, suite)


@step.step
def repository(url: str, distribution: str, suite: str, key_sha256: str | None = None) -> step.Commands:
    """
    Ensure that apt knows Docker's repository, trusts its key and takes nothing but the engine from it.

    + url: base of the repositories, without the distribution
    + distribution: folder of the distribution: `debian`
    + suite: the distribution's release: `bookworm`
    + key_sha256: SHA-256 of the repository's key file `gpg`; None: trust the HTTPS download
    """
    docker = source(url, distribution, suite, key_sha256)
    wanted: dict[str, File | None] = {
        SOURCES: File(render("containers/gpulab-docker.sources.j2", uri=docker.uri, suite=suite, key=KEY)),
        PIN: File(render("containers/gpulab-docker.pref.j2")),
    }
    yield from repositories.known([docker], wanted, noop="apt knows Docker's repository, its key and the pin")

# SPDX-License-Identifier: MIT
"""NVIDIA's package repositories: keys, sources and the pin that keeps driver and toolkit at their versions."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pyinfra.api import QuoteString

from inventory import GpulabError
from operations import apt, files, step
from operations.files import File, Files, content_of, render
from operations.told import Told

SOURCES = "/etc/apt/sources.list.d/gpulab-nvidia.sources"
KEY = "/usr/share/keyrings/gpulab-nvidia.gpg"
TOOLKIT_SOURCES = "/etc/apt/sources.list.d/gpulab-nvidia-toolkit.sources"
#: apt tells an armoured key by this ending; as downloaded, it can be compared with its digest at any time.
TOOLKIT_KEY = "/usr/share/keyrings/gpulab-nvidia-toolkit.asc"
PIN = "/etc/apt/preferences.d/gpulab-nvidia"
#: Harmless where unattended-upgrades is not installed, and there before somebody installs it.
UNATTENDED = "/etc/apt/apt.conf.d/52gpulab-nvidia"

# An altered or broken key never comes near its place.
_DOWNLOAD = """
set -e
new="$2.gpulab-new"
trap 'rm -f "$new"' EXIT
mkdir -p "$(dirname "$2")"
curl -fsSL --retry 3 --connect-timeout 20 --max-time 120 -o "$new" "$1"
if [ -n "$3" ] && ! echo "$3  $new" | sha256sum --check --status; then
    echo "$1: expected SHA-256 $3, got $(sha256sum < "$new" | cut -d' ' -f1)" >&2
    exit 1
fi
chmod 0644 "$new"
mv "$new" "$2"
"""


@dataclass(frozen=True)
class Source:
    """One flat repository. `sha256` of the key file as it is downloaded; None: trust the HTTPS download."""

    uri: str
    key_url: str
    sha256: str | None
    sources: str
    key: str

    @property
    def lists(self) -> str:
        """The file in which apt keeps the repository's signed index: there after the first successful update."""
        # apt's URItoFileName(): these characters are quoted, slashes become underscores.
        address = self.uri.replace("$(ARCH)", "amd64").partition("://")[2]
        quoted = "".join(f"%{ord(char):02x}" if char in '\\|{}[]<>"^~_=!@#$%^&*' else char for char in address)
        return f"/var/lib/apt/lists/{quoted.replace('/', '_')}InRelease"


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
    driver = driver_pin(branch, version)
    return render("nvidia/gpulab-nvidia.pref.j2", driver=driver, toolkit=toolkit, toolkit_version=toolkit_version)


def driver_pin(branch: str, version: str | None) -> str:
    """The versions that the pin keeps the driver to."""
    return f"{version}-*" if version else f"{branch}.*"


def stale_keys(found: Mapping[str, Any], wanted: Sequence[Source], changing: Mapping[str, File | None]) -> list[Source]:
    """The sources whose key has to be downloaded: it is missing, is not the pinned one, or came from elsewhere."""
    return [
        source
        for source in wanted
        if found.get(source.key) is None
        or (source.sha256 is not None and digest(found[source.key]) != source.sha256)
        or (source.sha256 is None and source.sources in changing and content_of(found, source.sources) is not None)
    ]


def digest(entry: Mapping[str, Any]) -> str:
    """SHA-256 of a file of a `Files` fact."""
    return hashlib.sha256(base64.b64decode(entry["content"])).hexdigest()


def no_key(source: Source, output: str) -> GpulabError:
    """Why the key could not be had, from what curl or the comparison of its digest printed."""
    said = next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "nothing")
    if "expected SHA-256" in said:
        return GpulabError(
            f"{source.key_url} is not the key that the inventory pins",
            said,
            "a publisher's new key is given as `key_sha256` (`toolkit_key_sha256`); confirm its digest elsewhere",
        )
    return GpulabError(
        f"The key {source.key_url} can't be had",
        f"curl says: {said}",
        "look at the guest's network and name server, and at the repository's address in the inventory",
    )


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

    unattended-upgrades is kept off everything of NVIDIA's, whether it is installed or not.

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
    wanted[UNATTENDED] = File(render("nvidia/52gpulab-nvidia.j2"))
    paths = sorted([*wanted, *(source.key for source in both), *(source.lists for source in both)])
    found = step.read(Files, paths=paths)
    changing = files.differing(found, wanted)
    keys = stale_keys(found, both, changing)
    unread = [source for source in both if found.get(source.lists) is None]
    if not (changing or keys or unread):
        step.noop("apt knows both repositories, their keys and the pin, and unattended-upgrades keeps off them")
        return
    for source in keys:
        # The digest, where there is one, is the root of trust; a mirror without TLS cannot do without.
        how = f"SHA-256 {source.sha256[:16]}…" if source.sha256 else "trusted by its HTTPS download"
        step.changes(f"key {source.key}", (f"from {source.key_url}", how))
    files.record(found, changing)
    if unread and not (changing or keys):
        step.changes("read the package lists", tuple(source.uri for source in unread))
    for source in keys:
        words = [QuoteString(word) for word in (source.key_url, source.key, source.sha256 or "")]
        yield Told("sh", "-c", QuoteString(_DOWNLOAD.strip()), "key", *words, explain=partial(no_key, source))
    if changing:
        yield files.write(changing)
    yield apt.update()

# SPDX-License-Identifier: MIT
"""Package repositories of others on a guest: keys checked by digest, sources, and the lists that apt read of them."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyinfra.api import QuoteString, StringCommand

from operations import apt, files, step
from operations.files import File, Files, content_of

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
    """One repository. `sha256` of the key file as it is downloaded; None: trust the HTTPS download."""

    uri: str
    key_url: str
    sha256: str | None
    #: File of apt's sources, and of the key. apt tells an armoured key by `.asc`.
    sources: str
    key: str
    #: Its release below `dists/`. Empty: a flat repository.
    suite: str = ""

    @property
    def lists(self) -> str:
        """The file in which apt keeps the repository's signed index: there after the first successful update."""
        # apt's URItoFileName(): these characters are quoted, slashes become underscores.
        folder = f"{self.uri}/dists/{self.suite}/" if self.suite else self.uri
        address = folder.replace("$(ARCH)", "amd64").partition("://")[2]
        quoted = "".join(f"%{ord(char):02x}" if char in '\\|{}[]<>"^~_=!@#$%^&*' else char for char in address)
        return f"/var/lib/apt/lists/{quoted.replace('/', '_')}InRelease"


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


def known(sources: Sequence[Source], wanted: Mapping[str, File | None], noop: str) -> step.Commands:
    """The commands of a step that makes apt know repositories.

    + sources: the repositories, whose keys are downloaded
    + wanted: their sources and pins, as files
    + noop: what to say when nothing has to be done
    """
    paths = sorted([*wanted, *(source.key for source in sources), *(source.lists for source in sources)])
    found = step.read(Files, paths=paths)
    changing = files.differing(found, wanted)
    keys = stale_keys(found, sources, changing)
    unread = [source for source in sources if found.get(source.lists) is None]
    if not (changing or keys or unread):
        step.noop(noop)
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
        yield StringCommand("sh", "-c", QuoteString(_DOWNLOAD.strip()), "key", *words)
    if changing:
        yield files.write(changing)
    yield apt.update()

# SPDX-License-Identifier: MIT
"""What the lab calls: `prepare()` builds Docker's repository into the cache, `start()` serves it on the bridge."""

from __future__ import annotations

import gzip
import hashlib
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from rehearsal import image, network, paths
from rehearsal.docker import packages
from rehearsal.nvidia import deb
from rehearsal.nvidia.deb import File, Link, SigningKey, pack
from rehearsal.nvidia.service import forget_downloads, now, serve

PORT = 8098
PROCESS = "docker-repository"
CODENAME = "bookworm"
POOL = f"dists/{CODENAME}/pool/stable/amd64"

Fetch = Callable[[Sequence[str], str], list[Path]]


def prepare(folder: Path | None = None, debian: Fetch = image.download) -> Path:
    """Build the repository into `folder` (default: the cache), unless it is there from the same sources.

    `debian` brings packages of a suite of Debian, as files.

    Raises:
        GpulabError: GnuPG fails, or a package of Debian can't be had.
    """
    folder = folder or cache()
    stamp = folder / "key"
    wanted = _key()
    if not stamp.exists() or stamp.read_text() != wanted:
        stamp.unlink(missing_ok=True)
        print("building Docker's package repository from Debian's packages (rehearsal)")
        _build(folder, debian)
        forget_downloads(folder / "www")
        stamp.write_text(wanted)
    return folder


def start() -> dict[str, dict[str, str]]:
    """Serve the repository on the bridge until the lab goes down; returns keys of an inventory, `engine`.

    Raises:
        GpulabError: the server does not listen within seconds.
    """
    serve(PROCESS, PORT, cache() / "www")
    key = (cache() / "www/debian/gpg").read_bytes()
    address = f"http://{network.current().gateway}:{PORT}"
    return {"engine": {"repository": address, "key_sha256": hashlib.sha256(key).hexdigest()}}


def cache() -> Path:
    """The folder of the built repository; `www` in it is what is served."""
    return paths.cache() / "docker"


def _key() -> str:
    """A digest of all that the packages are made from; Debian's packages are whatever the cache has."""
    digest = hashlib.sha256()
    for path in [*sorted(Path(__file__).parent.glob("*.py")), Path(deb.__file__)]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _build(folder: Path, debian: Fetch) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / "www.new"
    shutil.rmtree(new, ignore_errors=True)
    root = new / "debian"
    dist = root / f"dists/{CODENAME}"
    index = dist / "stable/binary-amd64"
    for place in (index, root / POOL):
        place.mkdir(parents=True)
    stanzas = []
    for package in packages.docker_packages(*_debian(debian)):
        data = pack(package)
        (root / POOL / package.filename).write_bytes(data)
        stanzas.append(deb.stanza(package, data, POOL))
    listed = "\n".join(stanzas).encode()
    (index / "Packages").write_bytes(listed)
    (index / "Packages.gz").write_bytes(gzip.compress(listed, mtime=0))
    fields = {
        "Origin": "Docker", "Label": "Docker CE", "Suite": CODENAME, "Codename": CODENAME, "Architectures": "amd64",
        "Components": "stable", "Description": "real Docker Engine of Debian, repackaged (rehearsal)",
    }  # fmt: skip
    names = [f"stable/binary-amd64/{name}" for name in ("Packages", "Packages.gz")]
    (dist / "Release").write_text(deb.release_file(dist, names, fields, now()))
    key = SigningKey(folder / "keys", "gpulab rehearsal docker (simulated)")
    try:
        key.make()
        key.sign(dist / "Release")
        (root / "gpg").write_bytes(key.public(armoured=True))
    finally:
        key.close()
    shutil.rmtree(folder / "www", ignore_errors=True)
    new.rename(folder / "www")


def _debian(debian: Fetch) -> tuple[dict[str, File | Link], dict[str, str]]:
    """All files of Debian's packages by path, and the packages' versions by name."""
    files: dict[str, File | Link] = {}
    versions = {}
    for suite, names in packages.DEBIAN.items():
        for name, path in zip(names, debian(names, suite), strict=True):
            files |= deb.unpack(path)
            words = ["dpkg-deb", "--field", str(path), "Version"]
            versions[name] = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    return files, versions

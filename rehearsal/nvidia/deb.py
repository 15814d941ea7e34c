# SPDX-License-Identifier: MIT
"""Debian packages and the signed flat repository they lie in, written byte for byte the same from the same input."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import subprocess
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path, PurePosixPath

from inventory import GpulabError


@dataclass(frozen=True)
class Link:
    """A symbolic link of a package."""

    target: str


@dataclass(frozen=True)
class File:
    """A regular file of a package."""

    content: bytes
    mode: int = 0o644


def text(content: str, mode: int = 0o644) -> File:
    return File(content.encode(), mode)


@dataclass(frozen=True)
class Package:
    """A binary package: its files by absolute path, its relations and its maintainer scripts by name."""

    name: str
    version: str
    summary: str
    files: Mapping[str, File | Link] = field(default_factory=dict)
    #: Further control fields, `Depends` and so on, as they stand in the control file.
    relations: Mapping[str, str] = field(default_factory=dict)
    scripts: Mapping[str, str] = field(default_factory=dict)
    conffiles: tuple[str, ...] = ()
    source: str = ""
    architecture: str = "amd64"
    #: What the description's end says of the content.
    kind: str = "simulated"

    @property
    def filename(self) -> str:
        return f"{self.name}_{self.version.rpartition(':')[2]}_{self.architecture}.deb"


def control(package: Package) -> str:
    """The control file of a package."""
    fields = {
        "Package": package.name,
        "Source": package.source,
        "Version": package.version,
        "Architecture": package.architecture,
        "Maintainer": "gpulab rehearsal <gpulab@example.invalid>",
        "Section": "non-free/libs",
        "Priority": "optional",
        **package.relations,
        "Description": f"{package.summary} ({package.kind})",
    }
    return "".join(f"{key}: {value}\n" for key, value in fields.items() if value)


def pack(package: Package) -> bytes:
    """The .deb file: an `ar` archive of a version, the control files and the data."""
    members: dict[str, File | Link] = {"control": text(control(package))}
    if package.conffiles:
        members["conffiles"] = text("".join(f"{path}\n" for path in package.conffiles))
    for name, script in package.scripts.items():
        members[name] = text(f"#!/bin/sh\nset -e\n{script}", 0o755)
    parts = [
        ("debian-binary", b"2.0\n"),
        ("control.tar.gz", _tar_gz(members)),
        ("data.tar.gz", _tar_gz({path.lstrip("/"): entry for path, entry in package.files.items()})),
    ]
    return b"!<arch>\n" + b"".join(_ar_member(name, data) for name, data in parts)


def unpack(path: Path) -> dict[str, File | Link]:
    """The files of a .deb of somebody else's, by absolute path.

    Raises:
        GpulabError: dpkg-deb cannot read it.
    """
    done = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(path)], capture_output=True, check=False)
    if done.returncode != 0:
        raise GpulabError(f"{path} is no Debian package", done.stderr.decode(errors="replace").strip())
    found: dict[str, File | Link] = {}
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        for member in archive:
            name = f"/{member.name.removeprefix('./')}"
            if member.issym():
                found[name] = Link(member.linkname)
            elif content := archive.extractfile(member) if member.isreg() else None:
                found[name] = File(content.read(), member.mode)
    return found


def _ar_member(name: str, data: bytes) -> bytes:
    header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode()
    return header + data + b"\n" * (len(data) % 2)


def _tar_gz(entries: Mapping[str, File | Link]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for folder in _folders(entries):
            info = tarfile.TarInfo(f"./{folder}/" if folder else "./")
            info.type, info.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(info)
        for path, entry in sorted(entries.items()):
            info = tarfile.TarInfo(f"./{path}")
            if isinstance(entry, Link):
                info.type, info.linkname, info.mode = tarfile.SYMTYPE, entry.target, 0o777
                archive.addfile(info)
            else:
                info.size, info.mode = len(entry.content), entry.mode
                archive.addfile(info, io.BytesIO(entry.content))
    return gzip.compress(buffer.getvalue(), compresslevel=1, mtime=0)


def _folders(paths: Iterable[str]) -> list[str]:
    found = {"" if str(parent) == "." else str(parent) for path in paths for parent in PurePosixPath(path).parents}
    return sorted(found)


def stanza(package: Package, data: bytes, folder: str) -> str:
    """What a `Packages` file says of a package that lies in `folder`, seen from the repository's root."""
    head, _, description = control(package).partition("Description:")
    return (
        f"{head}Filename: {folder}/{package.filename}\nSize: {len(data)}\n"
        f"SHA256: {hashlib.sha256(data).hexdigest()}\nDescription:{description}"
    )


def release_file(folder: Path, names: Iterable[str], fields: Mapping[str, str], seconds: int) -> str:
    """The `Release` file for index files of `folder`; `seconds` since the epoch is its date."""
    lines = [f"{key}: {value}" for key, value in fields.items()]
    lines += [f"Date: {formatdate(seconds, usegmt=True).replace('GMT', 'UTC')}", "SHA256:"]
    for name in names:
        data = (folder / name).read_bytes()
        lines.append(f" {hashlib.sha256(data).hexdigest()} {len(data)} {name}")
    return "\n".join(lines) + "\n"


def write_repository(
    folder: Path, packages: Sequence[tuple[Package, bytes]], fields: Mapping[str, str], key: SigningKey, seconds: int
) -> None:
    """A flat repository: the packed packages, `Packages`(.gz), `Release`, `Release.gpg` and `InRelease`."""
    folder.mkdir(parents=True, exist_ok=True)
    for package, data in packages:
        (folder / package.filename).write_bytes(data)
    index = "\n".join(stanza(package, data, ".") for package, data in packages).encode()
    (folder / "Packages").write_bytes(index)
    (folder / "Packages.gz").write_bytes(gzip.compress(index, mtime=0))
    (folder / "Release").write_text(release_file(folder, ("Packages", "Packages.gz"), fields, seconds))
    key.sign(folder / "Release")


@dataclass(frozen=True)
class SigningKey:
    """An OpenPGP key in a GnuPG home of its own."""

    home: Path
    user: str

    def make(self) -> None:
        """Make the key unless it is there: it outlives rebuilds, so that its digest can be pinned."""
        self.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not any(self.home.glob("private-keys-v1.d/*.key")):
            # Debian 13's apt checks signatures with sqv, which wants RSA of 2048 bits or more, and SHA-2.
            self._gpg("--quick-gen-key", self.user, "rsa3072", "sign", "never")

    def public(self, armoured: bool = False) -> bytes:
        """The public key, as apt's `signed-by` takes it: binary, or ASCII armour."""
        return self._gpg(*(["--armor"] if armoured else []), "--export", self.user)

    def sign(self, release: Path) -> None:
        """Write `InRelease` and `Release.gpg` beside a `Release` file."""
        self._gpg("--clearsign", "--output", str(release.with_name("InRelease")), str(release))
        self._gpg("--armor", "--detach-sign", "--output", str(release.with_name("Release.gpg")), str(release))

    def close(self) -> None:
        """End the gpg-agent that GnuPG left behind for this home."""
        subprocess.run(["gpgconf", "--homedir", str(self.home), "--kill", "all"], check=True, capture_output=True)

    def _gpg(self, *words: str) -> bytes:
        argv = ["gpg", "--batch", "--yes", "--quiet", "--passphrase", "", "--pinentry-mode", "loopback", *words]
        done = subprocess.run(argv, env={**os.environ, "GNUPGHOME": str(self.home)}, capture_output=True, check=False)
        if done.returncode != 0:
            raise GpulabError(f"`{' '.join(argv)}` ended with {done.returncode}", done.stderr.decode().strip())
        return done.stdout

# SPDX-License-Identifier: MIT
"""OCI images made without a container engine: layers from files, and the registry's own HTTP API to push and fetch.

Layers are written with sorted entries and no times, so that the same files give the same digest.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import requests

from inventory import GpulabError

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"

#: Chunks in which layers are hashed and copied, bytes.
CHUNK = 1 << 20
#: One request to the registry of the lab; a large layer takes seconds.
TIMEOUT_S = 120


@dataclass(frozen=True)
class Layer:
    """A compressed layer in a file: its digest, its size in bytes, and the digest of the tar archive within."""

    path: Path
    digest: str
    size: int
    diff_id: str


@dataclass(frozen=True)
class Image:
    """A manifest and what it refers to. `digest` is what the image is addressed by."""

    manifest: bytes
    config: bytes
    layers: tuple[Layer, ...]

    @property
    def digest(self) -> str:
        return sha256(self.manifest)


def sha256(data: bytes) -> str:
    """The digest of a blob, as OCI writes it."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def layer_of_files(files: Mapping[str, bytes | Path], folder: Path, executable: Iterable[str] = ()) -> Layer:
    """A layer of regular files: path in the image (without leading slash) to content."""
    programs = set(executable)
    with tempfile.TemporaryFile(dir=folder) as raw:
        with tarfile.open(fileobj=raw, mode="w", format=tarfile.GNU_FORMAT) as archive:
            parents = {str(parent) for path in files for parent in Path(path).parents} - {"."}
            for parent in sorted(parents):
                info = tarfile.TarInfo(parent)
                info.type, info.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(info)
            for path, content in sorted(files.items()):
                data = content.read_bytes() if isinstance(content, Path) else content
                info = tarfile.TarInfo(path)
                info.size, info.mode = len(data), 0o755 if path in programs else 0o644
                archive.addfile(info, io.BytesIO(data))
        raw.seek(0)
        return compressed(raw, folder)


def layer_of_tar(tar: Path, folder: Path, keep: Callable[[str], bool] = lambda path: True) -> Layer:
    """A layer with the entries of a tar archive, sorted and without times; `keep` chooses by path."""
    with tempfile.TemporaryFile(dir=folder) as raw:
        with tarfile.open(tar) as source, tarfile.open(fileobj=raw, mode="w", format=tarfile.GNU_FORMAT) as archive:
            members = {member.name.removeprefix("./"): member for member in source}
            for name, member in sorted(members.items()):
                if name in ("", ".") or not keep(name):
                    continue
                content = source.extractfile(member) if member.isreg() else None
                member.name, member.mtime, member.pax_headers = name, 0, {}
                member.linkname = member.linkname.removeprefix("./") if member.islnk() else member.linkname
                archive.addfile(member, content)
        raw.seek(0)
        return compressed(raw, folder)


def compressed(raw: IO[bytes], folder: Path) -> Layer:
    """Compress a tar archive into `folder`, under its digest's name."""
    diff = hashlib.sha256()
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as output:
        # Level 1: the layers travel over a bridge of the same machine.
        with gzip.GzipFile(filename="", fileobj=output, mode="wb", compresslevel=1, mtime=0) as squeezed:
            while chunk := raw.read(CHUNK):
                diff.update(chunk)
                squeezed.write(chunk)
    whole = hashlib.sha256()
    with open(output.name, "rb") as file:
        while chunk := file.read(CHUNK):
            whole.update(chunk)
    digest = f"sha256:{whole.hexdigest()}"
    path = folder / f"{digest.removeprefix('sha256:')}.tar.gz"
    shutil.move(output.name, path)
    return Layer(path, digest, path.stat().st_size, f"sha256:{diff.hexdigest()}")


@dataclass(frozen=True)
class Settings:
    """How a container of the image runs."""

    entrypoint: Sequence[str]
    command: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    ports: Sequence[int] = ()
    working_dir: str = "/"


def image(layers: Sequence[Layer], settings: Settings) -> Image:
    """Config and manifest over the layers."""
    config = _json(
        {
            "architecture": "amd64",
            "os": "linux",
            "created": "1970-01-01T00:00:00Z",
            "config": {
                "Env": [f"{name}={value}" for name, value in settings.environment.items()],
                "Entrypoint": list(settings.entrypoint),
                "Cmd": list(settings.command),
                "Labels": dict(settings.labels),
                "WorkingDir": settings.working_dir,
                "ExposedPorts": {f"{port}/tcp": {} for port in settings.ports},
            },
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
            "history": [{"created_by": "gpulab rehearsal (simulated)"} for _ in layers],
        }
    )
    manifest = _json(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {"mediaType": CONFIG, "digest": sha256(config), "size": len(config)},
            "layers": [{"mediaType": LAYER, "digest": layer.digest, "size": layer.size} for layer in layers],
            "annotations": {"org.gpulab.stand-in": "simulated"},
        }
    )
    return Image(manifest, config, tuple(layers))


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


@dataclass(frozen=True)
class Registry:
    """A registry at `url`; `ca` is the PEM file that its certificate is checked with."""

    url: str
    ca: Path | None = None

    def push(self, repository: str, pushed: Image, tag: str = "latest") -> str:
        """Upload what the registry does not have yet; returns the digest to address the image by."""
        for layer in pushed.layers:
            with open(layer.path, "rb") as file:
                self._blob(repository, layer.digest, file)
        self._blob(repository, sha256(pushed.config), io.BytesIO(pushed.config))
        answer = self._request(
            "PUT", f"/v2/{repository}/manifests/{tag}", data=pushed.manifest, headers={"Content-Type": MANIFEST}
        )
        self._expect(answer, 201, f"manifest of {repository}")
        return pushed.digest

    def manifest(self, repository: str, reference: str) -> bytes:
        """The manifest of a tag or a digest."""
        answer = self._request("GET", f"/v2/{repository}/manifests/{reference}", headers={"Accept": MANIFEST})
        self._expect(answer, 200, f"{repository}@{reference}")
        return answer.content

    def blob(self, repository: str, digest: str) -> bytes:
        """A layer or a config."""
        answer = self._request("GET", f"/v2/{repository}/blobs/{digest}")
        self._expect(answer, 200, f"{repository}@{digest}")
        return answer.content

    def _blob(self, repository: str, digest: str, content: IO[bytes]) -> None:
        if self._request("HEAD", f"/v2/{repository}/blobs/{digest}").status_code == 200:
            return
        started = self._request("POST", f"/v2/{repository}/blobs/uploads/")
        self._expect(started, 202, f"upload to {repository}")
        target = started.headers["Location"]
        separator = "&" if "?" in target else "?"
        answer = self._request("PUT", f"{target}{separator}digest={digest}", data=content)
        self._expect(answer, 201, f"{repository}@{digest}")

    def _request(self, method: str, path: str, **options: Any) -> requests.Response:
        url = path if path.startswith("http") else self.url + path
        # A proxy of the control machine must not get between the lab and its registry.
        with requests.Session() as session:
            session.trust_env = False
            verify = str(self.ca) if self.ca else True
            return session.request(method, url, timeout=TIMEOUT_S, verify=verify, **options)

    def _expect(self, answer: requests.Response, status: int, thing: str) -> None:
        if answer.status_code != status:
            raise GpulabError(
                f"The lab's registry refused {thing}: {answer.status_code}, expected {status}", answer.text[:500]
            )

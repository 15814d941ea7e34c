# SPDX-License-Identifier: MIT
"""Models on disk, laid out as Ollama does: manifests by name, blobs by digest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rehearsal.registry.ollama.gguf_file import Broken, Gguf, read_gguf
else:
    # Inside the image the programs lie in one folder, and belong to no package.
    from gguf_file import Broken, Gguf, read_gguf

Json = dict[str, Any]

WEIGHTS = "application/vnd.ollama.image.model"
#: Layers that are no weights, by what `/api/create` calls them.
EXTRAS = {
    "system": "application/vnd.ollama.image.system",
    "template": "application/vnd.ollama.image.template",
    "parameters": "application/vnd.ollama.image.params",
}
REGISTRY = "registry.ollama.ai"
DIGEST = re.compile(r"sha256[-:][0-9a-f]{64}")


class Refused(Exception):
    """An answer that is an error: HTTP status and Ollama's own words."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Model:
    """An installed model: its name with tag, the digest of its manifest, its layers and what its file says."""

    name: str
    digest: str
    weights: Path
    size: int
    gguf: Gguf
    modified: datetime
    layers: list[Json]
    extras: dict[str, Any] = field(default_factory=dict)


def full_name(name: str) -> str:
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


class Store:
    """`available`: the folder that stands in for ollama.com; None: nobody answers there."""

    def __init__(self, root: Path, available: Path | None) -> None:
        self.root = root
        self.available = available

    def manifest(self, name: str) -> Path:
        model, _, tag = full_name(name).rpartition(":")
        if not re.fullmatch(r"[A-Za-z0-9._/-]+", model) or ".." in model or not re.fullmatch(r"[\w.-]+", tag):
            raise Refused(400, "invalid model name")
        owner = model if "/" in model else f"library/{model}"
        return self.root / "manifests" / REGISTRY / owner / tag

    def blob(self, digest: str) -> Path:
        if not DIGEST.fullmatch(digest):
            raise Refused(400, "invalid digest format")
        return self.root / "blobs" / digest.replace(":", "-")

    def models(self) -> list[Model]:
        """Most recently changed first."""
        base = self.root / "manifests" / REGISTRY
        found = []
        for path in sorted(base.rglob("*")):
            if path.is_file() and not path.name.endswith("-partial"):
                owner = path.parent.relative_to(base).as_posix().removeprefix("library/")
                found.append(self._read(f"{owner}:{path.name}", path))
        return sorted(found, key=lambda model: model.modified, reverse=True)

    def get(self, name: str) -> Model:
        path = self.manifest(name)
        if not path.is_file():
            raise Refused(404, f"model '{name}' not found")
        return self._read(full_name(name), path)

    def _read(self, name: str, path: Path) -> Model:
        text = path.read_bytes()
        layers = json.loads(text)["layers"]
        (layer,) = (each for each in layers if each["mediaType"] == WEIGHTS)
        weights = self.blob(layer["digest"])
        return Model(
            name,
            hashlib.sha256(text).hexdigest(),
            weights,
            layer["size"],
            read_gguf(weights),
            datetime.fromtimestamp(path.stat().st_mtime, UTC),
            layers,
            {
                key: self.blob(each["digest"]).read_text()
                for key, media in EXTRAS.items()
                for each in layers
                if each["mediaType"] == media
            },
        )

    def pull(self, name: str) -> Iterator[Json]:
        """Copy a model out of the folder of available ones, telling of it as Ollama does."""
        yield {"status": "pulling manifest"}
        target = self.manifest(name)
        if self.available is None:
            place = target.relative_to(self.root / "manifests" / REGISTRY)
            asked = f"https://{REGISTRY}/v2/{place.parent}/manifests/{place.name}"
            raise Refused(
                500, f'pull model manifest: Get "{asked}": dial tcp: lookup {REGISTRY}: no such host (simulated)'
            )
        source = self.available / f"{full_name(name).replace(':', '_')}.gguf"
        if not source.is_file():
            raise Refused(500, "pull model manifest: file does not exist")
        data = source.read_bytes()
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        status = f"pulling {digest[7:19]}"
        yield {"status": status, "digest": digest, "total": len(data)}
        write(self.blob(digest), data)
        yield {"status": status, "digest": digest, "total": len(data), "completed": len(data)}
        yield {"status": "verifying sha256 digest"}
        layers = [{"mediaType": WEIGHTS, "digest": digest, "size": len(data)}]
        yield {"status": "writing manifest"}
        before = self.blobs_of(name)
        self._write_manifest(name, layers, read_gguf(self.blob(digest)))
        self.forget(before)
        yield {"status": "success"}

    def create(self, name: str, request: Json) -> Iterator[Json]:
        """Make a model of files that are there as blobs, or of another model."""
        self.manifest(name)
        files, base = request.get("files") or {}, request.get("from")
        if not files and not base:
            raise Refused(400, "neither 'from' or 'files' was specified")
        if base:
            layers = [each for each in self.get(str(base)).layers if each["mediaType"] not in self._given(request)]
            gguf = self.get(str(base)).gguf
        else:
            if len(files) != 1:
                raise Refused(400, "the stand-in takes one file (simulated)")
            ((file, digest),) = files.items()
            path = self.blob(str(digest))
            if not path.is_file():
                raise Refused(
                    400, f"blob not found for {file} (digest {digest}): open {path}: no such file or directory"
                )
            yield {"status": "parsing GGUF"}
            try:
                gguf = read_gguf(path)
            except Broken as broken:
                raise Refused(500, str(broken)) from None
            digest = path.name.replace("-", ":", 1)
            layers = [{"mediaType": WEIGHTS, "digest": digest, "size": path.stat().st_size}]
        for key, media in EXTRAS.items():
            if request.get(key):
                value = request[key]
                text = (value if isinstance(value, str) else json.dumps(value)).encode()
                digest = f"sha256:{hashlib.sha256(text).hexdigest()}"
                write(self.blob(digest), text)
                layers.append({"mediaType": media, "digest": digest, "size": len(text)})
        for each in layers:
            yield {"status": f"using existing layer {each['digest']}"}
        yield {"status": "writing manifest"}
        before = self.blobs_of(name)
        self._write_manifest(name, layers, gguf)
        self.forget(before)
        yield {"status": "success"}

    def _given(self, request: Json) -> set[str]:
        return {media for key, media in EXTRAS.items() if request.get(key)}

    def _write_manifest(self, name: str, layers: list[Json], gguf: Gguf) -> None:
        config = json.dumps(
            {
                "model_format": "gguf",
                "model_family": gguf.architecture,
                "model_families": [gguf.architecture],
                "model_type": human(gguf.parameters),
                "file_type": gguf.file_type,
                "architecture": "amd64",
                "os": "linux",
            },
            sort_keys=True,
        ).encode()
        digest = f"sha256:{hashlib.sha256(config).hexdigest()}"
        write(self.blob(digest), config)
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "config": {
                "mediaType": "application/vnd.docker.container.image.v1+json",
                "digest": digest,
                "size": len(config),
            },
            "layers": layers,
        }
        write(self.manifest(name), json.dumps(manifest, sort_keys=True).encode())

    def take(self, digest: str, blocks: Iterable[bytes]) -> int:
        """Keep a blob that a client sends; the HTTP status."""
        path = self.blob(digest)
        if path.exists():
            for _ in blocks:
                pass
            return 200
        path.parent.mkdir(parents=True, exist_ok=True)
        found = hashlib.sha256()
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix="sha256-", delete=False) as temporary:
            for block in blocks:
                found.update(block)
                temporary.write(block)
        if path.name != f"sha256-{found.hexdigest()}":
            os.unlink(temporary.name)
            raise Refused(400, f'digest mismatch, expected "{digest}", got "sha256:{found.hexdigest()}"')
        os.replace(temporary.name, path)
        return 201

    def copy(self, source: str, destination: str) -> None:
        self.get(source)
        write(self.manifest(destination), self.manifest(source).read_bytes())

    def delete(self, name: str) -> None:
        self.get(name)
        blobs = self.blobs_of(name)
        self.manifest(name).unlink()
        self.forget(blobs)

    def blobs_of(self, name: str) -> set[str]:
        """File names of a model's blobs; none of a model that is not there."""
        path = self.manifest(name)
        return blobs_in(path) if path.is_file() else set()

    def forget(self, blobs: set[str]) -> None:
        """Remove those of some blobs that belong to no model."""
        manifests = [path for path in (self.root / "manifests").rglob("*") if path.is_file()]
        for name in blobs.difference(*map(blobs_in, manifests)):
            (self.root / "blobs" / name).unlink(missing_ok=True)

    def prune(self) -> None:
        """Remove all blobs that belong to no model, as Ollama does when it starts."""
        self.forget({path.name for path in (self.root / "blobs").glob("*")})


def blobs_in(manifest: Path) -> set[str]:
    """File names of the blobs that a manifest names."""
    text = json.loads(manifest.read_text())
    return {each["digest"].replace(":", "-") for each in [text["config"], *text["layers"]]}


def human(count: int) -> str:
    """A number of parameters as Ollama writes it."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            value = count / size
            return f"{value:.0f}{unit}" if value >= 100 else f"{value:.1f}{unit}"
    return str(count)


def write(path: Path, data: bytes) -> None:
    """Write a whole file or nothing: a reader never sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}-partial")
    temporary.write_bytes(data)
    with contextlib.suppress(FileExistsError):
        temporary.replace(path)

# SPDX-License-Identifier: MIT
"""Runs on the guest: the folder of Milvus' backups, one folder each. What is not there in whole has another name."""

import base64
import contextlib
import datetime
import gzip
import hashlib
import json
import os
import re
import shutil
from array import array
from collections.abc import Iterator
from typing import Any

#: Of the manifest. A backup of a later format is refused.
FORMAT = 1
MANIFEST, ANSWERS = "manifest.json", "answers.json"
#: Of a backup that is being written. One that stays was killed, and the next backup removes it.
PARTIAL = ".partial"
NAME = re.compile(r"[0-9]{8}T[0-9]{6}Z-[a-z0-9][a-z0-9-]{0,63}")

#: Room that a backup leaves on the disk, bytes: Milvus ends when its disk is full.
RESERVE = 256 * 1024**2


class Refused(Exception):
    """What could not be done, for stderr."""


def name_of(reason: str, now: datetime.datetime) -> str:
    return f"{now:%Y%m%dT%H%M%SZ}-{reason}"


def backups(folder: str) -> dict[str, dict[str, Any]]:
    """The manifests of the complete backups, the oldest first."""
    found = {}
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        if NAME.fullmatch(name):
            with contextlib.suppress(OSError, ValueError):
                with open(os.path.join(folder, name, MANIFEST)) as file:
                    manifest = json.load(file)
                if manifest["complete"]:
                    found[name] = manifest
    return found


def prunable(known: dict[str, dict[str, Any]], keep: int) -> list[str]:
    """Those that go, of `backups()`: the oldest that nobody gave a name to, beyond the `keep` newest."""
    unnamed = [name for name, manifest in known.items() if not manifest["named"]]
    return unnamed[: max(len(unnamed) - max(keep, 1), 0)]


def chosen(folder: str, name: str) -> tuple[str, dict[str, Any]]:
    """A backup by its name, or the `newest`: its name and manifest.

    Raises:
        Refused: there is none, or a later version has written it.
    """
    known = backups(folder)
    if name == "newest" and known:
        name = list(known)[-1]
    if name not in known:
        there = ", ".join(known) or "none"
        raise Refused(f"no complete backup {name} in {folder}; there are: {there}")
    if known[name]["format"] > FORMAT:
        raise Refused(f"{name} has format {known[name]['format']}, and this program knows {FORMAT}: deploy first")
    return name, known[name]


def broken(folder: str, manifest: dict[str, Any], collections: list[dict[str, Any]] | None = None) -> list[str]:
    """What is wrong with a backup's files; of all its collections, or of those."""
    found = []
    for collection in manifest["collections"] if collections is None else collections:
        for each in collection["files"]:
            path = os.path.join(folder, each["name"])
            try:
                with open(path, "rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                found.append(f"{path}: {error.strerror}")
                continue
            if digest != each["sha256"]:
                found.append(f"{path} was changed: SHA-256 {digest}, written was {each['sha256']}")
    return found


def row_bytes(fields: list[dict[str, Any]], dynamic: bool) -> int:
    """About how many bytes a row has, written down. Texts are seldom as long as they may be."""
    size = 256 if dynamic else 0
    for field in fields:
        params = field["params"]
        if "dim" in params:
            per_number = {"BINARY_VECTOR": 1 / 8, "FLOAT_VECTOR": 4}.get(field["type"], 2)
            size += int(int(params["dim"]) * per_number * 4 / 3)
        elif field["type"] == "VARCHAR":
            size += min(int(params.get("max_length", 256)), 256)
        else:
            size += 256 if field["type"] in ("JSON", "ARRAY") else 16
    return size


def require_room(folder: str, wanted: int) -> None:
    """
    Raises:
        Refused: the disk has no room for so many bytes.
    """
    free = shutil.disk_usage(folder).free
    if free < wanted + RESERVE:
        mib = 1024**2
        raise Refused(
            f"{folder}: {free // mib} MiB are free, and about {-(-wanted // mib)} MiB are needed beside the "
            f"{RESERVE // mib} MiB that stay free"
        )


def encoded(row: dict[str, Any], types: dict[str, str]) -> dict[str, Any]:
    """A row as JSON has it: vectors as base64 of their bytes, which is a third of their digits and exact."""
    found = dict(row)
    for name, kind in types.items():
        if name not in found or found[name] is None:
            continue
        value = found[name]
        if kind == "FLOAT_VECTOR":
            found[name] = base64.b64encode(array("f", value).tobytes()).decode()
        elif kind.endswith("_VECTOR"):
            found[name] = base64.b64encode(value[0] if isinstance(value, list) else value).decode()
    return found


def decoded(row: dict[str, Any], types: dict[str, str]) -> dict[str, Any]:
    """A row as `insert` takes it."""
    found = dict(row)
    for name, kind in types.items():
        if kind.endswith("_VECTOR") and isinstance(found.get(name), str):
            raw = base64.b64decode(found[name])
            found[name] = array("f", raw).tolist() if kind == "FLOAT_VECTOR" else raw
    return found


def same(one: Any, other: Any) -> bool:
    """As JSON has it: a number that is none (NaN) is the same as itself there."""
    return json.dumps(one, sort_keys=True, default=str) == json.dumps(other, sort_keys=True, default=str)


class RowsFile:
    """A file of rows that is being written, compressed, a line each; its digest is that of the compressed bytes."""

    def __init__(self, path: str) -> None:
        self.rows = 0
        self._name = os.path.basename(path)
        self._digest = hashlib.sha256()
        self._file = open(path, "wb")  # noqa: SIM115 - `close` says how it ends
        self._gzip = gzip.GzipFile(filename="", mode="wb", compresslevel=1, fileobj=self, mtime=0)

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def add(self, row: dict[str, Any]) -> None:
        text = json.dumps(row, separators=(",", ":"), ensure_ascii=False, default=lambda value: value.item())
        self._gzip.write(text.encode("utf-8", "surrogatepass") + b"\n")
        self.rows += 1

    def close(self) -> dict[str, Any]:
        """Finish it on the disk; what the manifest says of it."""
        self._gzip.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        size = self._file.tell()
        self._file.close()
        return {"name": self._name, "rows": self.rows, "bytes": size, "sha256": self._digest.hexdigest()}


def rows_in(path: str) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rb") as file:
        for line in file:
            yield json.loads(line)


def put_down(path: str, content: Any) -> None:
    """A JSON file, there in whole or not at all."""
    with open(f"{path}.new", "w") as file:
        json.dump(content, file, indent=1, default=str)
        file.flush()
        os.fsync(file.fileno())
    os.rename(f"{path}.new", path)


def synced(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def new_backup(folder: str, name: str) -> Iterator[str]:
    """A folder to write a backup into; it gets its name at the end, once all of it is on the disk.

    Raises:
        Refused: there is one of that name.
    """
    os.makedirs(folder, mode=0o700, exist_ok=True)
    os.chmod(folder, 0o700)
    for left in os.listdir(folder):
        if left.endswith(PARTIAL):
            shutil.rmtree(os.path.join(folder, left))
    if os.path.exists(os.path.join(folder, name)):
        raise Refused(f"there is a backup {name} already")
    path = os.path.join(folder, name + PARTIAL)
    os.mkdir(path, 0o700)
    try:
        yield path
    except Exception:
        shutil.rmtree(path, ignore_errors=True)
        raise
    synced(path)
    os.rename(path, os.path.join(folder, name))
    synced(folder)

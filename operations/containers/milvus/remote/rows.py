# SPDX-License-Identifier: MIT
"""Rows of Milvus as files: JSON lines, packed with gzip, each file with its digest and count.

A vector of numbers is the base64 text of its little-endian float32 values, one of bytes that of its bytes, a sparse one
a list of pairs; all else is JSON as it is.
"""

import base64
import gzip
import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator
from typing import Any

#: Vectors that the server hands out as bytes.
OF_BYTES = ("BINARY_VECTOR", "FLOAT16_VECTOR", "BFLOAT16_VECTOR", "INT8_VECTOR")


class Broken(Exception):
    """A file of a backup that is not as it was written."""


def encode(row: dict[str, Any], kinds: dict[str, str]) -> str:
    """A row as one line. `kinds`: field to the name of its type; what is not in it is a dynamic field."""
    return json.dumps({name: _packed(value, kinds.get(name, "")) for name, value in row.items()}, default=_number)


def decode(line: str, kinds: dict[str, str]) -> dict[str, Any]:
    """The row of a line, as an insert takes it."""
    return {name: _unpacked(value, kinds.get(name, "")) for name, value in json.loads(line).items()}


def _packed(value: Any, kind: str) -> Any:
    if value is None:
        return None
    if kind == "FLOAT_VECTOR":
        return base64.b64encode(struct.pack(f"<{len(value)}f", *value)).decode()
    if kind in OF_BYTES:
        # The driver puts some of them into a list of one.
        inner = value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], bytes) else value
        return base64.b64encode(inner if isinstance(inner, bytes) else inner.tobytes()).decode()
    if kind == "SPARSE_FLOAT_VECTOR":
        return sorted([int(place), float(number)] for place, number in value.items())
    return value


def _unpacked(value: Any, kind: str) -> Any:
    if value is None:
        return None
    if kind == "FLOAT_VECTOR":
        content = base64.b64decode(value)
        return list(struct.unpack(f"<{len(content) // 4}f", content))
    if kind in OF_BYTES:
        return base64.b64decode(value)
    if kind == "SPARSE_FLOAT_VECTOR":
        return dict(value)
    return value


def _number(value: Any) -> Any:
    """A number of NumPy's, as the driver has for some fields."""
    return value.item()


def write(path: str, rows: Iterable[dict[str, Any]], kinds: dict[str, str]) -> dict[str, Any]:
    """Write a file of rows; its `rows` and the `sha256` of what lies on the disk."""
    count = 0
    with open(path, "wb") as file:
        # Without a name and a time of its own, the same rows make the same file.
        with gzip.GzipFile("", "wb", 1, file, mtime=0) as packed:
            for row in rows:
                packed.write(encode(row, kinds).encode() + b"\n")
                count += 1
        file.flush()
        os.fsync(file.fileno())
    return {"rows": count, "sha256": digest(path)}


def read(path: str, kinds: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The rows of a file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield decode(line, kinds)


def digest(path: str) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def check(path: str, written: dict[str, Any]) -> None:
    """
    Raises:
        Broken: the file is absent or not what was written.
    """
    if not os.path.isfile(path):
        raise Broken(f"{path} is missing")
    if (found := digest(path)) != written["sha256"]:
        raise Broken(
            f"{path} has another digest than when it was written: {found[:12]}, expected {written['sha256'][:12]}"
        )


def lost(before: list[list[Any]], now: list[list[Any]], closest_is_small: bool) -> list[Any]:
    """The ids of one answer (`[id, distance]`, closest first) that another one lacks and should not.

    One that gave way to a row at least as close is not lost: rows as far as each other come in any order, and rows
    may have come in between.
    """
    ids = {each[0] for each in now}
    if len(now) < len(before):
        return [each[0] for each in before if each[0] not in ids]
    farthest = now[-1][1] if now else 0.0
    return [each[0] for each in before if each[0] not in ids and _closer(each[1], farthest, closest_is_small)]


def _closer(distance: float, than: float, closest_is_small: bool) -> bool:
    """By more than float32 sums in another order differ."""
    slack = 1e-4 * max(1.0, abs(distance), abs(than))
    return than - distance > slack if closest_is_small else distance - than > slack

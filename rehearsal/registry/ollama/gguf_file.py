# SPDX-License-Identifier: MIT
"""What a GGUF file says of itself, and whether it is whole. Errors are worded as Ollama words them.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

#: Value types: struct formats by number; 8 is a string, 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
#: Tensor types: elements and bytes of a block, of those that models are published in.
BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 10: (256, 84),
    11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 30: (1, 2),
}  # fmt: skip
FILE_TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 7: "Q8_0", 14: "Q4_K_S", 15: "Q4_K_M", 17: "Q5_K_M", 18: "Q6_K"}
#: Array values that are kept; vocabularies are longer.
KEPT = 16


class Broken(Exception):
    """Why a file is no model, in Ollama's words."""


@dataclass(frozen=True)
class Gguf:
    """Key-values of a file (long arrays are empty) and its number of parameters."""

    values: dict[str, Any]
    parameters: int

    def of_architecture(self, key: str, otherwise: int = 0) -> int:
        return int(self.values.get(f"{self.architecture}.{key}", otherwise))

    @property
    def architecture(self) -> str:
        return str(self.values.get("general.architecture", "unknown"))

    @property
    def file_type(self) -> str:
        return FILE_TYPES.get(int(self.values.get("general.file_type", -1)), "unknown")


@lru_cache(maxsize=64)
def read_gguf(path: Path) -> Gguf:
    """Read a file once: a blob's name is its digest.

    Raises:
        Broken: it is no GGUF, of a version that nobody reads, or shorter than its header says.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise Broken("invalid file magic")
        version = _scalar(file, "I")
        if version < 2:
            raise Broken(f"unsupported version {version}")
        tensors, pairs = _scalar(file, "Q"), _scalar(file, "Q")
        values = {}
        for _ in range(pairs):
            key = _string(file, size)
            values[key] = _value(file, _scalar(file, "I"), size)
        described = [_tensor(file, size) for _ in range(tensors)]
        alignment = int(values.get("general.alignment", 32))
        start = math.ceil(file.tell() / alignment) * alignment
    for name, elements, kind, offset in described:
        per, width = BLOCKS.get(kind, (1, 0))
        end = start + offset + elements // per * width
        if end > size:
            raise Broken(f'tensor "{name}" offset+size ({end}) exceeds file size ({size})')
    return Gguf(values, sum(elements for _, elements, _, _ in described))


def _tensor(file: BinaryIO, size: int) -> tuple[str, int, int, int]:
    """Name, number of elements, type and offset of a tensor."""
    name = _string(file, size)
    dimensions = _scalar(file, "I")
    if dimensions > 8:
        raise Broken(f'tensor "{name}" has {dimensions} dimensions')
    shape = [_scalar(file, "Q") for _ in range(dimensions)]
    return name, math.prod(shape), _scalar(file, "I"), _scalar(file, "Q")


def _value(file: BinaryIO, kind: int, size: int) -> Any:
    if kind == STRING:
        return _string(file, size)
    if kind == ARRAY:
        inner, count = _scalar(file, "I"), _scalar(file, "Q")
        if count > size:
            raise Broken("unexpected EOF")
        items = [_value(file, inner, size) for _ in range(count)]
        return items if count <= KEPT else []
    if kind not in SCALARS:
        raise Broken(f"unsupported type {kind}")
    return _scalar(file, SCALARS[kind])


def _string(file: BinaryIO, size: int) -> str:
    length = _scalar(file, "Q")
    if length > size:
        raise Broken("unexpected EOF")
    return _exactly(file, length).decode(errors="replace")


def _scalar(file: BinaryIO, form: str) -> Any:
    return struct.unpack(f"<{form}", _exactly(file, struct.calcsize(f"<{form}")))[0]


def _exactly(file: BinaryIO, length: int) -> bytes:
    data = file.read(length)
    if len(data) != length:
        raise Broken("unexpected EOF" if data else "EOF")
    return data

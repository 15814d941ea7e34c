# SPDX-License-Identifier: MIT
"""Compiles the benchmarks' kernels from CUDA C to PTX text: `make kernels`.

NVRTC 12.2 writes PTX 8.2, which drivers from R535 on accept; a later compiler's PTX they would refuse. Of the PTX
for sm_80 each driver makes the code of its own card. A GPU or a driver is not needed here.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import re
import sys
from pathlib import Path

KERNELS = Path(__file__).parent / "kernels"
WANTED = (12, 2)
OPTIONS = ("--gpu-architecture=compute_80", "--fmad=false")


class CompileError(Exception):
    """No PTX: the compiler is not there or is another, or the source is wrong."""


class Nvrtc:
    """The compiler of the package nvidia-cuda-nvrtc-cu12.

    Raises:
        CompileError: the package is not installed, or is of another version.
    """

    def __init__(self) -> None:
        found = importlib.util.find_spec("nvidia.cuda_nvrtc") if importlib.util.find_spec("nvidia") else None
        if found is None or not found.submodule_search_locations:
            raise CompileError("NVRTC is not installed. hint: pip install '.[kernels]'")
        self.library = ctypes.CDLL(str(Path(found.submodule_search_locations[0]) / "lib/libnvrtc.so.12"))
        self.library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        if (major.value, minor.value) != WANTED:
            raise CompileError(f"NVRTC is {major.value}.{minor.value}, expected {WANTED[0]}.{WANTED[1]}")

    def compile(self, source: Path) -> str:
        """PTX of a source file.

        Raises:
            CompileError: with the compiler's own words.
        """
        program = ctypes.c_void_p()
        code = source.read_bytes()
        self._call("nvrtcCreateProgram", ctypes.byref(program), code, source.name.encode(), 0, None, None)
        try:
            words = [option.encode() for option in OPTIONS]
            if self.library.nvrtcCompileProgram(program, len(words), (ctypes.c_char_p * len(words))(*words)):
                raise CompileError(self._text("nvrtcGetProgramLog", program))
            return self._text("nvrtcGetPTX", program)
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))

    def _text(self, question: str, program: ctypes.c_void_p) -> str:
        size = ctypes.c_size_t()
        self._call(f"{question}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(question, program, buffer)
        return buffer.value.decode()

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self.library, name)(*arguments)
        if code:
            raise CompileError(f"{name}: {self.library.nvrtcGetErrorString(code).decode()}")


def digest(source: Path) -> str:
    """What the PTX text remembers of its source."""
    return hashlib.sha256(source.read_bytes()).hexdigest()


def recorded(ptx: str) -> str:
    """The source's digest in the first line of a PTX text, empty: none."""
    found = re.match(r"// Compiled from \S+, SHA-256 ([0-9a-f]{64})\n", ptx)
    return found[1] if found else ""


def ptx_of(source: Path, compiler: Nvrtc) -> str:
    """The whole text of the .ptx file beside a source."""
    # NVRTC leaves the constants of one of its own headers in every module; nothing uses them.
    code = re.sub(r"^\.global .*nv6target.*\n", "", compiler.compile(source), flags=re.MULTILINE)
    return f"// Compiled from {source.name}, SHA-256 {digest(source)}\n{code.strip()}\n"


def main() -> int:
    """Write the PTX of every source anew."""
    try:
        compiler = Nvrtc()
        for source in sorted(KERNELS.glob("*.cu")):
            source.with_suffix(".ptx").write_text(ptx_of(source, compiler))
            print(f"{source.name}: {source.with_suffix('.ptx').name} written")
    except CompileError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

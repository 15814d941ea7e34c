# SPDX-License-Identifier: MIT
"""Runs Milvus as the image's first process, and holds the device memory that its pool would take.

    entry.py -- milvus run standalone

The server is real, its build knows no GPU: the simulated card's memory is allocated so that the card's own tools see
it, and given back when this process ends.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

MIB = 1 << 20
#: What Milvus takes when nobody says otherwise, MiB.
POOL_MIB = 2048


def settings(folder: Path) -> dict[str, Any]:
    """milvus.yaml with user.yaml over it, as Milvus since 2.4 reads them; this server knows the first alone."""
    merged: dict[str, Any] = {}
    for name in ("milvus.yaml", "user.yaml"):
        if (folder / name).exists():
            merged = over(merged, yaml.safe_load((folder / name).read_text()) or {})
    return merged


def over(below: Any, above: Any) -> Any:
    """`above` over `below`, key by key."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return {**below, **{key: over(below.get(key), value) for key, value in above.items()}}


def pool_mib(merged: dict[str, Any]) -> int:
    """What `gpu.initMemSize` comes to; the environment wins, whatever its notation (GPU_INITMEMSIZE)."""
    for name, value in os.environ.items():
        if re.sub("[/_.]", "", name).lower() == "gpuinitmemsize":
            return int(value)
    found = (merged.get("gpu") or {}).get("initMemSize")
    return POOL_MIB if found is None else int(found)


def write(merged: dict[str, Any], source: Path) -> Path:
    """The settings as the one file that the server reads, in a folder that nobody else may look into."""
    folder = Path(tempfile.mkdtemp(prefix="milvus-configs-"))
    for path in source.iterdir():
        if path.is_file() and path.suffix == ".conf":
            shutil.copy(path, folder / path.name)
    (folder / "milvus.yaml").write_text(yaml.safe_dump(merged))
    return folder


def claim_device(size: int) -> str:
    """Allocate `size` bytes beside the context; says why when there is no card, or it refuses."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no card is visible"
    handle, address = ctypes.c_void_p(), ctypes.c_uint64()
    if error := cuda.cuInit(0) or cuda.cuCtxCreate_v2(ctypes.byref(handle), 0, 0):
        return f"the card cannot be opened (CUDA error {error})"
    if size and (error := cuda.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(size))):
        cuda.cuCtxDestroy_v2(handle)
        return f"the card refuses {size // MIB} MiB (CUDA error {error})"
    return ""


def main() -> int:
    words = [word for word in sys.argv[1:] if word != "--"]
    program = shutil.which(words[0])
    if program is None:
        print(f"{words[0]}: not in this image", file=sys.stderr)
        return 127
    libraries = Path(program).resolve().parent.parent / "lib"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries)}
    if words[:2] == ["milvus", "run"]:
        source = Path(os.environ.get("MILVUSCONF") or "configs")
        merged = settings(source)
        environment["MILVUSCONF"] = str(write(merged, source))
        pool = pool_mib(merged)
        why = claim_device(pool * MIB)
        held = f"{why}; " if why else f"holding {pool} MiB of the simulated card; "
        print(f"milvus: simulated: {held}a real server, built for the CPU", file=sys.stderr, flush=True)
    server = subprocess.Popen([program, *words[1:]], env=environment)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda got, frame: server.send_signal(got))
    return wait(server)


def wait(server: subprocess.Popen[bytes]) -> int:
    """Until the server ends; as the first process of a container this one reaps what others leave, too."""
    while True:
        pid, status = os.wait()
        if pid == server.pid:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())

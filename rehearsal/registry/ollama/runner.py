# SPDX-License-Identifier: MIT
"""Serves one model with llama.cpp on a free port of the loopback address, and holds its share of the card.

    runner.py WEIGHTS CONTEXT PARALLEL DEVICE_BYTES

It prints one line of JSON, `port` and `vram`, when it is ready. The computing is done by the CPU in any case; the
device memory is allocated so that the card's own tools see it, and given back when this process ends.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "lib"))

CONTEXT_BYTES = 128 * 1024 * 1024  # what opening the device costs by itself: cuda.c


def claim_device(size: int) -> int:
    """Allocate so that this process holds `size` bytes of the card in all; 0 when the card refuses."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    handle, address = ctypes.c_void_p(), ctypes.c_uint64()
    if cuda.cuInit(0) or cuda.cuCtxCreate_v2(ctypes.byref(handle), 0, 0):
        return 0
    rest = max(size - CONTEXT_BYTES, 1)
    if cuda.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(rest)):
        cuda.cuCtxDestroy_v2(handle)
        return 0
    return size


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    # Not at the top: it comes with the image, and lies in a folder that only this program looks into.
    xllamacpp: Any = importlib.import_module("xllamacpp")
    weights, (context, parallel, wanted) = sys.argv[1], map(int, sys.argv[2:5])
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    vram = claim_device(wanted) if wanted else 0
    params = xllamacpp.CommonParams()
    params.model.path = weights
    # Of all requests together: each of them has a context of its own.
    params.n_ctx = context * parallel
    params.n_parallel = parallel
    # It then answers with embeddings as well.
    params.embedding = True
    params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    params.cpuparams.n_threads = min(2, os.cpu_count() or 1)
    params.hostnames = ["127.0.0.1"]
    params.port = free_port()
    params.warmup = False
    # llama.cpp logs to stdout as well: the line for our parent must stay alone there.
    answer = os.dup(1)
    os.dup2(2, 1)
    server = xllamacpp.Server(params)
    os.write(answer, json.dumps({"port": params.port, "vram": vram}).encode() + b"\n")
    os.close(answer)
    threading.Event().wait()
    del server


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: MIT
"""GPU smoke benchmarks: measures the card, checks every result, and prints one JSON object.

Needs the driver and Python 3.10, nothing else. A card that others use is left alone. Progress goes to stderr. The exit
status is 0 measured, 1 failed, 2 wrong arguments, 3 inconclusive, 4 not run. docs/benchmarks.md tells what is measured
and how.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import math
import mmap
import os
import pwd
import queue
import random
import re
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

#: The kernels' PTX by the name of their source, filled in where this file goes alone. None: it lies beside this file.
PTX: Mapping[str, str] | None = None

MIB = 1 << 20
#: A byte that no result consists of.
POISON = 0xA5
#: 32-bit words after which random data repeats. A prime: data that comes from a wrong place does not look right.
PERIOD = 65521
EXIT = {"measured": 0, "failed": 1, "inconclusive": 3, "not run": 4}


@dataclass(frozen=True)
class Effort:
    """How much a run may take. `samples` and `least_s` are the fewest and the shortest of a metric, `metric_s` is the
    most; `sample_s` is the length of a sample that is aimed at.
    """

    total_s: float
    least_s: float
    metric_s: float
    pattern_s: float
    warm_s: float
    sample_s: float
    samples: int
    passes: int
    buffer: int
    transfer: int


# The least is for clocks to settle under load, and for telemetry to read them more than once.
QUICK = Effort(17.0, 0.2, 0.6, 1.5, 0.1, 0.005, 6, 2, 256 * MIB, 64 * MIB)
FULL = Effort(110.0, 1.0, 4.0, 12.0, 0.5, 0.02, 15, 8, 512 * MIB, 256 * MIB)
MOST_SAMPLES = 500


class Verdict(Exception):
    """The run is over; `verdict` is what becomes of it and the text is the reason."""

    verdict = "failed"


class NotRun(Verdict):
    verdict = "not run"


class Inconclusive(Verdict):
    verdict = "inconclusive"


class Unmeasured(Exception):
    """One metric can't be had here; the others can."""


class CudaError(Exception):
    """A call that the driver answered with an error."""

    def __init__(self, call: str, code: int, name: str, text: str) -> None:
        super().__init__(f"{call}: {name} ({code}): {text}")
        self.code = code


# CUDA's driver.

INT, UINT, U64, SIZE, FLOAT = ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_float
POINTER = ctypes.c_void_p
INVALID_VALUE, OUT_OF_MEMORY, NO_DEVICE, UNAVAILABLE, NOT_READY, NOT_SUPPORTED = 1, 2, 100, 46, 600, 801
#: Arguments of each function; pointers to results are given as pointers to anything.
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (UINT,),
    "cuGetErrorName": (INT, POINTER),
    "cuGetErrorString": (INT, POINTER),
    "cuDeviceGetByPCIBusId": (POINTER, ctypes.c_char_p),
    "cuDeviceGetAttribute": (POINTER, INT, INT),
    "cuDevicePrimaryCtxSetFlags_v2": (INT, UINT),
    "cuDevicePrimaryCtxRetain": (POINTER, INT),
    "cuDevicePrimaryCtxRelease_v2": (INT,),
    "cuCtxSetCurrent": (POINTER,),
    "cuCtxSynchronize": (),
    "cuModuleLoadDataEx": (POINTER, ctypes.c_char_p, UINT, POINTER, POINTER),
    "cuModuleGetFunction": (POINTER, POINTER, ctypes.c_char_p),
    "cuModuleUnload": (POINTER,),
    "cuOccupancyMaxActiveBlocksPerMultiprocessor": (POINTER, POINTER, INT, SIZE),
    "cuMemGetInfo_v2": (POINTER, POINTER),
    "cuMemAlloc_v2": (POINTER, SIZE),
    "cuMemFree_v2": (U64,),
    "cuMemHostAlloc": (POINTER, SIZE, UINT),
    "cuMemFreeHost": (POINTER,),
    "cuMemcpyHtoD_v2": (U64, POINTER, SIZE),
    "cuMemcpyDtoH_v2": (POINTER, U64, SIZE),
    "cuMemcpyHtoDAsync_v2": (U64, POINTER, SIZE, POINTER),
    "cuMemcpyDtoHAsync_v2": (POINTER, U64, SIZE, POINTER),
    "cuMemsetD8Async": (U64, ctypes.c_ubyte, SIZE, POINTER),
    "cuStreamCreate": (POINTER, UINT),
    "cuStreamDestroy_v2": (POINTER,),
    "cuStreamSynchronize": (POINTER,),
    "cuStreamWaitEvent": (POINTER, POINTER, UINT),
    "cuEventCreate": (POINTER, UINT),
    "cuEventDestroy_v2": (POINTER,),
    "cuEventRecord": (POINTER, POINTER),
    "cuEventSynchronize": (POINTER,),
    "cuEventQuery": (POINTER,),
    "cuEventElapsedTime": (POINTER, POINTER, POINTER),
    "cuLaunchKernel": (POINTER, *[UINT] * 7, POINTER, POINTER, POINTER),
}
MULTIPROCESSORS, L2_BYTES, BUS_BITS, COPY_ENGINES, MPS_ENABLED = 16, 38, 37, 40, 133
BLOCKING = 4  # CU_CTX_SCHED_BLOCKING_SYNC: waiting leaves the processor to others


class Cuda:
    """The driver's library, and what this process holds of the card: everything is freed on the way out."""

    def __init__(self) -> None:
        try:
            self.library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise NotRun("no CUDA driver") from error
        #: What could not be freed, in the driver's words.
        self.unfreed: list[str] = []

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the driver.

        Raises:
            CudaError: the driver's answer is an error.
        """
        if code := self.answer(name, *arguments):
            raise self.error(name, code)

    def error(self, name: str, code: int) -> CudaError:
        return CudaError(name, code, self._say("cuGetErrorName", code), self._say("cuGetErrorString", code))

    def answer(self, name: str, *arguments: Any) -> int:
        """The driver's answer to a call, 0: success."""
        try:
            function = getattr(self.library, name)
        except AttributeError:
            raise Verdict(f"libcuda.so.1 has no {name}: a driver older than R535?") from None
        function.argtypes = SIGNATURES[name]
        return int(function(*arguments))

    def _say(self, question: str, code: int) -> str:
        word = ctypes.c_char_p()
        known = self.answer(question, code, ctypes.byref(word)) == 0 and word.value
        return word.value.decode() if known and word.value else "unknown error"

    def start(self) -> None:
        """Initialize the driver.

        Raises:
            NotRun: there is no driver behind the library, or no card.
        """
        text = ctypes.c_char_p()
        # The simulated card of a rehearsal says so in the text of this error.
        self.answer("cuGetErrorString", NOT_SUPPORTED, ctypes.byref(text))
        if b"simulated" in (text.value or b""):
            raise NotRun(f"no CUDA driver: {(text.value or b'').decode()}")
        try:
            self.call("cuInit", 0)
        except CudaError as error:
            if error.code == NO_DEVICE:
                raise NotRun(f"no CUDA device: {error}") from error
            raise

    @contextmanager
    def context(self, bus_id: str) -> Iterator[int]:
        """The card's primary context, current; gives the device."""
        device, context = INT(), POINTER()
        self.call("cuDeviceGetByPCIBusId", ctypes.byref(device), bus_id.encode())
        self.call("cuDevicePrimaryCtxSetFlags_v2", device, BLOCKING)
        try:
            self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        except CudaError as error:
            if error.code == UNAVAILABLE:
                raise Inconclusive(f"GPU in use: {error}") from error
            raise
        try:
            self.call("cuCtxSetCurrent", context)
            yield device.value
        finally:
            self._free("cuDevicePrimaryCtxRelease_v2", device)

    def attribute(self, number: int, device: int) -> int:
        value = INT()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), number, device)
        return value.value

    @contextmanager
    def module(self, ptx: str) -> Iterator[ctypes.c_void_p]:
        """A module that the driver compiles for its card.

        Raises:
            CudaError: with the compiler's own words.
        """
        module, log = POINTER(), ctypes.create_string_buffer(8192)
        # CU_JIT_ERROR_LOG_BUFFER and its size, which is given by value.
        options = (INT * 2)(5, 6)
        values = (POINTER * 2)(ctypes.addressof(log), len(log))
        try:
            self.call("cuModuleLoadDataEx", ctypes.byref(module), ptx.encode(), 2, options, values)
        except CudaError as error:
            if said := log.value.decode(errors="replace").strip():
                error.args = (f"{error}; {said.splitlines()[0]}",)
            raise
        try:
            yield module
        finally:
            self._free("cuModuleUnload", module)

    def function(self, module: ctypes.c_void_p, name: str) -> ctypes.c_void_p:
        function = POINTER()
        self.call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
        return function

    def memory(self, size: int) -> AbstractContextManager[int]:
        """Device memory of `size` bytes; gives its address."""
        return self._held("cuMemAlloc_v2", U64, "cuMemFree_v2", size)

    def pinned(self, size: int) -> AbstractContextManager[int]:
        """Memory of the host that the card can reach by itself; gives its address."""
        return self._held("cuMemHostAlloc", POINTER, "cuMemFreeHost", size, 0)

    def stream(self) -> AbstractContextManager[int]:
        return self._held("cuStreamCreate", POINTER, "cuStreamDestroy_v2", 1)  # CU_STREAM_NON_BLOCKING

    def event(self) -> AbstractContextManager[int]:
        return self._held("cuEventCreate", POINTER, "cuEventDestroy_v2", 1)  # CU_EVENT_BLOCKING_SYNC

    @contextmanager
    def _held(self, make: str, kind: Any, free: str, *arguments: Any) -> Iterator[int]:
        made = kind()
        self.call(make, ctypes.byref(made), *arguments)
        try:
            yield made.value
        finally:
            self._free(free, made)

    def _free(self, name: str, thing: Any) -> None:
        """An error here must not hide the one that led here, nor keep the rest from being freed."""
        try:
            self.call(name, thing)
        except (CudaError, Verdict) as error:
            self.unfreed.append(str(error))

    def free_memory(self) -> int:
        """Bytes of the card that nobody has."""
        free, total = SIZE(), SIZE()
        self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value


# NVML.


class Process(ctypes.Structure):
    _fields_ = [("pid", UINT), ("used", U64), ("gpu_instance", UINT), ("compute_instance", UINT)]


class Pci(ctypes.Structure):
    _fields_ = [
        ("legacy", ctypes.c_char * 16),
        *((name, UINT) for name in ("domain", "bus", "device", "id", "subsystem")),
        ("bus_id", ctypes.c_char * 32),
    ]


class Memory(ctypes.Structure):
    _fields_ = [("total", U64), ("free", U64), ("used", U64)]


FUNCTION_NOT_FOUND, INSUFFICIENT_SIZE = 13, 7
#: What NVML says where there is nothing to measure.
NO_GPU = {2: "no such GPU", 6: "no such GPU", 9: "no CUDA driver is loaded"}
SM, MEM = 1, 2
PROCESS_LISTS = ("Compute", "MPSCompute", "Graphics")
#: What the kernel calls MPS' own processes: it keeps 15 characters of a name.
MPS_NAME = "nvidia-cuda-mps"


class Nvml:
    """One card as NVML sees it. What the driver does not answer is None; functions that it lacks are in `missing`."""

    def __init__(self, index: int) -> None:
        self.missing: set[str] = set()
        #: This process, as NVML numbers it: see recognize().
        self.own = os.getpid()
        try:
            self.library = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError as error:
            raise Inconclusive("not known whether the GPU is in use: libnvidia-ml.so.1 is missing") from error
        self.library.nvmlErrorString.restype = ctypes.c_char_p
        self._must("nvmlInit_v2")
        self.device = POINTER()
        try:
            self._must("nvmlDeviceGetHandleByIndex_v2", UINT(index), ctypes.byref(self.device))
        except Verdict:
            self.close()
            raise

    def close(self) -> None:
        self.library.nvmlShutdown()

    def _must(self, name: str, *arguments: Any) -> None:
        if code := self._answer(name, *arguments):
            said = f"{name}: {(self.library.nvmlErrorString(code) or b'error').decode()} ({code})"
            if code in NO_GPU:
                raise NotRun(f"{NO_GPU[code]}: {said}")
            raise Inconclusive(f"not known whether the GPU is in use: {said}")

    def _answer(self, name: str, *arguments: Any) -> int:
        try:
            function = getattr(self.library, name)
        except AttributeError:
            self.missing.add(name)
            return FUNCTION_NOT_FOUND
        return int(function(*arguments))

    def number(self, name: str, *arguments: int, kind: Any = UINT) -> int | None:
        value = kind()
        words = [UINT(argument) for argument in arguments]
        return (
            value.value if self._answer(f"nvmlDeviceGet{name}", self.device, *words, ctypes.byref(value)) == 0 else None
        )

    def text(self, name: str) -> str | None:
        buffer = ctypes.create_string_buffer(96)
        if self._answer(f"nvmlDeviceGet{name}", self.device, buffer, UINT(len(buffer))):
            return None
        return buffer.value.decode(errors="replace")

    def driver(self) -> str | None:
        buffer = ctypes.create_string_buffer(96)
        return None if self._answer("nvmlSystemGetDriverVersion", buffer, UINT(96)) else buffer.value.decode()

    def cuda(self) -> str | None:
        version = INT()
        if self._answer("nvmlSystemGetCudaDriverVersion_v2", ctypes.byref(version)):
            return None
        return f"{version.value // 1000}.{version.value % 1000 // 10}"

    def pci(self) -> Pci:
        pci = Pci()
        self._must("nvmlDeviceGetPciInfo_v3", self.device, ctypes.byref(pci))
        return pci

    def capability(self) -> tuple[int, int] | None:
        major, minor = INT(), INT()
        got = self._answer("nvmlDeviceGetCudaComputeCapability", self.device, ctypes.byref(major), ctypes.byref(minor))
        return None if got else (major.value, minor.value)

    def memory_mib(self) -> int | None:
        memory = Memory()
        got = self._answer("nvmlDeviceGetMemoryInfo", self.device, ctypes.byref(memory))
        return None if got else memory.total // MIB

    def busy_percent(self) -> int | None:
        rates = (UINT * 2)()
        return None if self._answer("nvmlDeviceGetUtilizationRates", self.device, rates) else rates[0]

    def reasons(self) -> int | None:
        """What holds the clocks, as NVML's bits; the function has two names, of which old drivers know the second."""
        found = self.number("CurrentClocksEventReasons", kind=U64)
        return self.number("CurrentClocksThrottleReasons", kind=U64) if found is None else found

    def processes(self) -> set[int]:
        """All processes on the card, clients of MPS too.

        Raises:
            Inconclusive: NVML does not tell.
        """
        found: set[int] = set()
        for which in PROCESS_LISTS:
            listed = self._process_list(which)
            if listed is None and which == "Compute":
                raise Inconclusive("not known whether the GPU is in use: NVML lists no processes")
            found |= listed or set()
        return found

    def _process_list(self, which: str) -> set[int] | None:
        for version in ("_v3", "_v2"):
            room = 64
            while True:
                count, rows = UINT(room), (Process * room)()
                name = f"nvmlDeviceGet{which}RunningProcesses{version}"
                code = self._answer(name, self.device, ctypes.byref(count), rows)
                if code == 0:
                    return {row.pid for row in rows[: count.value]}
                if code != INSUFFICIENT_SIZE:
                    break
                # More may come until the next question.
                room = max(count.value, room) * 2
        return None

    def others(self, parent: int | None = None) -> list[str]:
        """Who uses the card besides us: `PID name`. MPS' own processes use nothing; children of `parent` are ours."""
        found = []
        for pid in sorted(self.processes() - {self.own}):
            name = process_name(pid)
            if parent is not None and parent_of(pid) == parent:
                continue
            if name is None or not name.startswith(MPS_NAME):
                found.append(f"PID {pid} {name or '(not visible here)'}")
        return found

    def recognize(self, before: set[int]) -> list[str]:
        """Learn which process we are, now that we hold a context; `before`: those listed until then. Gives notes.

        NVML may not know the numbers of a container or a sandbox. Then we are the one that has come and that nobody
        here can see.
        """
        listed = self.processes()
        unseen = [pid for pid in listed - before if process_name(pid) is None]
        if self.own in listed or len(unseen) != 1:
            return []
        self.own = unseen[0]
        return [f"NVML knows this process, {os.getpid()}, as PID {self.own}"]


def process_name(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def parent_of(pid: int) -> int | None:
    try:
        # The name in brackets may hold anything, brackets too.
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    except OSError:
        return None


#: Seconds that a process which has just ended may still be listed.
SETTLE_S = 2.0
#: Percent of use by nobody that is still rest.
REST_PERCENT = 5


def leave_alone(nvml: Nvml) -> None:
    """Go on only where nobody else uses the card.

    Raises:
        Inconclusive: the card is in use.
    """
    end = time.monotonic() + SETTLE_S
    while True:
        others, percent = nvml.others(), nvml.busy_percent() or 0
        if not others and percent <= REST_PERCENT:
            return
        if time.monotonic() >= end:
            break
        time.sleep(0.2)
    if others:
        raise Inconclusive(f"GPU in use by {', '.join(others)}")
    raise Inconclusive(f"GPU in use: {percent} % busy, by nobody whom NVML lists")


class Telemetry(threading.Thread):
    """Reads clocks, power, temperature, limiting reasons and the link all along, and who else comes to the card."""

    EVERY_S, LOOK_S = 0.1, 1.0

    def __init__(self, nvml: Nvml, began: float) -> None:
        super().__init__(name="telemetry", daemon=True)
        self.nvml, self.began = nvml, began
        self.rows: list[dict[str, Any]] = []
        self.intruders: list[str] = []
        self._end = threading.Event()

    def run(self) -> None:
        look = 0.0
        while not self._end.wait(self.EVERY_S):
            self.rows.append(self.row())
            if time.monotonic() - look >= self.LOOK_S and not self.intruders:
                look = time.monotonic()
                try:
                    self.intruders = self.nvml.others()
                except Inconclusive:
                    self.intruders = ["somebody, perhaps: NVML no longer lists processes"]

    def row(self) -> dict[str, Any]:
        ask = self.nvml.number
        milliwatts = ask("PowerUsage")
        return {
            "t": round(time.monotonic() - self.began, 3),
            "sm_mhz": ask("ClockInfo", SM),
            "memory_mhz": ask("ClockInfo", MEM),
            "power_w": None if milliwatts is None else milliwatts / 1000,
            "temperature_c": ask("Temperature", 0),
            "reasons": self.nvml.reasons(),
            "link_generation": ask("CurrPcieLinkGeneration"),
            "link_width": ask("CurrPcieLinkWidth"),
        }

    def close(self) -> None:
        self._end.set()
        if self.is_alive():
            self.join()

    def median(self, key: str, begin: float, end: float) -> float | None:
        """Of what was read between two moments of time.monotonic(), None: nothing."""
        values = [row[key] for row in self.rows if begin <= row["t"] + self.began <= end and row[key] is not None]
        return statistics.median(values) if values else None


# Data with a known answer. Everything is a whole number small enough for 32-bit arithmetic to be exact.


def words(values: Sequence[int] | Sequence[float], kind: str) -> bytes:
    return struct.pack(f"<{len(values)}{kind}", *values)


def mismatches(address: int, expected: bytes, size: int) -> int:
    """32-bit words of host memory at `address` that differ from `expected`, repeated over `size` bytes."""
    wrong, step = 0, 4096
    for begin in range(0, size, len(expected)):
        length = min(len(expected), size - begin)
        found = ctypes.string_at(address + begin, length)
        if found == expected[:length]:
            continue
        for at in range(0, length, step):
            left, right = found[at : at + step], expected[at : min(at + step, length)]
            if left != right:
                wrong += sum(left[n : n + 4] != right[n : n + 4] for n in range(0, len(right), 4))
    return wrong


TRIAD_FACTOR = 3.0


def triad_tiles(rng: random.Random) -> tuple[bytes, bytes, bytes]:
    """Two random operands and left + 3 * right: multiples of 2**-20 below 4, so that nothing is rounded."""
    left = [rng.randrange(-(2**20), 2**20) for _ in range(PERIOD)]
    right = [rng.randrange(-(2**20), 2**20) for _ in range(PERIOD)]
    rows = (left, right, [a + int(TRIAD_FACTOR) * b for a, b in zip(left, right, strict=True)])
    a, b, c = (words([value / 2**20 for value in row], "f") for row in rows)
    return a, b, c


THREADS = 256
FMA_CHAINS, FMA_STEPS, FMA_UNROLL = 8, 4, 8


def fma_tables(rng: random.Random) -> tuple[bytes, bytes]:
    """The table that fp32_fma reads and what each block of it must write, see kernels/fma.cu."""
    signed = (-1, 1)
    x = [[rng.choice(signed) * rng.randrange(1024, 2048) for _ in range(THREADS)] for _ in range(FMA_STEPS)]
    a = [[rng.choice(signed) * rng.randrange(1024, 2048) for _ in range(THREADS)] for _ in range(FMA_STEPS)]
    b = [
        [x[(s + 1) % FMA_STEPS][n] - a[s][n] * x[s][n] for n in range(THREADS)]  # below 2**22 + 2**11
        for s in range(FMA_STEPS)
    ]
    table = [value for rows in (a, b, x) for row in rows for value in row]
    end = [value for chain in range(FMA_CHAINS) for value in x[(chain + 2) % FMA_STEPS]]
    return words(table, "f"), words(end, "f")


def fma_flop(rounds: int, blocks: int) -> int:
    return 2 * FMA_CHAINS * (FMA_STEPS * FMA_UNROLL * rounds + 2) * THREADS * blocks


WARPS, TENSOR_TILES, TENSOR_STEPS = 8, 8, 4
ROWS, COLUMNS = 16, 8
#: Rounds after which an accumulator could pass 2**24 and no longer be exact.
MOST_ROUNDS = 32768

Matrix = list[list[int]]


@dataclass(frozen=True)
class Tensor:
    """One kind of mma.sync: its inner length, numbers in a register, and the largest of three random steps."""

    depth: int
    packed: int
    most: int
    accumulator: str
    pack: Callable[[Sequence[int]], int]


def half(values: Sequence[int]) -> int:
    return int.from_bytes(struct.pack("<2e", *values), "little")


def brain(values: Sequence[int]) -> int:
    """Two bfloat16, which are the upper halves of 32-bit ones; integers below 2**8 lose nothing."""
    low, high = (struct.unpack("<I", struct.pack("<f", value))[0] >> 16 for value in values)
    return int(low | high << 16)


def single(values: Sequence[int]) -> int:
    return int(struct.unpack("<I", struct.pack("<f", values[0]))[0])


def octets(values: Sequence[int]) -> int:
    return int.from_bytes(struct.pack("<4b", *values), "little")


TENSORS = {
    "fp16": Tensor(16, 2, 84, "f", half),
    "bf16": Tensor(16, 2, 84, "f", brain),
    "tf32": Tensor(8, 1, 84, "f", single),
    "int8": Tensor(32, 4, 42, "i", octets),
}


def fragment(kind: Tensor, matrix: Matrix, by_column: bool) -> list[list[int]]:
    """A matrix as registers of 32 lanes, as the PTX manual lays out an operand of mma.m16n8k*.

    The lane's group, lane // 4, counts rows of A (every second register 8 further down) or columns of B; numbers that
    follow each other in a register and from lane to lane of a group run along the inner side, in two halves.
    """
    registers = []
    for register in range(2 if by_column else 4):
        half_way = register if by_column else register // 2
        row = []
        for lane in range(32):
            outer = lane // 4 + (0 if by_column else 8 * (register % 2))
            inner = [lane % 4 * kind.packed + n + half_way * kind.depth // 2 for n in range(kind.packed)]
            row.append(kind.pack([matrix[k][outer] if by_column else matrix[outer][k] for k in inner]))
        registers.append(row)
    return registers


def accumulator(matrix: Matrix) -> list[list[int]]:
    """A 16 by 8 result as 4 registers of 32 lanes."""
    return [
        [matrix[lane // 4 + 8 * (register // 2)][lane % 4 * 2 + register % 2] for lane in range(32)]
        for register in range(4)
    ]


@dataclass(frozen=True)
class Warp:
    """What a warp is given, and what its tiles grow by per round."""

    steps: list[Matrix]
    right: list[Matrix]
    begin: list[Matrix]
    growth: list[Matrix]


def tensor_warp(kind: Tensor, rng: random.Random) -> Warp:
    def matrix(rows: int, columns: int, most: int) -> Matrix:
        return [[rng.randint(-most, most) for _ in range(columns)] for _ in range(rows)]

    steps = [matrix(ROWS, kind.depth, kind.most) for _ in range(TENSOR_STEPS - 1)]
    # One number in each row of the steps' sum is 1 or -1: the accumulators grow slowly.
    total = [[0] * kind.depth for _ in range(ROWS)]
    for row in total:
        row[rng.randrange(kind.depth)] = rng.choice((-1, 1))
    last = [[total[m][k] - sum(step[m][k] for step in steps) for k in range(kind.depth)] for m in range(ROWS)]
    right = [matrix(kind.depth, COLUMNS, 127) for _ in range(TENSOR_TILES)]
    growth = [
        [[sum(total[m][k] * b[k][n] for k in range(kind.depth)) for n in range(COLUMNS)] for m in range(ROWS)]
        for b in right
    ]
    return Warp([*steps, last], right, [matrix(ROWS, COLUMNS, 2**16) for _ in range(TENSOR_TILES)], growth)


def tensor_tables(kind: Tensor, warps: Sequence[Warp]) -> bytes:
    """The table that a tensor kernel reads, see kernels/tensor.cu."""
    parts = []
    for warp in warps:
        operands = [row for step in warp.steps for row in fragment(kind, step, by_column=False)]
        operands += [row for right in warp.right for row in fragment(kind, right, by_column=True)]
        parts.append(words([value for row in operands for value in row], "I"))
        parts.append(tensor_result(kind, [warp], 0))
    return b"".join(parts)


def tensor_result(kind: Tensor, warps: Sequence[Warp], rounds: int) -> bytes:
    """What the accumulators of these warps hold after so many rounds."""
    values = [
        value
        for warp in warps
        for begin, growth in zip(warp.begin, warp.growth, strict=True)
        for old, more in zip(accumulator(begin), accumulator(growth), strict=True)
        for value in (a + rounds * b for a, b in zip(old, more, strict=True))
    ]
    return words(values, kind.accumulator)


def tensor_op(kind: Tensor, rounds: int, blocks: int) -> int:
    return 2 * ROWS * COLUMNS * kind.depth * TENSOR_STEPS * TENSOR_TILES * rounds * WARPS * blocks


def word_of(number: int, seed: int, flip: int) -> int:
    """The word of the memory pattern at a place, as kernels/pattern.cu makes it."""
    x = ((number & 0xFFFFFFFF) * 0x9E3779B1 + (number >> 32) * 0x85EBCA77 + seed) & 0xFFFFFFFF
    x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16 ^ flip


# The card's own limits.

#: 32-bit lanes of a multiprocessor, and 16-bit multiply-adds of its tensor cores per clock without sparsity.
LANES = {(8, 0): 64, (8, 6): 128, (8, 9): 128, (9, 0): 128}
TENSOR_FMA = {(8, 0): 1024, (8, 6): 512, (8, 9): 512, (9, 0): 2048}
TENSOR_RATIO = {"fp16": 1.0, "bf16": 1.0, "tf32": 0.5, "int8": 2.0}
#: GB/s of one lane of the link, each way, with its line code taken off.
LANE_GB = {1: 0.25, 2: 0.5, 3: 8 / 8 * 128 / 130, 4: 16 / 8 * 128 / 130, 5: 32 / 8 * 128 / 130, 6: 64 / 8 * 242 / 256}

Limit = tuple["float | None", str]


def clock(card: Mapping[str, Any], key: str, held: float | None) -> tuple[float | None, str]:
    return (held, "at the clock held") if held else (card[f"{key}_clock_max_mhz"], "at the card's highest clock")


def memory_limit(card: Mapping[str, Any], found: Mapping[str, Any]) -> Limit:
    megahertz, which = clock(card, "memory", found["memory_mhz"])
    bits = card["bus_width_bits"]
    # Data at both edges of the clock that NVML tells.
    return (bits / 8 * 2 * megahertz / 1000 if bits and megahertz else None), f"bus width x memory clock {which}"


def fp32_limit(card: Mapping[str, Any], found: Mapping[str, Any]) -> Limit:
    megahertz, which = clock(card, "sm", found["sm_mhz"])
    lanes, count = LANES.get(capability_of(card)), card["sm_count"]
    value = count * lanes * 2 * megahertz / 1e6 if lanes and count and megahertz else None
    return value, f"multiprocessors x lanes x 2 x clock {which}"


def tensor_limit(name: str, card: Mapping[str, Any], found: Mapping[str, Any]) -> Limit:
    megahertz, which = clock(card, "sm", found["sm_mhz"])
    per_clock, count = TENSOR_FMA.get(capability_of(card)), card["sm_count"]
    value = None
    if per_clock and count and megahertz:
        # GeForce cards add up in 32 bits at half the rate.
        halved = "GeForce" in (card["name"] or "") and name != "int8" and capability_of(card) >= (8, 6)
        value = count * per_clock * TENSOR_RATIO[name] * (0.5 if halved else 1) * 2 * megahertz / 1e6
    what = "multiprocessors x tensor multiply-adds x 2 x clock"
    hopper = ", which only wgmma reaches" if capability_of(card) == (9, 0) else ""
    return value, f"{what} {which}{hopper}"


def link_limit(ways: int, card: Mapping[str, Any], found: Mapping[str, Any]) -> Limit:
    generation, width = found["link_generation"], found["link_width"]
    which = "held"
    if not generation or not width:
        generation, width, which = card["link"]["generation_max"], card["link"]["width_max"], "at most"
    lane = LANE_GB.get(int(generation or 0))
    value = lane * width * ways if lane and width else None
    return value, f"link rate x width {which}{', both ways' if ways == 2 else ''}"


def no_limit(card: Mapping[str, Any], found: Mapping[str, Any]) -> Limit:
    return None, ""


def capability_of(card: Mapping[str, Any]) -> tuple[int, int]:
    major, _, minor = (card["compute_capability"] or "0.0").partition(".")
    return int(major), int(minor)


# Measuring.


@functools.cache
def rank(n: int) -> int:
    """The largest k for which the k-th smallest and the k-th largest of n samples hold the true median between them,
    19 times of 20 at least; 0: so few samples do not.
    """
    k = tail = 0
    # Fewer than k of n fall on one side as often as a fair coin does; there are two sides.
    while 20 * 2 * (tail := tail + math.comb(n, k)) <= 2**n:
        k += 1
    return k


def half_width(samples: Sequence[float]) -> float:
    """Half of the width of the median's 95 % interval, as a share of the median. verify judges by the same interval."""
    ordered, k = sorted(samples), rank(len(samples))
    if not k:
        return math.inf
    width, median = ordered[-k] - ordered[k - 1], statistics.median(ordered)
    return width / 2 / abs(median) if median else math.inf if width else 0.0


@dataclass
class Job:
    """A metric ready to run. `once` gives a sample in the metric's unit and `check` counts wrong words of the last."""

    once: Callable[[], float]
    poison: Callable[[], None]
    check: Callable[[], int]
    #: Each sample is checked, not the first and the last alone.
    every: bool = True
    #: The fewest samples, and the time to use up, where the metric has its own.
    samples: int | None = None
    seconds: float | None = None
    warm: bool = True


@dataclass
class Bench:
    """A run on one card."""

    cuda: Cuda
    device: int
    card: dict[str, Any]
    effort: Effort
    seed: int
    share: float
    telemetry: Telemetry
    deadline: float
    stream: int
    begin: int
    end: int
    functions: dict[str, ctypes.c_void_p]
    notes: list[str] = field(default_factory=list)

    def random(self, name: str) -> random.Random:
        return random.Random(f"{self.seed} {name}")

    def launch(self, name: str, blocks: int, threads: int, *arguments: Any) -> None:
        """Queue a kernel; arguments are ctypes values."""
        pointers = (POINTER * len(arguments))(*[ctypes.addressof(argument) for argument in arguments])
        shape = (blocks, 1, 1, threads, 1, 1, 0)
        self.cuda.call("cuLaunchKernel", self.functions[name], *shape, self.stream, pointers, None)

    def seconds(self, work: Callable[[], None]) -> float:
        """How long the card takes for what `work` queues, by its own events."""
        self.cuda.call("cuEventRecord", self.begin, self.stream)
        work()
        self.cuda.call("cuEventRecord", self.end, self.stream)
        return self.elapsed()

    def elapsed(self) -> float:
        took = FLOAT()
        self.cuda.call("cuEventSynchronize", self.end)
        self.cuda.call("cuEventElapsedTime", ctypes.byref(took), self.begin, self.end)
        if not took.value > 0:
            raise Verdict(f"the card's events are {took.value} ms apart")
        return took.value / 1000

    def calibrated(self, work: Callable[[int], None], most: int) -> int:
        """How often to do it for a sample of the length aimed at."""
        count = 1
        while True:
            took = self.seconds(functools.partial(work, count))
            if took >= self.effort.sample_s / 4 or count >= most:
                return max(1, min(most, int(count * self.effort.sample_s / took)))
            count = min(most, count * 4)

    def poison(self, address: int, size: int) -> None:
        self.cuda.call("cuMemsetD8Async", address, POISON, size, self.stream)

    def upload(self, address: int, tile: bytes, size: int) -> None:
        """Fill device memory with a tile, again and again."""
        chunk = tile * max(1, min(size // len(tile) + 1, 32 * MIB // len(tile)))
        for begin in range(0, size, len(chunk)):
            self.cuda.call("cuMemcpyHtoD_v2", address + begin, chunk, min(len(chunk), size - begin))
        # The last bytes may still be under way, and our stream does not wait for them.
        self.cuda.call("cuCtxSynchronize")

    def wrong(self, address: int, tile: bytes, size: int) -> int:
        """Words of device memory that are not as the repeated tile has them. What made them is done."""
        chunk = len(tile) * max(1, min(size // len(tile) + 1, 32 * MIB // len(tile)))
        buffer = ctypes.create_string_buffer(min(chunk, size))
        count = 0
        for begin in range(0, size, chunk):
            length = min(chunk, size - begin)
            ctypes.memset(buffer, POISON, length)
            self.cuda.call("cuMemcpyDtoH_v2", buffer, address + begin, length)
            count += mismatches(ctypes.addressof(buffer), tile, length)
        return count

    def blocks(self, name: str) -> int:
        """As many blocks as run at once."""
        count = INT()
        self.cuda.call(
            "cuOccupancyMaxActiveBlocksPerMultiprocessor", ctypes.byref(count), self.functions[name], THREADS, 0
        )
        if count.value < 1:
            raise Verdict(f"not one block of {name} fits on a multiprocessor")
        return count.value * int(self.card["sm_count"])

    def buffer_size(self, count: int) -> int:
        """Bytes of each of `count` equal buffers, large against the cache.

        Raises:
            Unmeasured: there is not enough free memory.
        """
        least = 4 * self.cuda.attribute(L2_BYTES, self.device)
        free = self.cuda.free_memory()
        size = min(self.effort.buffer, free // (count + 1)) // 4096 * 4096
        if size < max(least, 4096):
            need = least * (count + 1) / MIB
            raise Unmeasured(f"{free / MIB:.0f} MiB of the card are free, {need:.0f} MiB are needed")
        return size

    def transfer_size(self, free_parts: int) -> int:
        """Bytes of a transfer; the host keeps most of its memory."""
        size = min(self.effort.transfer, available_memory() // 16, self.cuda.free_memory() // free_parts)
        if size < MIB:
            raise Unmeasured(f"there is memory for transfers of {size / 1024:.0f} KiB only, 1 MiB is needed")
        return size // 4096 * 4096

    def look(self) -> None:
        """Go on only while nobody else has come.

        Raises:
            Inconclusive: somebody came to the card.
        """
        if self.telemetry.intruders:
            raise Inconclusive(f"GPU in use by {', '.join(self.telemetry.intruders)}, who came during the run")

    def measure(self, name: str, metric: Metric) -> dict[str, Any]:
        """One entry of `metrics`.

        Raises:
            Unmeasured: it can't be had here.
            CudaError, Verdict: the run is over.
        """
        if time.monotonic() > self.deadline:
            raise Unmeasured("the time was up")
        samples: list[float] = []
        with metric.job(self) as job:
            job.poison()
            job.once()
            wrong = job.check()
            warm = time.monotonic() + (self.effort.warm_s if job.warm else 0)
            while time.monotonic() < warm:
                job.once()
            least = self.effort.samples if job.samples is None else job.samples
            least_s, most_s = (self.effort.least_s, self.effort.metric_s) if job.seconds is None else (job.seconds,) * 2
            begin = end = time.monotonic()

            def enough(count: int) -> bool:
                now = time.monotonic()
                if now > self.deadline or count >= MOST_SAMPLES:
                    return True
                if count < least or now - begin < least_s:
                    return False
                return now - begin >= most_s or half_width(samples) <= metric.noise

            checked = False
            # The last sample is a checked one. Where it is the one that widens the interval again, it was not the last.
            while not (checked and enough(len(samples))):
                checked = job.every or enough(len(samples) + 1)
                if checked:
                    job.poison()
                samples.append(job.once())
                end = time.monotonic()
                if checked:
                    wrong += job.check()
                self.look()
        if len(samples) < least:
            self.notes.append(f"{name}: {len(samples)} samples instead of {least}: the time was up")
        elif metric.noise and half_width(samples) > metric.noise:
            self.notes.append(
                f"{name}: {len(samples)} samples in {end - begin:.1f} s leave an interval wider than "
                f"{metric.noise * 100:g} % to either side"
            )
        keys = ("sm_mhz", "memory_mhz", "link_generation", "link_width")
        held = {key: self.telemetry.median(key, begin, end) for key in keys}
        limit, limit_of = metric.limit(self.card, held)
        return {
            "unit": metric.unit,
            "better": metric.better,
            "samples": [float(f"{sample:.7g}") for sample in samples],
            "checked": True,
            "wrong": wrong,
            "sm_mhz": held["sm_mhz"],
            "memory_mhz": held["memory_mhz"],
            "limit": None if limit is None else float(f"{limit:.6g}"),
            "limit_of": limit_of if limit is not None else "",
        }


def available_memory() -> int:
    """Bytes that the host can give without swapping."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 1024 * MIB


#: Bytes that a block of the memory kernels takes: 256 threads, 4 vectors of 16 bytes each.
BLOCK_BYTES = THREADS * 4 * 16


@contextmanager
def memory_copy(bench: Bench) -> Iterator[Job]:
    size = bench.buffer_size(2)
    tile = bench.random("memory.copy").randbytes(PERIOD * 4)
    with bench.cuda.memory(size) as source, bench.cuda.memory(size) as target:
        bench.upload(source, tile, size)
        arguments = (U64(target), U64(source), U64(size // 16))

        def work(count: int) -> None:
            for _ in range(count):
                bench.launch("memory_copy", -(-size // BLOCK_BYTES), THREADS, *arguments)

        yield bandwidth(bench, work, 2 * size, target, tile, size)


@contextmanager
def memory_triad(bench: Bench) -> Iterator[Job]:
    size = bench.buffer_size(3)
    left_tile, right_tile, tile = triad_tiles(bench.random("memory.triad"))
    with ExitStack() as held:
        left, right, target = (held.enter_context(bench.cuda.memory(size)) for _ in range(3))
        bench.upload(left, left_tile, size)
        bench.upload(right, right_tile, size)
        arguments = (U64(target), U64(left), U64(right), FLOAT(TRIAD_FACTOR), U64(size // 16))

        def work(count: int) -> None:
            for _ in range(count):
                bench.launch("memory_triad", -(-size // BLOCK_BYTES), THREADS, *arguments)

        yield bandwidth(bench, work, 3 * size, target, tile, size)


def bandwidth(bench: Bench, work: Callable[[int], None], moved: int, target: int, tile: bytes, size: int) -> Job:
    """GB/s of a kernel that moves `moved` bytes and fills `target` with the tile."""
    count = bench.calibrated(work, 256)
    return Job(
        once=lambda: count * moved / bench.seconds(lambda: work(count)) / 1e9,
        poison=lambda: bench.poison(target, size),
        check=lambda: bench.wrong(target, tile, size),
        every=False,
    )


@contextmanager
def pageable(size: int) -> Iterator[int]:
    """Ordinary memory of the host, all of it really there; gives its address."""
    memory = mmap.mmap(-1, size)
    view = (ctypes.c_char * size).from_buffer(memory)
    try:
        ctypes.memset(view, POISON, size)
        yield ctypes.addressof(view)
    finally:
        del view
        memory.close()


def fill(address: int, tile: bytes, size: int) -> None:
    for begin in range(0, size, len(tile)):
        ctypes.memmove(address + begin, tile, min(len(tile), size - begin))


@contextmanager
def to_device(pinned: bool, bench: Bench) -> Iterator[Job]:
    size = bench.transfer_size(2)
    tile = bench.random(f"h2d {pinned}").randbytes(PERIOD * 4)
    with bench.cuda.pinned(size) if pinned else pageable(size) as source, bench.cuda.memory(size) as target:
        fill(source, tile, size)
        copy = functools.partial(bench.cuda.call, "cuMemcpyHtoDAsync_v2", target, source, size, bench.stream)
        yield Job(
            once=lambda: size / bench.seconds(copy) / 1e9,
            poison=lambda: bench.poison(target, size),
            check=lambda: bench.wrong(target, tile, size),
            every=False,
        )


@contextmanager
def to_host(pinned: bool, bench: Bench) -> Iterator[Job]:
    size = bench.transfer_size(2)
    tile = bench.random(f"d2h {pinned}").randbytes(PERIOD * 4)
    with bench.cuda.pinned(size) if pinned else pageable(size) as target, bench.cuda.memory(size) as source:
        bench.upload(source, tile, size)
        copy = functools.partial(bench.cuda.call, "cuMemcpyDtoHAsync_v2", target, source, size, bench.stream)
        yield Job(
            once=lambda: size / bench.seconds(copy) / 1e9,
            poison=lambda: void(ctypes.memset(target, POISON, size)),
            check=lambda: mismatches(target, tile, size),
            every=False,
        )


def void(_: object) -> None:
    """A result that nobody wants."""


@contextmanager
def both_ways(bench: Bench) -> Iterator[Job]:
    cuda, size = bench.cuda, bench.transfer_size(3)
    rng = bench.random("bidirectional")
    up, down = rng.randbytes(PERIOD * 4), rng.randbytes(PERIOD * 4)
    if cuda.attribute(COPY_ENGINES, bench.device) < 2:
        bench.notes.append("bidirectional.pinned: the card has one copy engine, so the two directions take turns")
    with ExitStack() as held:
        source, sink = (held.enter_context(cuda.pinned(size)) for _ in range(2))
        target, origin = (held.enter_context(cuda.memory(size)) for _ in range(2))
        other, done = held.enter_context(cuda.stream()), held.enter_context(cuda.event())
        fill(source, up, size)
        bench.upload(origin, down, size)

        def work() -> None:
            cuda.call("cuStreamWaitEvent", other, bench.begin, 0)
            cuda.call("cuMemcpyHtoDAsync_v2", target, source, size, bench.stream)
            cuda.call("cuMemcpyDtoHAsync_v2", sink, origin, size, other)
            cuda.call("cuEventRecord", done, other)
            cuda.call("cuStreamWaitEvent", bench.stream, done, 0)

        def poison() -> None:
            bench.poison(target, size)
            ctypes.memset(sink, POISON, size)

        yield Job(
            once=lambda: 2 * size / bench.seconds(work) / 1e9,
            poison=poison,
            check=lambda: bench.wrong(target, up, size) + mismatches(sink, down, size),
            every=False,
        )


@contextmanager
def fp32_fma(bench: Bench) -> Iterator[Job]:
    table, expected = fma_tables(bench.random("fp32.fma"))
    blocks = bench.blocks("fp32_fma")
    size = len(expected) * blocks
    with bench.cuda.memory(len(table)) as given, bench.cuda.memory(size) as out:
        bench.upload(given, table, len(table))

        def work(rounds: int) -> None:
            bench.launch("fp32_fma", blocks, THREADS, U64(out), U64(given), UINT(rounds))

        rounds = bench.calibrated(work, 2**20)
        yield Job(
            once=lambda: fma_flop(rounds, blocks) / bench.seconds(lambda: work(rounds)) / 1e12,
            poison=lambda: bench.poison(out, size),
            check=lambda: bench.wrong(out, expected, size),
        )


@contextmanager
def tensor(name: str, bench: Bench) -> Iterator[Job]:
    kind, rng = TENSORS[name], bench.random(f"tensor.{name}")
    warps = [tensor_warp(kind, rng) for _ in range(WARPS)]
    table = tensor_tables(kind, warps)
    blocks = bench.blocks(f"tensor_{name}")
    size = len(tensor_result(kind, warps, 0)) * blocks
    with bench.cuda.memory(len(table)) as given, bench.cuda.memory(size) as out:
        bench.upload(given, table, len(table))

        def work(rounds: int) -> None:
            bench.launch(f"tensor_{name}", blocks, THREADS, U64(out), U64(given), UINT(rounds))

        rounds = bench.calibrated(work, MOST_ROUNDS)
        expected = tensor_result(kind, warps, rounds)
        yield Job(
            once=lambda: tensor_op(kind, rounds, blocks) / bench.seconds(lambda: work(rounds)) / 1e12,
            poison=lambda: bench.poison(out, size),
            check=lambda: bench.wrong(out, expected, size),
        )


LAUNCHES = 100
#: Nanoseconds for which the card is kept busy while launches are queued, at first and at most.
SPIN_NS, MOST_SPIN_NS = 2_000_000, 500_000_000


@contextmanager
def launch_latency(bench: Bench) -> Iterator[Job]:
    cuda, spin = bench.cuda, SPIN_NS
    with cuda.memory(4) as counter:

        def once() -> float:
            nonlocal spin
            while True:
                cuda.call("cuMemsetD8Async", counter, 0, 4, bench.stream)
                bench.launch("launch_spin", 1, 1, U64(spin))
                cuda.call("cuEventRecord", bench.begin, bench.stream)
                for _ in range(LAUNCHES):
                    bench.launch("launch_tick", 1, 1, U64(counter))
                cuda.call("cuEventRecord", bench.end, bench.stream)
                # Was the card still spinning when the last one was queued?
                state = cuda.answer("cuEventQuery", bench.begin)
                if state not in (0, NOT_READY):
                    raise cuda.error("cuEventQuery", state)
                took = bench.elapsed()
                if state == NOT_READY:
                    return took * 1e6 / LAUNCHES
                spin *= 2
                if spin > MOST_SPIN_NS:
                    raise Unmeasured(f"{LAUNCHES} launches could not be queued within {MOST_SPIN_NS / 1e6:.0f} ms")

        def waited() -> float:
            begin = time.perf_counter()
            bench.launch("launch_tick", 1, 1, U64(counter))
            cuda.call("cuStreamSynchronize", bench.stream)
            return (time.perf_counter() - begin) * 1e6

        round_trip = statistics.median(waited() for _ in range(LAUNCHES))
        bench.notes.append(f"launch.latency: one launch, waited for, takes {round_trip:.1f} us by this process' clock")
        yield Job(
            once=once,
            # Each sample counts from 0.
            poison=lambda: None,
            check=lambda: bench.wrong(counter, words([LAUNCHES], "I"), 4),
        )


#: Bytes of one allocation of the memory test, and those of the card's free ones that it leaves alone in any case.
PATTERN_BLOCK, PATTERN_REST = 1024 * MIB, 256 * MIB
TOLD = 64
RECORD = struct.Struct("<QII")
FOUND = struct.Struct("<QQ")


@contextmanager
def memory_pattern(bench: Bench) -> Iterator[Job]:
    cuda = bench.cuda
    free = cuda.free_memory()
    # A sixteenth, where the whole card is no larger than what is left alone.
    size = min(int(free * bench.share), free - min(PATTERN_REST, free // 16))
    with ExitStack() as held:
        report = held.enter_context(cuda.memory(FOUND.size + TOLD * RECORD.size))
        blocks = allocate(bench, size, held)
        test = Pattern(bench, report, blocks)
        test.prove()
        tested = sum(length for _, length in blocks)
        bench.notes.append(f"memory.pattern: {tested / MIB:.0f} MiB tested of {free / MIB:.0f} MiB that were free")
        passes = bench.effort.passes
        yield Job(test.once, lambda: None, test.check, samples=passes, seconds=bench.effort.pattern_s, warm=False)


def allocate(bench: Bench, size: int, held: ExitStack) -> list[tuple[int, int]]:
    """Address and bytes of allocations that make up `size`, or nearly: memory may be in pieces."""
    blocks: list[tuple[int, int]] = []
    length = PATTERN_BLOCK
    while size >= MIB and length >= MIB:
        length = min(length, size // MIB * MIB)
        try:
            blocks.append((held.enter_context(bench.cuda.memory(length)), length))
            size -= length
        except CudaError as error:
            if error.code != OUT_OF_MEMORY:
                raise
            length //= 2
    if not blocks:
        raise Unmeasured("not 1 MiB of the card could be had")
    return blocks


class Pattern:
    """The memory test: each pass writes all blocks with numbers of their own, then reads all."""

    def __init__(self, bench: Bench, report: int, blocks: Sequence[tuple[int, int]]) -> None:
        self.bench, self.report, self.blocks = bench, report, blocks
        self.rng = bench.random("memory.pattern")
        self.passes, self.told, self.words = 0, 0, 0
        self.seed = 0

    def once(self) -> float:
        """Words that were not as written."""
        # Every second pass has the inverse of the one before: each bit is tried both ways.
        flip = 0xFFFFFFFF if self.passes % 2 else 0
        if not flip:
            self.seed = self.rng.getrandbits(32)
        self.passes += 1
        self.write(self.seed, flip)
        found, bits, told = self.read(self.seed, flip)
        if found:
            self.tell(found, bits, told)
        self.words += found + (self.sampled(self.seed, flip) if self.passes == 1 else 0)
        return float(found)

    def check(self) -> int:
        words, self.words = self.words, 0
        return words

    def tell(self, words: int, bits: int, told: Sequence[tuple[int, int, int]]) -> None:
        room = max(0, 8 - self.told)
        self.told += len(told[:room])
        self.bench.notes.append(f"memory.pattern: {words} wrong words, {bits} wrong bits in pass {self.passes}")
        self.bench.notes += [
            f"memory.pattern: byte {number * 4:#x} of the tested memory: expected {expected:#010x}, found {found:#010x}"
            for number, expected, found in told[:room]
        ]

    def write(self, seed: int, flip: int) -> None:
        self._launch("pattern_write", seed, flip)

    def read(self, seed: int, flip: int) -> tuple[int, int, list[tuple[int, int, int]]]:
        """Wrong words, wrong bits, and the first of the words: number, expected, found."""
        cuda, size = self.bench.cuda, FOUND.size + TOLD * RECORD.size
        cuda.call("cuMemsetD8Async", self.report, 0, size, self.bench.stream)
        self._launch("pattern_check", seed, flip, U64(self.report))
        cuda.call("cuStreamSynchronize", self.bench.stream)
        buffer = ctypes.create_string_buffer(size)
        cuda.call("cuMemcpyDtoH_v2", buffer, self.report, size)
        words, bits = FOUND.unpack_from(buffer)
        told = [RECORD.unpack_from(buffer, FOUND.size + n * RECORD.size) for n in range(min(words, TOLD))]
        return words, bits, told

    def _launch(self, name: str, seed: int, flip: int, *more: Any) -> None:
        base = 0
        for address, length in self.blocks:
            arguments = (U64(address), U64(length // 16), U64(base), UINT(seed), UINT(flip), *more)
            self.bench.launch(name, -(-length // BLOCK_BYTES), THREADS, *arguments)
            base += length // 4

    def sampled(self, seed: int, flip: int) -> int:
        """Words at the ends of each block that are not what this program computes."""
        wrong, base, cuda = 0, 0, self.bench.cuda
        buffer = ctypes.create_string_buffer(4096)
        for address, length in self.blocks:
            for offset in (0, length - 4096):
                cuda.call("cuMemcpyDtoH_v2", buffer, address + offset, 4096)
                expected = words([word_of(base + offset // 4 + n, seed, flip) for n in range(1024)], "I")
                wrong += mismatches(ctypes.addressof(buffer), expected, 4096)
            base += length // 4
        return wrong

    def prove(self) -> None:
        """A bit that is flipped on purpose must be found, and no other.

        Raises:
            Verdict: it was not; then a test without findings would mean nothing.
        """
        cuda, seed = self.bench.cuda, self.rng.getrandbits(32)
        block = self.rng.randrange(len(self.blocks))
        address, length = self.blocks[block]
        place, bit = self.rng.randrange(length // 4), self.rng.randrange(32)
        number = sum(length for _, length in self.blocks[:block]) // 4 + place
        self.write(seed, 0)
        cuda.call("cuStreamSynchronize", self.bench.stream)
        flipped = word_of(number, seed, 0) ^ 1 << bit
        self.bench.upload(address + place * 4, words([flipped], "I"), 4)
        found, bits, told = self.read(seed, 0)
        if (number, flipped ^ 1 << bit, flipped) not in told or found != 1 or bits != 1:
            # With more than one, the memory is bad already before the test.
            if found <= 1:
                raise Verdict("memory.pattern: a bit that was flipped on purpose was not found")
            self.words += found - 1
            self.tell(found, bits, told)


@dataclass(frozen=True)
class Metric:
    unit: str
    better: str
    job: Callable[[Bench], AbstractContextManager[Job]]
    limit: Callable[[Mapping[str, Any], Mapping[str, Any]], Limit]
    #: How far to either side, as a share, its median's interval may reach; the same as in references.py. 0: it is
    #: counted, not estimated.
    noise: float


def gigabytes(job: Callable[[Bench], AbstractContextManager[Job]], noise: float, ways: int = 1) -> Metric:
    return Metric("GB/s", "higher", job, functools.partial(link_limit, ways), noise)


METRICS = {
    "memory.copy": Metric("GB/s", "higher", memory_copy, memory_limit, 0.01),
    "memory.triad": Metric("GB/s", "higher", memory_triad, memory_limit, 0.01),
    "h2d.pinned": gigabytes(functools.partial(to_device, True), 0.02),
    "d2h.pinned": gigabytes(functools.partial(to_host, True), 0.02),
    "h2d.pageable": gigabytes(functools.partial(to_device, False), 0.05),
    "d2h.pageable": gigabytes(functools.partial(to_host, False), 0.05),
    "bidirectional.pinned": gigabytes(both_ways, 0.03, 2),
    "fp32.fma": Metric("TFLOP/s", "higher", fp32_fma, fp32_limit, 0.02),
    **{
        f"tensor.{name}": Metric(
            "TOP/s" if name == "int8" else "TFLOP/s",
            "higher",
            functools.partial(tensor, name),
            functools.partial(tensor_limit, name),
            0.02,
        )
        for name in TENSORS
    },
    "launch.latency": Metric("us", "lower", launch_latency, no_limit, 0.05),
    "memory.pattern": Metric("errors", "lower", memory_pattern, no_limit, 0.0),
}


# A run.


def kernels() -> Mapping[str, str]:
    """PTX of all modules, by name."""
    if PTX is not None:
        return PTX
    return {path.stem: path.read_text() for path in sorted(Path(__file__).with_name("kernels").glob("*.ptx"))}


CARD = (
    *("name", "pci_id", "uuid", "compute_capability", "sm_count", "memory_mib"),
    *("bus_width_bits", "memory_clock_max_mhz", "sm_clock_max_mhz"),
)
LINK = ("generation", "width", "generation_max", "width_max")


def card_of(nvml: Nvml) -> dict[str, Any]:
    """The card as NVML has it; what it does not tell is None."""
    ask, pci, capability = nvml.number, nvml.pci(), nvml.capability()
    return {
        "name": nvml.text("Name"),
        "pci_id": f"{pci.id & 0xFFFF:04x}:{pci.id >> 16:04x}",
        "uuid": nvml.text("UUID"),
        "compute_capability": f"{capability[0]}.{capability[1]}" if capability else None,
        "sm_count": None,
        "memory_mib": nvml.memory_mib(),
        "bus_width_bits": ask("MemoryBusWidth"),
        "memory_clock_max_mhz": ask("MaxClockInfo", MEM),
        "sm_clock_max_mhz": ask("MaxClockInfo", SM),
        "link": {
            "generation": ask("CurrPcieLinkGeneration"),
            "width": ask("CurrPcieLinkWidth"),
            "generation_max": ask("MaxPcieLinkGeneration"),
            "width_max": ask("MaxPcieLinkWidth"),
        },
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(arguments: argparse.Namespace, cuda: Cuda, result: dict[str, Any]) -> None:
    """Fill in the result.

    Raises:
        CudaError, Verdict: the run is over; what was measured until then is in the result.
    """
    effort, began = QUICK if arguments.quick else FULL, time.monotonic()
    with ExitStack() as held:
        nvml = Nvml(arguments.device)
        held.callback(nvml.close)
        if nvml.text("Serial") == "simulated":
            raise NotRun("no CUDA driver: this card is simulated")
        card = result["card"] = card_of(nvml)
        result["driver"], result["cuda_driver"] = nvml.driver(), nvml.cuda()
        leave_alone(nvml)
        present = nvml.processes()
        telemetry = Telemetry(nvml, began)
        result["telemetry"] = telemetry.rows
        held.callback(telemetry.close)
        say(f"{card['name']}, driver {result['driver']}, seed {result['seed']}")
        cuda.start()
        pci = nvml.pci()
        device = held.enter_context(cuda.context(f"{pci.domain:04x}:{pci.bus:02x}:{pci.device:02x}.0"))
        result["notes"] += nvml.recognize(present)
        telemetry.start()
        card["sm_count"] = cuda.attribute(MULTIPROCESSORS, device)
        card["bus_width_bits"] = card["bus_width_bits"] or cuda.attribute(BUS_BITS, device)
        result["notes"] += whole_card(nvml, card)
        bench = Bench(
            cuda,
            device,
            card,
            effort,
            result["seed"],
            arguments.memory_share,
            telemetry,
            began + effort.total_s,
            held.enter_context(cuda.stream()),
            held.enter_context(cuda.event()),
            held.enter_context(cuda.event()),
            {},
            result["notes"],
        )
        for text in kernels().values():
            module = held.enter_context(cuda.module(text))
            names = re.findall(r"^\.visible \.entry (\w+)\(", text, re.MULTILINE)
            bench.functions.update((name, cuda.function(module, name)) for name in names)
        try:
            measure_all(bench, arguments.metric or list(METRICS), result)
        finally:
            # The card's clocks fall within seconds: what is read from here on is not of the run.
            telemetry.close()
            if nvml.missing:
                result["notes"].append(f"not known to this driver's NVML: {', '.join(sorted(nvml.missing))}")


def whole_card(nvml: Nvml, card: Mapping[str, Any]) -> list[str]:
    """Under MPS a process may see a part of the multiprocessors only: then a note says so."""
    cores, lanes = nvml.number("NumGpuCores"), LANES.get(capability_of(card))
    if not cores or not lanes or cores // lanes == card["sm_count"]:
        return []
    return [f"MPS leaves {card['sm_count']} of {cores // lanes} multiprocessors to this process"]


def measure_all(bench: Bench, names: Sequence[str], result: dict[str, Any]) -> None:
    wrong = []
    for name in names:
        try:
            bench.look()
            found = result["metrics"][name] = bench.measure(name, METRICS[name])
        except Unmeasured as error:
            result["not_run"][name] = str(error)
        except CudaError as error:
            if error.code != OUT_OF_MEMORY:
                error.args = (f"{name}: {error}",)
                raise
            result["not_run"][name] = str(error)
        else:
            median = statistics.median(found["samples"])
            checked = f"{found['wrong']} words wrong" if found["wrong"] else "checked"
            say(f"{name}: {median:.6g} {found['unit']} (median of {len(found['samples'])}, {checked})")
            if found["wrong"]:
                wrong.append(f"{name}: {found['wrong']} words wrong")
            continue
        say(f"{name}: not run: {result['not_run'][name]}")
    if wrong:
        raise Verdict("; ".join(wrong))
    if not result["metrics"]:
        raise NotRun("; ".join(f"{name}: {reason}" for name, reason in result["not_run"].items()))


def become(name: str) -> None:
    """Run as this user from here on. MPS serves one user, whoever starts us.

    Raises:
        Verdict: there is no such user, or we may not.
    """
    try:
        user = pwd.getpwnam(name)
        if os.geteuid() == user.pw_uid:
            return
        os.setgroups([])
        os.setgid(user.pw_gid)
        os.setuid(user.pw_uid)
    except (KeyError, PermissionError) as error:
        raise Verdict(f"can't run as {name}: {error}") from error


def environment(arguments: argparse.Namespace) -> None:
    """What CUDA reads when it starts: all threads under MPS and no limit, unless others were asked for, nothing left in
    the user's cache, and every kernel loaded before the first is timed.
    """
    os.environ["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = f"{arguments.threads:g}"
    os.environ.pop("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT", None)
    if arguments.memory_limit is not None:
        os.environ["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] = f"{arguments.device}={arguments.memory_limit}M"
    os.environ["CUDA_CACHE_DISABLE"] = "1"
    os.environ["CUDA_MODULE_LOADING"] = "EAGER"
    if arguments.mps_pipe:
        os.environ["CUDA_MPS_PIPE_DIRECTORY"] = arguments.mps_pipe


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def stopped(number: int, _: object) -> NoReturn:
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise Inconclusive(f"stopped by {signal.Signals(number).name}")


def blank(arguments: argparse.Namespace) -> dict[str, Any]:
    """A result before anything was done."""
    return {
        "schema": 1,
        "tool": "gpubench",
        "began": time.time(),
        "duration_s": 0.0,
        "quick": arguments.quick,
        "seed": int.from_bytes(os.urandom(4), "little") if arguments.seed is None else arguments.seed,
        "card": dict.fromkeys(CARD) | {"link": dict.fromkeys(LINK)},
        "driver": None,
        "cuda_driver": None,
        "verdict": "measured",
        "reason": "",
        "metrics": {},
        "not_run": {},
        "telemetry": [],
        "notes": [],
    }


#: Seconds after the end of its time that a run may still take; then the card has stopped answering.
GRACE_S = 30.0


def overdue(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    """End the process although a call of the driver does not return: no signal would reach it there."""
    names = [name for name in arguments.metric or METRICS if name not in result["metrics"] | result["not_run"]]
    result["verdict"] = "failed"
    result["reason"] = f"the card does not answer: {names[0] if names else 'the end of the run'} takes for ever"
    print(json.dumps(finished(arguments, result)), flush=True)
    say(f"failed: {result['reason']}")
    os._exit(EXIT["failed"])


def bench(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole result; it is there whatever happens."""
    began, result = time.monotonic(), blank(arguments)
    limit_s = (QUICK if arguments.quick else FULL).total_s + GRACE_S
    watch = threading.Timer(limit_s, overdue, (arguments, result))
    watch.daemon = True
    watch.start()
    for number in SIGNALS:
        signal.signal(number, stopped)
    try:
        if arguments.user:
            become(arguments.user)
        environment(arguments)
        cuda = Cuda()
        try:
            run(arguments, cuda, result)
        finally:
            result["notes"] += [f"not freed: {reason}" for reason in cuda.unfreed]
        if cuda.unfreed:
            raise Verdict(f"not freed: {'; '.join(cuda.unfreed)}")
    except Verdict as error:
        result["verdict"], result["reason"] = error.verdict, str(error)
    except CudaError as error:
        result["verdict"], result["reason"] = "failed", str(error)
    watch.cancel()
    result["duration_s"] = round(time.monotonic() - began, 3)
    return finished(arguments, result)


def finished(arguments: argparse.Namespace, result: dict[str, Any]) -> dict[str, Any]:
    """Every metric that was asked for is in the result, measured or with the reason why not."""
    for name in arguments.metric or METRICS:
        if name not in result["metrics"]:
            result["not_run"].setdefault(name, result["reason"])
    return result


# Load: this process is one of several clients of MPS. mpsbench.py starts them and tells them what to do.

#: Seconds for the card to answer once nobody tells us what to do any more.
ENDED_S = 5.0


class Commands(threading.Thread):
    """What stdin says, a JSON object a line; `None` once it has ended, and so must this process."""

    def __init__(self) -> None:
        super().__init__(name="commands", daemon=True)
        self.found: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()

    def run(self) -> None:
        for line in sys.stdin:
            self.found.put(json.loads(line))
        self.found.put(None)
        time.sleep(ENDED_S)
        # A call of the driver that does not return would keep this client on the card.
        os._exit(EXIT["failed"])

    def next(self, wait: bool) -> dict[str, Any] | None:
        """The next command; an empty one, unless we wait, where none has come."""
        try:
            return self.found.get(wait)
        except queue.Empty:
            return {}


def answer(**found: Any) -> None:
    print(json.dumps(found), flush=True)


class Load:
    """The fma kernel without a gap: while one launch runs, a slice, the next one waits and the last one is checked."""

    def __init__(self, bench: Bench, held: ExitStack, blocks: int, rounds: int | None) -> None:
        self.bench, self.blocks, cuda = bench, blocks, bench.cuda
        table, self.expected = fma_tables(bench.random("load"))
        self.size = len(self.expected) * blocks
        self.given = held.enter_context(cuda.memory(len(table)))
        self.outs = [held.enter_context(cuda.memory(self.size)) for _ in range(2)]
        self.events = [held.enter_context(cuda.event()) for _ in range(3)]
        bench.upload(self.given, table, len(table))
        self.rounds = rounds or bench.calibrated(functools.partial(self._launch, self.outs[0]), 2**20)
        self.queued = self.done = self.wrong = 0
        cuda.call("cuEventRecord", self.events[-1], bench.stream)
        self._queue()

    def _launch(self, out: int, rounds: int) -> None:
        self.bench.launch("fp32_fma", self.blocks, THREADS, U64(out), U64(self.given), UINT(rounds))

    def _queue(self) -> None:
        out = self.outs[self.queued % 2]
        self.bench.poison(out, self.size)
        self._launch(out, self.rounds)
        self.bench.cuda.call("cuEventRecord", self.events[self.queued % 3], self.bench.stream)
        self.queued += 1

    def slice(self) -> float:
        """Queue another slice and wait for the oldest; its seconds, from the end of the one before to its own."""
        self._queue()
        return self._wait()

    def _wait(self) -> float:
        begin, end = (self.events[number % 3] for number in (self.done - 1, self.done))
        took = FLOAT()
        self.bench.cuda.call("cuEventSynchronize", end)
        self.bench.cuda.call("cuEventElapsedTime", ctypes.byref(took), begin, end)
        if not took.value > 0:
            raise Verdict(f"the card's events are {took.value} ms apart")
        self.wrong += self.bench.wrong(self.outs[self.done % 2], self.expected, self.size)
        self.done += 1
        return took.value / 1000

    def stop(self) -> None:
        while self.done < self.queued:
            self._wait()

    def reported(self) -> int:
        """Words of the results that were wrong since the last question."""
        wrong, self.wrong = self.wrong, 0
        return wrong


@dataclass
class Client:
    """Does what it is told, and answers each command with a line."""

    bench: Bench
    nvml: Nvml
    held: ExitStack = field(default_factory=ExitStack)
    load: Load | None = None
    #: What was counted since `count`, and from which slice on: those that were queued before are not all of this time.
    counted: dict[str, float] | None = None
    first: int = 0
    halting: bool = False

    def serve(self, commands: Commands) -> None:
        with self.held:
            while (command := commands.next(wait=self.load is None)) is not None:
                if command:
                    self.obey(command)
                if self.load is not None:
                    self.work(self.load)
            if self.load is not None:
                self.load.stop()

    def obey(self, command: dict[str, Any]) -> None:
        match command:
            case {"do": "start", "blocks": blocks, "rounds": rounds} if self.load is None:
                self.load = Load(self.bench, self.held, blocks or self.bench.blocks("fp32_fma"), rounds)
                self.load.slice()
                answer(rounds=self.load.rounds)
            case {"do": "count"} if self.load is not None:
                self.counted, self.first = {"operations": 0, "seconds": 0.0, "slices": 0}, self.load.queued
                answer()
            case {"do": "halt"} if self.counted is not None:
                # At the next slice that counts, the first of all if there was none.
                self.halting = True
            case {"do": "stop"} if self.load is not None:
                self.load.stop()
                self.held.close()
                answer(wrong=self.load.reported(), others=self.nvml.others(os.getppid()))
                self.load = self.counted = None
            case {"do": "allocate", "mib": mib}:
                answer(let_in=self.let_in(mib * MIB))
            case _:
                raise Verdict(f"no command for now: {command}")

    def work(self, load: Load) -> None:
        seconds = load.slice()
        if self.counted is None or load.done <= self.first:
            return
        self.counted["operations"] += fma_flop(load.rounds, load.blocks)
        self.counted["seconds"] += seconds
        self.counted["slices"] += 1
        if self.halting:
            answer(**self.counted, sm_mhz=self.nvml.number("ClockInfo", SM), wrong=load.reported())
            self.counted, self.halting = None, False

    def let_in(self, size: int) -> bool:
        """Is there so much device memory for us? It is written to, all of it."""
        try:
            with self.bench.cuda.memory(size) as address:
                self.bench.poison(address, size)
                self.bench.cuda.call("cuStreamSynchronize", self.bench.stream)
        except CudaError as error:
            if error.code != OUT_OF_MEMORY:
                raise
            return False
        return True


def loaded(arguments: argparse.Namespace) -> int:
    """Be a client until stdin ends. Whoever started us has looked whether the card is free. The exit status."""
    for number in SIGNALS:
        signal.signal(number, stopped)
    commands, cuda = Commands(), None
    commands.start()
    try:
        if arguments.user:
            become(arguments.user)
        environment(arguments)
        cuda = Cuda()
        with ExitStack() as held:
            serve(arguments, cuda, commands, held)
        if cuda.unfreed:
            raise Verdict(f"not freed: {'; '.join(cuda.unfreed)}")
    except (Verdict, CudaError) as error:
        verdict = error.verdict if isinstance(error, Verdict) else "failed"
        answer(error=str(error), verdict=verdict)
        return EXIT[verdict]
    return 0


def serve(arguments: argparse.Namespace, cuda: Cuda, commands: Commands, held: ExitStack) -> None:
    """Make a context, say what it sees of the card, and obey.

    Raises:
        CudaError, Verdict: as the driver or the card has it.
    """
    nvml = Nvml(arguments.device)
    held.callback(nvml.close)
    if nvml.text("Serial") == "simulated":
        raise NotRun("no CUDA driver: this card is simulated")
    cuda.start()
    pci = nvml.pci()
    device = held.enter_context(cuda.context(f"{pci.domain:04x}:{pci.bus:02x}:{pci.device:02x}.0"))
    card = {**card_of(nvml), "sm_count": cuda.attribute(MULTIPROCESSORS, device)}
    module = held.enter_context(cuda.module(kernels()["fma"]))
    bench = Bench(
        cuda=cuda,
        device=device,
        card=card,
        effort=replace(QUICK, sample_s=arguments.load),
        seed=int.from_bytes(os.urandom(4), "little") if arguments.seed is None else arguments.seed,
        share=arguments.memory_share,
        telemetry=Telemetry(nvml, time.monotonic()),
        deadline=math.inf,
        stream=held.enter_context(cuda.stream()),
        begin=held.enter_context(cuda.event()),
        end=held.enter_context(cuda.event()),
        functions={"fp32_fma": cuda.function(module, "fp32_fma")},
    )
    mps: bool | None = None
    try:
        mps = bool(cuda.attribute(MPS_ENABLED, device))
    except CudaError as error:
        # A driver that is older than the question.
        if error.code != INVALID_VALUE:
            raise
    answer(multiprocessors=card["sm_count"], mps=mps, others=nvml.others(os.getppid()))
    Client(bench, nvml).serve(commands)


# Draining: our services leave the card for the run, and come back whatever becomes of it.

UNIT = "gpulab-bench.service"
#: What was running before. It outlives a power cut, after which --restore brings it back.
STATE = Path("/var/lib/gpulab/bench/drained.json")
#: Seconds for a container to stop, for all to stop or to start, and for the benchmarks.
STOP_S, DRAIN_S, RUN_S = 60, 300, 180


def drained(arguments: argparse.Namespace, words: Sequence[str]) -> dict[str, Any]:
    """Run this program as a unit of systemd's, which stops the services before and starts them after.

    systemd runs ExecStopPost however the unit ends, also when it is killed or could not start; so nothing depends on
    this process or on its connection.

    Raises:
        Verdict: it could not be started, or a service did not come back.
    """
    if os.geteuid() != 0:
        raise Verdict("--drain must be root to stop services")
    if not Path(globals().get("__file__", "")).is_file():
        raise Verdict("--drain needs this program in a file, which systemd starts again: copy it to the guest")
    if tool("systemctl", "show", "--property=ActiveState", "--value", UNIT) not in ("inactive", "failed"):
        raise Inconclusive("another run with --drain is under way")
    # What is wrong with the names is told here; the unit looks again.
    standing(arguments.container, arguments.unit)
    python = [sys.executable, "-I", str(Path(__file__).resolve())]
    state = f"--state={arguments.state}"
    own = [f"--container={name}" for name in arguments.container] + [f"--unit={name}" for name in arguments.unit]
    properties = {
        "ExecStartPre": quoted([*python, "--drain-stop", state, *own]),
        "ExecStopPost": quoted([*python, "--restore", state]),
        "TimeoutStartSec": str(DRAIN_S),
        "TimeoutStopSec": str(DRAIN_S),
        "RuntimeMaxSec": str(RUN_S),
    }
    command = ["systemd-run", f"--unit={UNIT}", "--wait", "--pipe", "--collect", "--quiet"]
    command += [f"--property={key}={value}" for key, value in properties.items()]
    # In a session of its own, for a Ctrl-C to reach this process alone; the unit goes on to its end then.
    with subprocess.Popen(
        [*command, *python, *words], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as unit:
        output, _ = unit.communicate()
    if arguments.state.exists():
        raise Verdict(
            f"not all that was stopped is back, see journalctl -u {UNIT}. hint: {quoted([*python, '--restore'])}"
        )
    try:
        result: dict[str, Any] = json.loads(output)
    except ValueError:
        raise Verdict(f"{UNIT} ended with status {unit.returncode} and no result, see journalctl -u {UNIT}") from None
    result["notes"].append(f"stopped for this run, and back: {', '.join([*arguments.unit, *arguments.container])}")
    return result


def quoted(command: Sequence[str]) -> str:
    """A command for systemd, which splits, expands `$` and replaces `%`."""
    return " ".join(
        '"' + word.replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$").replace("%", "%%") + '"'
        for word in command
    )


def tool(*command: str) -> str:
    """What a command prints.

    Raises:
        Verdict: with the command's own last line.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DRAIN_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Verdict(f"{shutil.which(command[0]) or command[0]}: {error}") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise Verdict(f"{' '.join(command)}: {said}")
    return done.stdout.strip()


def standing(containers: Sequence[str], units: Sequence[str]) -> dict[str, dict[str, bool]]:
    """Which of these run, by kind and name.

    Raises:
        Verdict: one is not there.
    """
    active = {}
    for name in units:
        shown = tool("systemctl", "show", "--property=LoadState", "--property=ActiveState", "--value", name).split()
        if "loaded" not in shown:
            raise Verdict(f"there is no unit {name}")
        active[name] = bool({"active", "reloading"} & set(shown))
    running = {
        name: tool("docker", "inspect", "--type=container", "--format={{.State.Running}}", name) == "true"
        for name in containers
    }
    return {"containers": running, "units": active}


def stop_services(state: Path, containers: Sequence[str], units: Sequence[str]) -> None:
    """Stop what runs of these, units first: a timer must not bring a container back.

    Raises:
        Verdict: one is not there, before anything was stopped; or one does not stop.
    """
    # A run that a power cut ended left services down.
    start_services(state)
    before = standing(containers, units)
    state.parent.mkdir(parents=True, exist_ok=True)
    # Written before the first is stopped, and whole or not at all.
    temporary = state.with_suffix(".new")
    with temporary.open("w") as file:
        json.dump(before, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(state)
    for name in units:
        say(f"stopping {name}")
        tool("systemctl", "stop", name)
    for name in (name for name, was in before["containers"].items() if was):
        say(f"stopping {name}")
        tool("docker", "stop", "-t", str(STOP_S), name)


def start_services(state: Path) -> None:
    """Start what ran before, containers first. Without a state there is nothing to start.

    Raises:
        Verdict: one did not start; all others are up, and the state stays for another try.
    """
    if not state.exists():
        return
    before, problems = json.loads(state.read_text()), []
    starts = [("docker", "start", name) for name, was in before["containers"].items() if was]
    starts += [("systemctl", "start", name) for name, was in reversed(before["units"].items()) if was]
    for command in starts:
        say(f"starting {command[-1]}")
        try:
            tool(*command)
        except Verdict as error:
            problems.append(str(error))
    if problems:
        raise Verdict("; ".join(problems))
    state.unlink()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    made.add_argument("--quick", action="store_true", help="under 20 s instead of under 120 s")
    made.add_argument("--device", type=int, default=0, metavar="N", help="the card's number in nvidia-smi (default 0)")
    made.add_argument("--metric", action="append", choices=list(METRICS), help="this one only; may be repeated")
    made.add_argument("--seed", type=int, help="of the random data; the result tells the one that was used")
    made.add_argument(
        "--memory-share", type=share, default=0.9, metavar="X", help="of the free memory, for memory.pattern"
    )
    made.add_argument("--user", metavar="NAME", help="run as this user, the one whom MPS serves")
    made.add_argument("--mps-pipe", metavar="DIR", help="pipe directory of the MPS daemon to be a client of")
    load = made.add_argument_group("load", "one of several clients of MPS, for mpsbench.py, which tells it what to do")
    load.add_argument("--load", type=float, metavar="SECONDS", help="obey stdin's commands; a kernel of this length")
    load.add_argument("--threads", type=float, default=100.0, metavar="PERCENT", help="of the card's, under MPS")
    load.add_argument("--memory-limit", type=int, metavar="MIB", help="of this client's device memory, under MPS")
    drain = made.add_argument_group("draining", "needs root, systemd and Docker, and this program in a file")
    drain.add_argument("--drain", action="store_true", help="stop these for the run, and start them again in any case")
    drain.add_argument(
        "--container", action="append", default=[], metavar="NAME", help="a Docker container that uses the GPU"
    )
    drain.add_argument(
        "--unit", action="append", default=[], metavar="NAME", help="a unit, such as the healing timer; stopped first"
    )
    drain.add_argument("--state", type=Path, default=STATE, metavar="FILE", help="where it is kept what ran before")
    drain.add_argument("--restore", action="store_true", help="only start what an interrupted run left stopped")
    # What the unit runs before the benchmarks.
    drain.add_argument("--drain-stop", action="store_true", help=argparse.SUPPRESS)
    return made


def share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def main(words: Sequence[str]) -> int:
    arguments = parser().parse_args(words)
    if arguments.restore or arguments.drain_stop:
        try:
            if arguments.restore:
                start_services(arguments.state)
            else:
                stop_services(arguments.state, arguments.container, arguments.unit)
        except Verdict as error:
            say(str(error))
            return 1
        return 0
    if arguments.load is not None:
        return loaded(arguments)
    if arguments.drain:
        try:
            result = drained(arguments, without_drain(words))
        except Verdict as error:
            result = finished(arguments, blank(arguments) | {"verdict": error.verdict, "reason": str(error)})
    else:
        result = bench(arguments)
    print(json.dumps(result), flush=True)
    if result["reason"]:
        say(f"{result['verdict']}: {result['reason']}")
    return EXIT[result["verdict"]]


def without_drain(words: Sequence[str]) -> list[str]:
    """The arguments of the run itself."""
    kept, skip = [], False
    for word in words:
        if skip or word == "--drain" or word.startswith(("--container=", "--unit=", "--state=")):
            skip = False
        elif word in ("--container", "--unit", "--state"):
            skip = True
        else:
            kept.append(word)
    return kept


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

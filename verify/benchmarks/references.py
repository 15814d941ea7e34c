# SPDX-License-Identifier: MIT
"""What a figure is held against: bounds, and the most that the card itself could do."""

from __future__ import annotations

import math
from dataclasses import dataclass

from inventory.references import FP32_PER_SM, REFERENCES, Reference
from verify.benchmarks.contract import Gpu, Metric
from verify.benchmarks.intervals import Interval, least_samples
from verify.verdicts import Verdict

#: How far, as a share, the median of one run may be known only: sampling stops below it, and no smaller difference
#: between runs is spoken of. `errors` are counted, not estimated.
NOISE: dict[str, float] = {
    "memory.copy": 0.01,
    "memory.triad": 0.01,
    "h2d.pinned": 0.02,
    "d2h.pinned": 0.02,
    # Through the CPU's caches and its memory: other guests of the node are in it.
    "h2d.pageable": 0.05,
    "d2h.pageable": 0.05,
    "bidirectional.pinned": 0.03,
    "fp32.fma": 0.02,
    "tensor.fp16": 0.02,
    "tensor.bf16": 0.02,
    "tensor.tf32": 0.02,
    "tensor.int8": 0.02,
    "launch.latency": 0.05,
    "memory.pattern": 0.0,
    "mps.gain": 0.03,
    "mps.fairness": 0.03,
    "mps.share": 0.03,
    "mps.limit": 0.0,
    "pytorch.gemm.tf32": 0.02,
    "pytorch.gemm.fp16": 0.02,
    "pytorch.gemm.bf16": 0.02,
    "pytorch.copy": 0.02,
    "pytorch.vae": 0.03,
    "ollama.prompt": 0.05,
    "ollama.generation": 0.05,
    "milvus.build": 0.10,
    "milvus.recall": 0.01,
    "milvus.qps.1": 0.05,
    "milvus.qps.8": 0.05,
}

#: A figure that is this much over the card's limit is a mistake of the measurement. Clocks are sampled, not counted.
OVER_LIMIT = 1.05

#: How far, as a share, a figure may fall behind its baseline. gpu-fryer draws the same line below the best card.
MARGIN = 0.10

#: GB/s of one PCIe lane in one direction, by generation: transfers a second and line code, before packets.
LANE_GBS: dict[int, float] = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}


@dataclass(frozen=True)
class Bounds:
    """The worst that passes, absolute; None: nothing bounds that side. `source` says whose they are."""

    low: float | None
    high: float | None
    unit: str
    source: str

    def hold(self, value: float) -> bool:
        """Is it within them?"""
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        if self.low is not None and self.high is not None:
            return f"{self.low:g} to {self.high:g} {self.unit}"
        if self.low is not None:
            return f"at least {self.low:g} {self.unit}"
        return f"at most {self.high:g} {self.unit}" if self.high is not None else "no bound"


#: What follows from what MPS is, on any card: equal clients get equal shares, a client gets that of its threads, and
#: clients that don't fill the card do more together than in turns. With the margin that a learned baseline has.
DEFINED: dict[str, Bounds] = {
    "mps.fairness": Bounds(1 - MARGIN, None, "ratio", f"equal shares, less {MARGIN:.0%}"),
    "mps.share": Bounds(1 - MARGIN, None, "ratio", f"the share of the threads, less {MARGIN:.0%}"),
    "mps.gain": Bounds(1 + MARGIN, None, "ratio", f"taking turns, and {MARGIN:.0%} more"),
}


@dataclass(frozen=True)
class Limit:
    """The most that the card could do, in the metric's unit, and what it is the product of."""

    value: float
    words: str


def reference(gpu: Gpu, name: str) -> Reference | None:
    """What a source says of that card and metric; None also where this slot is less than the figure takes."""
    found = REFERENCES.get(gpu.pci_id, {}).get(name)
    if found is None or found.link is None:
        return found
    generation, width = _link(gpu)
    return found if generation >= found.link[0] and width >= found.link[1] else None


def verdict(found: Interval, bounds: Bounds) -> Verdict:
    """Pass or fail where the whole interval is on one side of the bounds, inconclusive where it straddles one."""
    low = -math.inf if bounds.low is None else bounds.low
    high = math.inf if bounds.high is None else bounds.high
    if found.high < low or found.low > high:
        return Verdict.FAIL
    if found.low >= low and found.high <= high:
        return Verdict.PASS
    return Verdict.INCONCLUSIVE


def sentence(name: str, found: Interval, bounds: Bounds) -> str:
    """The verdict in one sentence: figure, interval, number of samples, bound, and whose it is."""
    seen = measured(name, found, bounds.unit)
    if not found.known:
        return f"{seen}; expected {bounds} ({bounds.source})"
    match verdict(found, bounds):
        case Verdict.PASS:
            return f"{seen}: within what is expected, {bounds} ({bounds.source})"
        case Verdict.FAIL:
            side = "below" if bounds.low is not None and found.high < bounds.low else "above"
            return f"{seen}: all of it {side} what is expected, {bounds} ({bounds.source})"
    return f"{seen}: on both sides of what is expected, {bounds} ({bounds.source})"


def measured(name: str, found: Interval, unit: str) -> str:
    """Figure, interval and number of samples."""
    head = f"{name} {figure(found.median)} {unit}"
    samples = f"{found.n} sample{'s' if found.n != 1 else ''}"
    share = f"{found.level * 100:g} %"
    if not found.known:
        return f"{head}, of {samples} where an interval of {share} takes {least_samples(found.level)}"
    return f"{head}, {share} interval {figure(found.low)} to {figure(found.high)}, of {samples}"


def limit(name: str, gpu: Gpu | None, metric: Metric) -> Limit | None:
    """The most that the card can do at the clocks that it held (its highest, where they were not seen).

    gpubench states its own; here it is worked out again from the card's figures, but for the tensor cores, whose
    operations a clock differ between boards of one compute capability.
    """
    if gpu is None:
        return None
    if name.startswith("memory.") and metric.unit == "GB/s":
        # Two transfers a clock on each pin: GDDR and HBM alike, as NVML counts their clock.
        clock, held = _clock(metric.memory_mhz, gpu.memory_clock_max_mhz)
        if clock and gpu.bus_width_bits:
            value = gpu.bus_width_bits / 8 * 2 * clock / 1000
            return Limit(value, f"{gpu.bus_width_bits} bits x 2 x {clock:g} MHz ({held})")
    if name == "fp32.fma":
        lanes = FP32_PER_SM.get(gpu.compute_capability or "")
        clock, held = _clock(metric.sm_mhz, gpu.sm_clock_max_mhz)
        if clock and lanes and gpu.sm_count:
            value = gpu.sm_count * lanes * 2 * clock / 1e6
            return Limit(value, f"{gpu.sm_count} SMs x {lanes} x 2 x {clock:g} MHz ({held})")
    if name.partition(".")[0] in ("h2d", "d2h", "bidirectional"):
        # A link that idles reads as generation 1, and one that is trained too low should not hide behind itself.
        generation, width = _link(gpu)
        lane = LANE_GBS.get(generation)
        if lane and width:
            ways = 2 if name.startswith("bidirectional") else 1
            both = " x 2 directions" if ways == 2 else ""
            return Limit(lane * width * ways, f"PCIe generation {generation} x {width} lanes{both}")
    if metric.limit is not None:
        return Limit(metric.limit, metric.limit_of or "as gpubench states")
    return None


def _link(gpu: Gpu) -> tuple[int, int]:
    """The highest PCIe generation and width that card and slot have together, 0 where that is not known."""
    return (gpu.link.generation_max or 0, gpu.link.width_max or 0) if gpu.link is not None else (0, 0)


def _clock(held: float | None, most: float | None) -> tuple[float | None, str]:
    return (held, "held") if held is not None else (most, "the highest: what it held was not seen")


def figure(value: float) -> str:
    """A figure with four digits, or all those before the point."""
    return f"{value:.4g}" if abs(value) < 10000 else f"{value:.0f}"

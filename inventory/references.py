# SPDX-License-Identifier: MIT
"""What is known of the speed of each GPU by its PCI id, with the source of every figure.

A figure stands here only if a source gives it for that card. What no source gives, a lab learns from its own runs
(docs/verify.md). A card may be here without being in the card table, and the other way round.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reference:
    """One figure of one card, as ReFrame's `(reference, low, high, unit)`; bounds are absolute, in `unit`.

    `reference` is what the source measured, None where it gives the bound alone; `low` and `high` are the worst that
    passes, None where the source gives no bound. `link`: PCIe generation and width that the figure takes; on a slot
    with less it says nothing.
    """

    reference: float | None
    low: float | None
    high: float | None
    unit: str
    source: str
    link: tuple[int, int] | None = None

    @property
    def bounded(self) -> bool:
        return self.low is not None or self.high is not None


#: FP32 multiply-adds that one SM begins in a clock, by compute capability. CUDA C++ Programming Guide, "Throughput of
#: Native Arithmetic Instructions".
FP32_PER_SM: dict[str, int] = {"8.0": 64, "8.6": 128, "8.9": 128, "9.0": 128}

DCGM = "NVIDIA/DCGM nvvs/diag-skus.yaml.in at 0fb6699, id {id}: {what}"
AZURE = "Azure/azurehpc-health-checks conf/{file}: {what} (nvbandwidth, copy engine, pinned)"


def _dcgm(
    device: str, memory: float, least_memory: float, fp32: float | None = None, least_fp32: float | None = None
) -> dict[str, Reference]:
    """The floors of DCGM's own diagnosis. GB/s of its STREAM triad, and TFLOP/s of its SGEMM (`-t 1007`).

    DCGM writes MB/s and GFLOP/s, and about three quarters of what it measured as the floor. A chain of multiply-adds
    in registers is never slower than a matrix product, so that floor holds for `fp32.fma` too. Figures of cards whose
    entry tests in FP64 are left out.
    """
    triad = DCGM.format(id=device, what="memory_bandwidth.minimum_bandwidth, measured by dcgmproftester -t 1005")
    found = {"memory.triad": Reference(memory, least_memory, None, "GB/s", triad)}
    if fp32 is not None:
        gemm = DCGM.format(id=device, what="sm_stress.target_stress, SGEMM measured by dcgmproftester -t 1007")
        found["fp32.fma"] = Reference(fp32, least_fp32, None, "TFLOP/s", gemm)
    return found


def _azure(file: str, what: str, least: float, link: tuple[int, int]) -> dict[str, Reference]:
    """The gate of Azure's health checks, the same in both directions, GB/s."""
    bound = Reference(None, least, None, "GB/s", AZURE.format(file=file, what=what), link)
    return {"h2d.pinned": bound, "d2h.pinned": bound}


def _measured(source: str, **figures: float) -> dict[str, Reference]:
    """What somebody measured: worth showing, and no bound."""
    names = {"h2d_pinned": "h2d.pinned", "d2h_pinned": "d2h.pinned"}
    return {names[key]: Reference(value, None, None, "GB/s", source, (4, 16)) for key, value in figures.items()}


#: PCI id, then the metric's name. Names of cards are those of pci.ids.
REFERENCES: dict[str, dict[str, Reference]] = {
    # RTX A4000. No source was found for its PCIe, tensor core and latency figures.
    "10de:24b0": _dcgm("24b0", 387.7, 290.75, 10.1, 7.5),
    # RTX A5000
    "10de:2231": _dcgm("2231", 676.6, 507.5, 13.1, 9.825),
    # RTX A6000
    "10de:2230": _dcgm("2230", 674.5, 506.0, 15.3, 11.475),
    # A40
    "10de:2235": _dcgm("2235", 564.9, 423.675, 19.0, 14.25),
    # A10G
    "10de:2237": _dcgm("2237", 483.6, 362.7, 17.0, 12.75),
    # A10M
    "10de:2238": _dcgm("2238", 415.0, 311.25, 9.1, 6.825),
    # RTX A2000 12GB
    "10de:2571": _dcgm("2571", 256.0, 192.0, 3.7, 2.775),
    # RTX A2000
    "10de:2531": _dcgm("2531", 257.0, 192.75, 3.911, 2.933),
    # A2 and A16 have one id: the lower of the two figures.
    "10de:25b6": _dcgm("25b6", 164.3, 123.225, 2.25, 1.687),
    # A30 PCIe
    "10de:20b7": _dcgm("20b7", 780.0, 585.0, 9.4, 7.05),
    # A100 PCIe 40GB
    "10de:20f1": _dcgm("20f1", 1293.0, 969.75),
    # A100 PCIe 80GB. Azure's line says 21 in its state of May 2026 and 23 in one of 2023.
    "10de:20b5": {
        **_dcgm("20b5", 1495.0, 1121.25),
        **_azure("nc24ads_a100_v4.conf", "check_gpu_bw 21", 21.0, (4, 16)),
    },
    # A100 SXM4 80GB. That of 40 GB (20b0) is left out: its floor there is a tenth of what the comment beside it says.
    "10de:20b2": _dcgm("20b2", 1564.0, 1173.0),
    # A800 80GB PCIe, A800 40GB PCIe
    "10de:20f5": _dcgm("20f5", 1295.0, 971.0, 17.8, 13.35),
    "10de:20f6": _dcgm("20f6", 1295.0, 971.0, 16.5, 12.375),
    # H100 PCIe
    "10de:2331": _dcgm("2331", 1639.0, 1230.0, 20.5, 15.375),
    # H200 SXM 141GB
    "10de:2335": _azure("nd96isr_h200_v5.conf", "check_gpu_bw 48", 48.0, (5, 16)),
    # GeForce RTX 4090: the medians of eight cards.
    "10de:2684": _measured("NVIDIA/nvbandwidth issue 15, eight cards in one host", h2d_pinned=26.19, d2h_pinned=26.80),
}

# SPDX-License-Identifier: MIT
"""The card table: what is known of each GPU by its PCI id, with the source of every figure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """One GPU model.

    `functions` are the PCI ids of function 0 and up. `memory_mib` is what `nvidia-smi` reports in total,
    `power_limit_w` the lowest and highest limit that the card is known to accept (watts), `graphics_clock_mhz` the
    range in which its graphics clock can be locked, `link_generation` and `link_width` the least PCIe link that is
    right under load. `ecc` and `mig`: can the card do it? None: no source gives it, the card itself is asked.
    """

    name: str
    functions: tuple[str, ...]
    memory_mib: int
    compute_capability: str
    link_generation: int
    link_width: int
    power_limit_w: tuple[int, int] | None = None
    graphics_clock_mhz: tuple[int, int] | None = None
    ecc: bool = False
    mig: bool = False


RTX_A4000 = Card(
    name="NVIDIA RTX A4000",
    # Debian's pci.ids: GA104GL [RTX A4000] and GA104 High Definition Audio Controller.
    functions=("10de:24b0", "10de:228b"),
    # nvidia-smi on a real card: geerlingguy/raspberry-pi-pcie-devices#692.
    memory_mib=16376,
    compute_capability="8.6",
    # NVIDIA/DCGM nvvs/diag-skus.yaml.in, A4000 '24b0': minimum generation 3, width 16.
    link_generation=3,
    link_width=16,
    # 140 W: datasheet. 100 W accepted by a real card: rammsguns/llm-rig#100.
    power_limit_w=(100, 140),
    # Idle clock of a real card (same issue) and the highest clock of its generation (RTX A6000: NVIDIA forum 203772).
    graphics_clock_mhz=(210, 2100),
    # nvidia-smi shows "Off", not N/A: geerlingguy/raspberry-pi-pcie-devices#692. MIG is for A100, A30 and later.
    ecc=True,
)

CARDS: dict[str, Card] = {RTX_A4000.functions[0]: RTX_A4000}

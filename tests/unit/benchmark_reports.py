# SPDX-License-Identifier: MIT
"""Reports as the benchmarks print them, for the tests of what is made of them."""

from __future__ import annotations

import json
from typing import Any

from verify.benchmarks.contract import METRICS, Report, read

A4000: dict[str, Any] = {
    "name": "NVIDIA RTX A4000",
    "pci_id": "10de:24b0",
    "uuid": "GPU-6a1c",
    "compute_capability": "8.6",
    "sm_count": 48,
    "memory_mib": 16376,
    "bus_width_bits": 256,
    "memory_clock_max_mhz": 7001,
    "sm_clock_max_mhz": 2100,
    "link": {"generation": 1, "width": 16, "generation_max": 4, "width_max": 16},
}


def metric(name: str, samples: list[float], **keys: Any) -> dict[str, Any]:
    """One metric with the unit that it has by name."""
    unit, better = METRICS[name]
    plain = {"unit": unit, "better": better, "samples": samples, "checked": True, "wrong": 0}
    return {**plain, "sm_mhz": 1560.0, "memory_mhz": 7001.0, "limit": None, "limit_of": "", **keys}


def printed(**keys: Any) -> dict[str, Any]:
    """A measured run of an RTX A4000; `metrics` defaults to a steady triad."""
    return {
        "schema": 1,
        "tool": "gpubench",
        "began": 1796000000.0,
        "duration_s": 83.4,
        "quick": False,
        "seed": 7,
        "card": A4000,
        "driver": "580.95.05",
        "cuda_driver": "13.0",
        "verdict": "measured",
        "reason": "",
        "metrics": {"memory.triad": metric("memory.triad", steady(388.0))},
        "not_run": {},
        "telemetry": [],
        "notes": [],
        **keys,
    }


#: What a program of tier 1 tells of the card.
CARD = {key: A4000[key] for key in ("name", "pci_id", "uuid")}
PROCESSOR: dict[str, Any] = {"device": "cpu", "processor": "AMD EPYC 7313", "card": None, "driver": None}


def of_tier_1(tool: str, levels: dict[str, float], **keys: Any) -> dict[str, Any]:
    """A measured run of a program of tier 1 on an RTX A4000; `levels`: what each metric is steady at."""
    metrics = {name: metric(name, steady(level), sm_mhz=None, memory_mhz=None) for name, level in levels.items()}
    plain = {"tool": tool, "device": "cuda", "processor": "", "card": CARD, "software": f"{tool} 1.0", "setting": "s"}
    return printed(metrics=metrics, **{**plain, **keys})


def report(**keys: Any) -> Report:
    """The same, read."""
    return read(json.dumps(printed(**keys)))


def steady(level: float, n: int = 12) -> list[float]:
    """Samples that differ by a tenth of a percent around `level`."""
    return [level * (1 + (i % 3 - 1) / 1000) for i in range(n)]

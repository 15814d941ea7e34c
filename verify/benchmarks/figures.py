# SPDX-License-Identifier: MIT
"""Drawings of what was measured, for the report's page."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from verify.benchmarks import history
from verify.benchmarks.contract import Report
from verify.benchmarks.history import WINDOW, Past
from verify.benchmarks.judging import Judgement
from verify.benchmarks.measured import Measured
from verify.benchmarks.references import Bounds, figure
from verify.promises import SPELLED
from verify.report import Figure
from verify.report.page import SIGNS
from verify.report.svg import Axis, Bar, Roof, bars, line, roofline
from verify.verdicts import Verdict

#: Class of colour of a verdict on the page.
KINDS = {Verdict.PASS: "good", Verdict.FAIL: "bad"}
#: What a row of the telemetry holds: name, key, unit.
TRACES = (("SM clock", "sm_mhz", "MHz"), ("power", "power_w", "W"), ("temperature", "temperature_c", "°C"))
#: NVML's bits for what keeps the clocks down (nvml.h); rest is none.
REASONS = {
    0x2: "declared clocks",
    0x4: "power limit",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "external power brake",
    0x100: "display clocks",
}
#: Roofs of the card's arithmetic, by what they are measured with.
ROOFS = (
    (("fp32.fma",), "FP32"),
    (("tensor.tf32",), "TF32"),
    (("tensor.fp16", "tensor.bf16"), "FP16, BF16"),
)
#: FLOP a byte of memory.triad: two operations, two values read and one written, of four bytes each.
TRIAD = 2 / 12
#: Room above and below what a chart shows, as a share of it.
ROOM = 0.08


def figures(host: str, measured: Measured) -> list[Figure]:
    """What a guest's benchmarks look like; none where nothing was measured."""
    report = measured.report
    if not report.metrics:
        return []
    under = f", driver {report.driver}" if report.driver else ""
    about = f"{report.computed_by}{under}, {'quick' if report.quick else 'full'} run"
    if report.software:
        about = f"{report.software} on {about}, {report.setting}"
    if measured.simulated:
        about = f"SIMULATED ({measured.simulated}): {about}"
    if report.verdict != "measured":
        about += f"; {report.verdict}: {report.reason}"
    found = [
        *_of_limits(measured.judgements),
        *_of_roofs(measured.judgements),
        *shares(report),
        *_of_history(measured),
        *_of_telemetry(report.telemetry),
    ]
    title = f"{host}: " if report.tool == "gpubench" else f"{host}, {SPELLED.get(report.tool, report.tool)}: "
    return [Figure(f"{title}{each.title}", each.svg, f"{about}. {each.note}") for each in found]


def shares(report: Report) -> list[Figure]:
    """How clients of MPS share the card; none where nothing was measured."""
    found = []
    if points := [(percent, share) for percent, share in report.series.get("mps.share", [])]:
        told = ", ".join(f"{percent:.0f} % of the threads {share * 100:.1f} %" for percent, share in points)
        most, high = (max(column) for column in zip(*points, strict=True))
        chart = line(
            f"Share of the throughput of {most:.0f} % of the threads: {told}",
            points,
            Axis(0.0, most, "0 %", f"{most:.0f} % of the threads"),
            Axis(0.0, high, "0 %", f"{high * 100:.0f} %"),
            width=392,
            height=200,
            last="plain",
            ideal=((0.0, 0.0), (most, 1.0)),
        )
        note = (
            "The throughput of one client alone as a share of what it does with the most threads; dashed is what MPS "
            "promises, before it rounds to whole multiprocessors."
        )
        found.append(Figure("MPS shares", chart, note))
    if clients := [(number, share) for number, share in report.series.get("mps.together", [])]:
        equal = 1 / len(clients)
        rows = [Bar(f"client {number:.0f}", share, f"{share * 100:.1f} %", "plain", equal) for number, share in clients]
        told = "; ".join(f"{row.label} {row.value}" for row in rows)
        note = f"What each of {len(rows)} equal clients got of the card; the stroke is an equal share."
        found.append(Figure("MPS clients together", bars(f"Share of the throughput of all: {told}", rows), note))
    return found


def _of_limits(judgements: Mapping[str, Judgement]) -> list[Figure]:
    rows, told = [], []
    for name, each in judgements.items():
        if each.found is None or each.limit is None or each.ratio is None:
            continue
        low = each.bounds.low if each.bounds is not None else None
        value = f"{figure(each.found.median)} {each.unit}, {each.ratio * 100:.0f} % {SIGNS[each.verdict][0]}"
        mark = low / each.limit.value if low is not None else None
        rows.append(Bar(name, each.ratio, value, KINDS.get(each.verdict, "odd"), mark))
        told.append(f"{name} {each.ratio * 100:.0f} % of {figure(each.limit.value)} {each.unit}")
    if not rows:
        return []
    note = (
        "Each figure as a share of what this card could do at the clock that it held; the stroke is the least expected."
    )
    return [Figure("share of the card's own limit", bars(f"Share of the limit: {'; '.join(told)}", rows), note)]


def _of_roofs(judgements: Mapping[str, Judgement]) -> list[Figure]:
    """The roofline model of the card as it was measured: Williams, Waterman and Patterson, CACM 52 (2009) 65."""
    triad = judgements.get("memory.triad")
    if triad is None or triad.found is None:
        return []
    roofs = [_roof(judgements, names, label) for names, label in ROOFS]
    known = [each for each in roofs if each is not None]
    if not known:
        return []
    slope = triad.found.median / 1000
    told = "; ".join(f"{each.label} TFLOP/s" for each in known)
    title = f"Roofline: {figure(triad.found.median)} GB/s of memory; {told}"
    labels = (f"memory {figure(triad.found.median)} GB/s", f"triad {figure(slope * TRIAD * 1000)} GFLOP/s")
    note = (
        "TFLOP/s against FLOP a byte of memory: a kernel gets no further than the slope, where it waits for memory, "
        "and its roof. Dashed is what the card could do at the clock that it held."
    )
    return [Figure("roofline", roofline(title, slope, known, (TRIAD, slope * TRIAD), labels), note)]


def _roof(judgements: Mapping[str, Judgement], names: Sequence[str], label: str) -> Roof | None:
    """The roof of metrics that share one; None where none of them was measured. The worst verdict is its colour."""
    there = [judgements[name] for name in names if name in judgements and judgements[name].found is not None]
    levels = [each.found.median for each in there if each.found is not None]
    if not levels:
        return None
    kinds = {KINDS.get(each.verdict, "odd") for each in there}
    kind = next(kind for kind in ("bad", "odd", "good") if kind in kinds)
    limit = there[0].limit.value if there[0].limit is not None else None
    return Roof(f"{label} {figure(max(levels))}", max(levels), limit, kind)


def _of_history(measured: Measured) -> list[Figure]:
    now = history.past(measured.report, measured.revision)
    if now is None:
        return []
    charts = []
    for name in now.figures:
        runs = [*measured.runs.before(now, name), now][-WINDOW:]
        charts.append(_multiple(name, runs, measured.judgements[name]))
    note = (
        f"Each figure in up to {WINDOW} runs of this kind on this card, the newest as a dot with its 95 % interval; "
        "shaded is what is expected. No scale begins at 0."
    )
    return [Figure("the last runs", f'<div class="multiples">{"".join(charts)}</div>', note)]


def _multiple(name: str, runs: Sequence[Past], judged: Judgement) -> str:
    """The chart of one metric, headed by its name and newest figure."""
    values = [run.figures[name] for run in runs]
    last, bounds, unit = values[-1], judged.bounds, values[-1].unit
    band = (bounds.low, bounds.high) if bounds is not None else None
    ends = [each.median for each in values] + [last.low, last.high] + [end for end in band or () if end is not None]
    days = [time.strftime("%Y-%m-%d", time.localtime(run.began)) for run in (runs[0], runs[-1])]
    expected = f"expected {bounds}" if bounds is not None else "a baseline is being learned"
    medians = ", ".join(figure(each.median) for each in values)
    of = f"{len(runs)} runs from {days[0]} to {days[1]}" if len(runs) > 1 else f"1 run of {days[1]}"
    chart = line(
        f"{name}, {of}: {medians} {unit}; {expected}; {judged.verdict.value}",
        [(float(number), each.median) for number, each in enumerate(values)],
        # The newest stands to the right, also where it is alone.
        Axis(min(0.0, len(runs) - 2.0), len(runs) - 1.0, days[0] if len(runs) > 1 else "", days[1]),
        _around(ends),
        width=170,
        height=84,
        band=band if band is not None and _within(bounds) else None,
        last=KINDS.get(judged.verdict, "odd"),
        whisker=(last.low, last.high),
    )
    sign = SIGNS[judged.verdict][0]
    return f"<div><p><strong>{escape(name)}</strong> {figure(last.median)} {unit} {sign}</p>{chart}</div>"


def _within(bounds: Bounds | None) -> bool:
    return bounds is not None and (bounds.low is not None or bounds.high is not None)


def _of_telemetry(rows: Sequence[Any]) -> list[Figure]:
    charts, spans = [], []
    for name, key, unit in TRACES:
        points = [(float(row["t"]), float(row[key])) for row in rows if _has(row, "t") and _has(row, key)]
        if len(points) < 2 or points[0][0] == points[-1][0]:
            continue
        values = [value for _, value in points]
        span = f"{figure(min(values))} to {figure(max(values))} {unit}"
        spans.append(f"{name} {span}")
        chart = line(
            f"{name} over {points[-1][0]:.0f} s: {span}",
            points,
            Axis(points[0][0], points[-1][0], f"{points[0][0]:.0f} s", f"{points[-1][0]:.0f} s"),
            _around(values),
            width=300,
            height=96,
        )
        charts.append(f"<div><p><strong>{name}</strong> {span}</p>{chart}</div>")
    if not charts:
        return []
    note = f"As NVML said during the run. {_reasons(rows)}"
    return [Figure("the card meanwhile", f'<div class="multiples broad">{"".join(charts)}</div>', note)]


def _has(row: Any, key: str) -> bool:
    value = row.get(key) if isinstance(row, Mapping) else None
    return isinstance(value, int | float) and not isinstance(value, bool)


def _reasons(rows: Sequence[Any]) -> str:
    """What kept the clocks down, and for which share of the time."""
    known = [int(row["reasons"]) for row in rows if _has(row, "reasons")]
    if not known:
        return "What kept the clocks down it did not say."
    counts = Counter(name for bits in known for bit, name in REASONS.items() if bits & bit)
    told = ", ".join(f"{name} {count / len(known) * 100:.0f} %" for name, count in counts.most_common())
    return f"What kept the clocks down, as a share of the time: {told}." if told else "Nothing kept the clocks down."


def _around(values: Sequence[float]) -> Axis:
    """An axis with all of these on it, and a little room."""
    low, high = min(values), max(values)
    room = (high - low) * ROOM or abs(high) * ROOM or 1.0
    return Axis(low - room, high + room, figure(low - room), figure(high + room))

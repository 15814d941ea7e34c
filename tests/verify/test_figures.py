# SPDX-License-Identifier: MIT
"""The drawings of the benchmarks, as they are on the page: of a synthetic run, whose figures are known."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.unit.benchmark_reports import steady
from tests.verify.healthy import FIGURES, Doctored, benchmarks, healthy, lab_file, unmeasured, verify
from tests.verify.page import fetches, parsed
from verify.benchmarks import contract, history
from verify.benchmarks.figures import figures
from verify.benchmarks.measured import measured
from verify.report import Figure
from verify.report.svg import Axis, Bar, bars, line

#: Of elements of a drawing inside of a page.
SVG = "{http://www.w3.org/2000/svg}"


def drawn(tmp_path: Path, found: dict[str, Any], simulated: str = "") -> list[Figure]:
    """The figures of that run, after five sound ones."""
    lab_file(tmp_path)
    return figures("gpu01", measured(found, tmp_path / "state/benchmarks/pve1/gpu01.jsonl", "abc", simulated))


def titles(figure: Figure) -> list[str]:
    """What each drawing says of itself."""
    return re.findall(r'<svg class="chart" viewBox="[\d. ]+" role="img"><title>(.*?)</title>', figure.svg)


def parts(svg: str, kind: str) -> list[dict[str, str]]:
    """The attributes of each part of that class."""
    return [each.attrib for each in ElementTree.fromstring(svg).iter() if kind in each.get("class", "").split()]


def test_page_has_them_and_stays_valid(tmp_path: Path) -> None:
    run = verify(lab_file(tmp_path), "--quick", plugin=Doctored(healthy()))

    tree = parsed(run.html)
    captions = ["".join(each.itertext()) for each in tree.iter("figcaption")]

    assert [caption.partition(" NVIDIA")[0] for caption in captions] == [
        "gpu01: share of the card's own limit",
        "gpu01: roofline",
        "gpu01: the last runs",
        "gpu01: the card meanwhile",
    ]
    assert all("NVIDIA RTX A4000, driver 580.95.05, quick run" in caption for caption in captions)
    assert fetches(tree) == [] and "<script" not in run.html and "url(" not in run.html
    drawings = list(tree.iter(f"{SVG}svg"))
    assert len(drawings) == 2 + len(FIGURES) + 3
    assert all(each.get("role") == "img" and (each.findtext(f"{SVG}title") or "").strip() for each in drawings)


@pytest.mark.parametrize("verdict", ["not run", "inconclusive", "failed"])
def test_nothing_measured_is_nothing_drawn(tmp_path: Path, verdict: str) -> None:
    observations = {**healthy(), "gpubench": unmeasured(verdict, "GPU in use by PID 812 milvus")}

    run = verify(lab_file(tmp_path), "--quick", plugin=Doctored(observations))

    assert "<svg" not in run.html and 'id="benchmarks"' not in run.html


def test_simulated_figures_are_marked(tmp_path: Path) -> None:
    found = drawn(tmp_path, benchmarks(2e9), simulated="a card of cardboard")

    assert len(found) == 4
    assert all(each.note.startswith("SIMULATED (a card of cardboard): ") for each in found)


def test_bar_is_the_share_of_the_limit_and_the_stroke_its_bound(tmp_path: Path) -> None:
    observations = benchmarks(2e9)
    observations["metrics"]["h2d.pinned"]["samples"] = steady(15.75)

    limits = drawn(tmp_path, observations)[0]

    (title,) = titles(limits)
    assert "h2d.pinned 50 % of 31.5 GB/s" in title
    assert "15.75 GB/s, 50 % ✘" in limits.svg
    # Of a card that is not of PCIe there is no limit to a launch.
    assert "launch.latency" not in title
    (bad,) = parts(limits.svg, "bad")
    whole = float(parts(limits.svg, "ground")[0]["width"])
    assert float(bad["width"]) == pytest.approx(whole * 0.5, rel=0.001)
    # The third of the rows.
    mark = parts(limits.svg, "mark")[2]
    assert (float(mark["x1"]) - float(bad["x"])) / whole == pytest.approx(25.1 * 0.9 / 31.504, rel=0.002)


def test_roofline_has_the_slope_of_the_memory_and_the_roofs_of_the_arithmetic(tmp_path: Path) -> None:
    observations = benchmarks(2e9)
    observations["metrics"]["fp32.fma"]["samples"] = steady(5.0)

    roofs = drawn(tmp_path, observations)[1]

    (title,) = titles(roofs)
    assert title == "Roofline: 388 GB/s of memory; FP32 5 TFLOP/s; TF32 35.1 TFLOP/s; FP16, BF16 70.2 TFLOP/s"
    # Two operations on twelve bytes.
    assert "triad 64.67 GFLOP/s" in roofs.svg
    lines = [{key: float(each[key]) for key in ("x1", "x2", "y1", "y2")} for each in parts(roofs.svg, "roof")]
    fp32, tf32, fp16 = lines
    assert [each["class"] for each in parts(roofs.svg, "roof")] == ["roof bad", "roof good", "roof good"]
    # The faster, the higher, and the further to the right it leaves the slope: on one straight line.
    assert fp32["y1"] > tf32["y1"] > fp16["y1"] and fp32["x1"] < tf32["x1"] < fp16["x1"]
    rise = [(a["y1"] - b["y1"]) / (b["x1"] - a["x1"]) for a, b in ((fp32, tf32), (tf32, fp16))]
    assert rise[0] == pytest.approx(rise[1], rel=0.02)
    (slope,) = [each for each in parts(roofs.svg, "line") if "x1" in each]
    assert (float(slope["x2"]), float(slope["y2"])) == (fp16["x1"], fp16["y1"])


def test_without_the_memory_there_is_no_roofline(tmp_path: Path) -> None:
    observations = benchmarks(2e9)
    del observations["metrics"]["memory.triad"]

    assert "roofline" not in " ".join(each.title for each in drawn(tmp_path, observations))


def test_history_has_the_runs_before_and_the_band(tmp_path: Path) -> None:
    runs = drawn(tmp_path, benchmarks(2e9))[2]

    told = titles(runs)
    assert len(told) == len(FIGURES)
    (latency,) = [each for each in told if each.startswith("launch.latency, 6 runs from ")]
    assert latency.endswith(": 2.4, 2.4, 2.4, 2.4, 2.4, 2.4 us; expected at most 2.64 us; pass")
    first = runs.svg.partition("<svg")[2].partition("</svg>")[0]
    svg = f"<svg{first}</svg>"
    assert len(parts(svg, "line")[0]["points"].split()) == 6
    assert len(parts(svg, "band")) == len(parts(svg, "bound")) == 1


def test_first_run_is_a_point_without_a_band(tmp_path: Path) -> None:
    alone = measured(benchmarks(2e9), tmp_path / "none.jsonl", "abc")

    runs = figures("gpu01", alone)[2]

    assert "memory.copy, 1 runs" not in runs.svg
    assert "memory.copy, 1 run of 2033-05-18: 391 GB/s; a baseline is being learned; pass" in titles(runs)
    assert 'class="band"' in runs.svg  # a source bounds the triad, whatever is learned
    assert runs.svg.count('class="band"') == 2
    assert "polyline" not in runs.svg


def test_run_that_others_spoiled_draws_no_history(tmp_path: Path) -> None:
    spoiled = benchmarks(2e9) | {"verdict": "inconclusive", "reason": "GPU in use by PID 9 python"}

    found = drawn(tmp_path, spoiled)

    titles_ = ["gpu01: share of the card's own limit", "gpu01: roofline", "gpu01: the card meanwhile"]
    assert [each.title for each in found] == titles_
    assert all("inconclusive: GPU in use by PID 9 python" in each.note for each in found)
    assert parts(found[0].svg, "good") == []


def test_telemetry_tells_spans_and_what_held_the_clocks(tmp_path: Path) -> None:
    found = benchmarks(2e9)
    found["telemetry"] = [
        {"t": 0.1, "sm_mhz": 1560, "power_w": None, "temperature_c": 50, "reasons": 0x4},
        {"t": 0.2, "sm_mhz": 1500, "power_w": None, "temperature_c": 51, "reasons": 0x44},
        "no row",
        {"t": 2.1, "sm_mhz": 1560, "power_w": 110.5, "temperature_c": 52, "reasons": None},
    ]

    meanwhile = drawn(tmp_path, found)[3]

    assert titles(meanwhile) == ["SM clock over 2 s: 1500 to 1560 MHz", "temperature over 2 s: 50 to 52 °C"]
    assert meanwhile.note.endswith("as a share of the time: power limit 100 %, hardware thermal slowdown 50 %.")


def test_no_telemetry_is_no_drawing(tmp_path: Path) -> None:
    assert len(drawn(tmp_path, benchmarks(2e9) | {"telemetry": []})) == 3


def test_history_of_a_card_goes_back_a_bounded_number_of_runs(tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    for number in range(70):
        run = history.past(contract.Report.model_validate(benchmarks(1e9 + number * 60)), "abc")
        assert run is not None
        history.append(path, run)

    runs = figures("gpu01", measured(benchmarks(2e9), path, "abc"))[2]

    assert "memory.copy, 60 runs from " in runs.svg


# The drawings themselves.


def test_words_are_no_markup() -> None:
    svg = bars("<b> & more", [Bar("<i>", 1.7, '"&"', "good", mark=2.0)])

    assert "<b>" not in svg and "<i>" not in svg
    # A share of more than the whole ends where the whole does.
    assert parts(svg, "good")[0]["width"] == parts(svg, "ground")[0]["width"]


def test_line_stays_on_its_paper() -> None:
    axis = Axis(0.0, 10.0, "0", "10")

    svg = line("odd", [(-5.0, 20.0), (5.0, 5.0), (50.0, -7.0)], axis, axis, width=100, height=50, band=(2.0, None))

    places = [tuple(map(float, each.split(","))) for each in parts(svg, "line")[0]["points"].split()]
    assert all(0 <= left <= 100 and 0 <= top <= 50 for left, top in places)
    assert places[0][1] < places[1][1] < places[2][1]
    assert len(parts(svg, "bound")) == 1

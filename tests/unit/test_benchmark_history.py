# SPDX-License-Identifier: MIT
"""A lab's own history: kept line by line, read whatever became of the file, and what it says of a new run."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import random
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import inventory
from tests.unit.benchmark_reports import metric, report, steady
from tests.unit.test_inventory import GUEST, lab_file
from verify.benchmarks import history
from verify.benchmarks.history import LEARN, Figure, History, Past, append, baseline, file_of, read, recent, shifts

DAY = 86400.0
BEGAN = 1796000000.0
NAME = "memory.triad"


def run(number: int = 0, level: float = 388.0, **keys: Any) -> Past:
    """The run of day `number`, with one figure."""
    unit, better = keys.pop("unit", "GB/s"), keys.pop("better", "higher")
    figure = Figure(unit=unit, better=better, median=level, low=level * 0.999, high=level * 1.001, n=12)
    plain = {
        "schema": 1,
        "tool": "gpubench",
        "began": BEGAN + number * DAY,
        "quick": False,
        "card": "10de:24b0",
        "uuid": "GPU-6a1c",
        "driver": "580.95.05",
        "revision": "af62f38",
        "figures": {NAME: figure},
    }
    return Past.model_validate({**plain, **keys})


def runs(*levels: float, start: int = 0, **keys: Any) -> list[Past]:
    return [run(start + number, level, **keys) for number, level in enumerate(levels)]


def noisy(level: float, n: int, seed: int = 1) -> list[float]:
    chance = random.Random(seed)
    return [chance.gauss(level, level * 0.002) for _ in range(n)]


# The file.


def test_file_is_one_of_the_guest_in_the_labs_private_folder(tmp_path: Path) -> None:
    guest = {**GUEST, "state_dir": str(tmp_path / "state")}
    lab = inventory.load(lab_file(tmp_path, guests={"gpu01": guest}))

    assert file_of(lab, lab.guests["gpu01"]) == tmp_path / "state/benchmarks/pve1/gpu01.jsonl"


def test_what_is_appended_is_read(tmp_path: Path) -> None:
    path = tmp_path / "lab/gpu01.jsonl"
    kept = runs(388.0, 389.0, 387.0)
    for each in kept:
        append(path, each)

    assert read(path) == History(kept, [])
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [json.loads(line)["schema"] for line in path.read_text().splitlines()] == [1, 1, 1]


@settings(max_examples=25)
@given(
    level=st.floats(min_value=1e-300, max_value=1e300),
    revision=st.text(max_size=30),
    driver=st.text(min_size=1, max_size=30),
)
def test_any_run_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, level: float, revision: str, driver: str
) -> None:
    path = tmp_path_factory.mktemp("history") / "gpu01.jsonl"
    kept = run(0, level, revision=revision, driver=driver)

    append(path, kept)

    assert read(path).runs == [kept]


def test_file_that_is_not_there_has_no_runs(tmp_path: Path) -> None:
    assert read(tmp_path / "none.jsonl") == History([], [])


def test_file_that_cannot_be_read_costs_a_note(tmp_path: Path) -> None:
    found = read(tmp_path)

    assert found.runs == [] and "Is a directory: its runs are not compared with" in found.notes[0]


@pytest.mark.parametrize("cut", [1, 40, 200, -1])
def test_torn_last_line_costs_a_note_and_the_next_run_is_kept(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "gpu01.jsonl"
    first, torn, last = runs(388.0, 389.0, 387.0)
    append(path, first)
    whole = path.stat().st_size
    append(path, torn)
    path.write_bytes(path.read_bytes()[: whole + cut] if cut > 0 else path.read_bytes()[:-2])
    assert read(path).runs == [first]

    append(path, last)
    found = read(path)

    assert found.runs == [first, last]
    assert found.notes == [f"{path}, line 2: left out (not a whole line of JSON)"]


def test_line_that_only_lacks_its_end_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "gpu01.jsonl"
    first, second = runs(388.0, 389.0)
    append(path, first)
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    append(path, second)

    assert read(path) == History([first, second], [])


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"\xff\xfe", "not a whole line of JSON"),
        (b"not json", "not a whole line of JSON"),
        (b"[1, 2]", "line: Input should be an object"),
        (b'{"schema": 2}', "schema: Input should be 1"),
        (b'{"level": "info", "message": "from elsewhere"}', "schema: Field required"),
        (json.dumps({**run().model_dump(by_alias=True), "began": float("nan")}).encode(), "began: "),
        (json.dumps({**run().model_dump(by_alias=True), "tool": "torchbench"}).encode(), "tool: "),
    ],
)
def test_foreign_line_costs_a_note_never_the_run(tmp_path: Path, line: bytes, why: str) -> None:
    path = tmp_path / "gpu01.jsonl"
    first, last = runs(388.0, 389.0)
    append(path, first)
    with path.open("ab") as file:
        file.write(line + b"\n\n")
    append(path, last)

    found = read(path)

    assert found.runs == [first, last]
    assert len(found.notes) == 1 and "line 2: left out (" in found.notes[0] and why in found.notes[0]


@settings(max_examples=50)
@given(st.binary(max_size=400))
def test_no_content_makes_the_reader_break(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("history") / "gpu01.jsonl"
    path.write_bytes(content)

    assert read(path).runs == []


def test_run_that_is_there_twice_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "gpu01.jsonl"
    for each in (run(1), run(0), run(1)):
        append(path, each)

    assert read(path).runs == [run(0), run(1)]


def _write(path: Path, first: int) -> None:
    for number in range(first, first + 25):
        append(path, run(number))


def test_runs_that_end_at_once_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "gpu01.jsonl"
    path.parent.mkdir(exist_ok=True)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(path, 100 * number)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()

    found = read(path)

    assert (len(found.runs), found.notes) == (100, [])


def test_run_waits_for_the_one_that_is_being_written(tmp_path: Path) -> None:
    """Otherwise what the other has written so far would look like a torn line."""
    path = tmp_path / "gpu01.jsonl"
    append(path, run(0))
    with path.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        later = threading.Thread(target=append, args=(path, run(1)))
        later.start()
        later.join(timeout=0.3)
        assert later.is_alive() and read(path).runs == [run(0)]
    later.join(timeout=10)

    assert read(path).runs == [run(0), run(1)]


# What is kept of a report.


def test_sound_figures_of_a_report_are_kept() -> None:
    kept = history.past(
        report(
            metrics={
                NAME: metric(NAME, steady(388.0)),
                "fp32.fma": metric("fp32.fma", steady(18.0), wrong=2),
                "h2d.pinned": metric("h2d.pinned", [24.0] * 5),
                "memory.pattern": metric("memory.pattern", [0] * 8),
            }
        ),
        "af62f38",
    )

    assert kept is not None
    assert list(kept.figures) == [NAME], "wrong values, too few samples and counts of errors are no history"
    assert (kept.driver, kept.revision, kept.card, kept.uuid) == ("580.95.05", "af62f38", "10de:24b0", "GPU-6a1c")
    assert kept.figures[NAME].median == pytest.approx(388.0)


@pytest.mark.parametrize("verdict", ["inconclusive", "failed"])
def test_run_beside_other_users_of_the_gpu_is_not_kept(verdict: str) -> None:
    assert history.past(report(verdict=verdict, reason="GPU in use by ollama"), "") is None


def test_run_without_a_figure_is_not_kept() -> None:
    assert history.past(report(metrics={NAME: metric(NAME, [1.0])}), "") is None
    assert history.past(report(card=None, driver="", metrics={}, verdict="not run", reason="no driver"), "") is None


# What is compared with what.


@pytest.mark.parametrize(
    "other",
    [
        {"card": "10de:2231"},
        {"uuid": "GPU-other"},
        {"quick": True},
        {"unit": "TFLOP/s"},
        {"better": "lower"},
        {"figures": {}},
    ],
    ids=str,
)
def test_other_cards_units_and_kinds_of_run_are_another_series(other: dict[str, Any]) -> None:
    past = History([*runs(100.0, 100.0, 100.0, 100.0, 100.0, **other), *runs(388.0, 388.0, start=5)])

    assert [each.figures[NAME].median for each in past.before(run(9), NAME)] == [388.0, 388.0]
    assert baseline(past, run(9), NAME).runs == 2


def test_later_runs_are_not_before() -> None:
    past = History(runs(1.0, 2.0, 3.0, 4.0))

    assert [each.figures[NAME].median for each in past.before(run(2), NAME)] == [1.0, 2.0]


def test_baseline_is_learned_from_the_first_runs_and_stays() -> None:
    levels = [388.0, 389.0, 387.0, 388.5, 387.5]
    for number in range(LEARN):
        assert baseline(History(runs(*levels[:number])), run(number), NAME) == history.Baseline(number, None)

    learned = baseline(History(runs(*levels)), run(9), NAME)
    later = baseline(History(runs(*levels, *[300.0] * 20)), run(90), NAME)

    assert learned.bounds is not None and learned.bounds.low == pytest.approx(0.9 * 388.0)
    assert learned.bounds.high is None
    assert learned.bounds.source == "baseline of the first 5 runs under driver 580.95.05, median 388"
    assert later == learned, "slow decay must not move it"


def test_baseline_of_a_latency_bounds_it_from_above() -> None:
    past = History(runs(5.0, 5.0, 5.0, 5.0, 5.0, better="lower", unit="us"))

    bounds = baseline(past, run(9, 5.0, better="lower", unit="us"), NAME).bounds

    assert bounds is not None and (bounds.low, bounds.high) == (None, pytest.approx(5.5))


def test_baseline_of_runs_that_vary_is_wider() -> None:
    bounds = baseline(History(runs(100.0, 80.0, 120.0, 90.0, 110.0)), run(9), NAME).bounds

    assert bounds is not None and bounds.low == pytest.approx(100 - 3 * 1.4826 * 10)


def test_baseline_never_allows_less_than_nothing() -> None:
    bounds = baseline(History(runs(1.0, 100.0, 50.0, 1.0, 200.0)), run(9), NAME).bounds

    assert bounds is not None and bounds.low == 0.0


def test_baseline_is_one_drivers() -> None:
    past = History(runs(*noisy(388.0, 8)))

    assert baseline(past, run(9, driver="590.44.01"), NAME) == history.Baseline(0, None)


def test_recent_runs_are_summed_up_by_median_and_mad() -> None:
    levels = [300.0] * 5 + [386.0, 387.0, 388.0, 389.0, 390.0] * 2
    usual = recent(History(runs(*levels)), run(90, 389.0), NAME)
    slow = recent(History(runs(*levels)), run(90, 370.0), NAME)

    assert usual is not None and slow is not None
    assert (usual.median, usual.mad, usual.runs, usual.under) == (388.0, 1.0, 10, "driver 580.95.05")
    assert not usual.unusual and slow.unusual
    assert slow.relative == pytest.approx(-18 / 388)


def test_difference_within_the_noise_is_not_unusual() -> None:
    past = History(runs(388.0, 388.0, 388.0))

    within, beyond = recent(past, run(9, 391.5), NAME), recent(past, run(9, 392.5), NAME)

    assert within is not None and not within.unusual
    assert beyond is not None and beyond.unusual


def test_difference_that_the_runs_had_among_themselves_is_not_unusual() -> None:
    past = History(runs(380.0, 400.0, 370.0, 390.0, 410.0))

    within, beyond = recent(past, run(9, 350.0), NAME), recent(past, run(9, 345.0), NAME)

    assert within is not None and not within.unusual, "3 x 1.4826 x 10 is 44.5"
    assert beyond is not None and beyond.unusual


def test_first_runs_of_a_driver_are_compared_with_those_of_the_one_before() -> None:
    old = runs(388.0, 388.0, 388.0)
    past = History([*old, run(3, 350.0, driver="590.44.01")])

    found = recent(past, run(4, 350.0, driver="590.44.01"), NAME)

    assert found is not None and (found.under, found.unusual) == ("driver 580.95.05", True)


def test_few_runs_are_compared_with_nothing() -> None:
    assert recent(History(runs(388.0, 388.0)), run(9), NAME) is None


# Changes of level.


@pytest.mark.parametrize(
    ("keys", "cause"),
    [
        ({"driver": "590.44.01"}, "with driver 580.95.05 to 590.44.01"),
        ({"revision": "b6e1d02"}, "with configuration af62f38 to b6e1d02"),
        (
            {"driver": "590.44.01", "revision": "b6e1d02"},
            "with driver 580.95.05 to 590.44.01 and configuration af62f38 to b6e1d02",
        ),
        ({"revision": ""}, "with configuration af62f38 to unknown"),
        ({}, "versions and configuration as before"),
    ],
)
def test_change_of_level_is_told_with_what_came_with_it(keys: dict[str, str], cause: str) -> None:
    before, after = runs(*noisy(388.0, 15)), runs(*noisy(350.0, 4), start=15, **keys)

    found = shifts(History([*before, *after[:-1]]), after[-1], NAME)

    assert [shift.first for shift in found] == [after[0]]
    assert str(found[0]).endswith(cause)
    assert str(found[0]).startswith(f"-9.7 % since the run of {after[0].day} (388 to 350.5 GB/s), ")


def test_driver_that_changes_nothing_is_no_change() -> None:
    past = [*runs(*noisy(388.0, 15)), *runs(*noisy(388.0, 15, seed=2), start=15, driver="590.44.01")]

    assert shifts(History(past[:-1]), past[-1], NAME) == []


def test_noise_of_a_lab_over_a_year_raises_few_alarms() -> None:
    """A look after each run: what is beneath the declared noise is not spoken of, so the rate is far below ALPHA."""
    past = runs(*noisy(388.0, 120, seed=5))
    alarms = [number for number in range(10, 120) if shifts(History(past[:number]), past[number], NAME)]

    assert alarms == []


def test_first_run_has_no_change() -> None:
    assert shifts(History(), run(), NAME) == []

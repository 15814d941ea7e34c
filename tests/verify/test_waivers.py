# SPDX-License-Identifier: MIT
"""Waivers: what they cover and until when, and what becomes of a file that is wrong."""

from __future__ import annotations

import subprocess
import sys
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.verify.healthy import ROOT, Doctored, Verified, healthy, lab_file, verify
from verify import waivers
from verify.verdicts import FAILED, PASSED, Severity

TODAY = date.today()
LATER = TODAY + timedelta(days=30)
#: A failure that is major, and one that is minor.
LINK, PENDING = "nvidia.gpu.link", "vm.pending"


def waiver(id_: str = LINK, until: object = LATER, **keys: str) -> str:
    """One table of the file."""
    words = {
        "id": f'"{id_}"',
        "host": '"gpu01"',
        "reason": '"eight lanes; a new board is ordered"',
        "until": str(until),
    }
    return "[[waiver]]\n" + "".join(f"{key} = {value}\n" for key, value in {**words, **keys}.items())


def narrow() -> dict[str, Any]:
    """The healthy lab with a card in a slot of eight lanes."""
    observations = healthy()
    observations["nvidia"]["nvml"]["gpus"][0]["work"]["width"] = 8
    return observations


def run_with(folder: Path, text: str, *options: str, observations: dict[str, Any] | None = None) -> Verified:
    lab = lab_file(folder)
    (folder / "lab.waivers.toml").write_text(text)
    return verify(lab, *options, plugin=Doctored(observations or narrow()))


def test_waived_failure_is_shown_and_does_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_with(tmp_path, waiver())

    assert run.status == PASSED
    result = run.result(LINK)
    assert result["verdict"] == "waived"
    assert result["waiver"] == f"eight lanes; a new board is ordered, until {LATER}"
    assert "link of x8 under load, expected x16" in result["message"]
    assert (run.json["failed"], run.json["waived"]) == (0, 1)
    said = capsys.readouterr().out
    assert f"WAIVED {LINK} [major] gpu01 (eight lanes; a new board is ordered, until {LATER})" in said
    assert ", 1 waived in " in said
    assert f"waived (eight lanes; a new board is ordered, until {LATER})" in run.html


def test_waiver_holds_on_its_last_day(tmp_path: Path) -> None:
    assert run_with(tmp_path, waiver(until=TODAY)).status == PASSED


def test_expired_waiver_fails_itself_and_covers_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    yesterday = TODAY - timedelta(days=1)

    run = run_with(tmp_path, waiver(until=yesterday))

    assert run.status == FAILED
    assert run.ids("fail") == {LINK, f"waiver.{LINK}"}
    result = run.result(f"waiver.{LINK}")
    assert (result["severity"], result["host"]) == ("critical", "gpu01")
    assert result["message"] == (
        f"gpu01: the waiver of {LINK} ran out on {yesterday}: eight lanes; a new board is ordered"
    )
    assert str(tmp_path / "lab.waivers.toml") in result["fix"]
    assert f"FAIL waiver.{LINK} [critical] gpu01" in capsys.readouterr().out


def test_expired_waiver_of_a_minor_check_that_passes_fails_too(tmp_path: Path) -> None:
    run = run_with(tmp_path, waiver(PENDING, TODAY - timedelta(days=1)), observations=healthy())

    assert (run.status, run.ids("fail")) == (FAILED, {f"waiver.{PENDING}"})


def test_expired_waiver_does_not_bear_on_a_run_without_its_check(tmp_path: Path) -> None:
    assert run_with(tmp_path, waiver(until=TODAY - timedelta(days=1)), "-k", "vm.cores").status == PASSED


def test_waiver_is_for_its_own_host_and_check_alone(tmp_path: Path) -> None:
    observations = narrow()
    observations["vm"]["config"]["cores"] = 4

    run = run_with(tmp_path, waiver(), observations=observations)

    assert (run.status, run.ids("fail"), run.ids("waived")) == (FAILED, {"vm.cores"}, {LINK})


def test_waiver_covers_what_cannot_be_told(tmp_path: Path) -> None:
    observations = healthy()
    observations["nvidia"]["nvml"]["gpus"][0]["work"]["width"] = None

    run = run_with(tmp_path, waiver(), observations=observations)

    assert (run.status, run.ids("waived"), run.ids("inconclusive")) == (PASSED, {LINK}, set())


def test_waiver_covers_no_check_that_did_not_run(tmp_path: Path) -> None:
    observations = healthy()
    observations["nvidia"]["nvml"]["gpus"] = []

    run = run_with(tmp_path, waiver(), observations=observations)

    assert run.result(LINK)["verdict"] == "not run"


def test_waiver_covers_no_check_that_broke(tmp_path: Path) -> None:
    observations = healthy()
    del observations["nvidia"]["nvml"]["gpus"][0]["work"]["width"]

    run = run_with(tmp_path, waiver(), observations=observations)

    assert run.ids("fail") == {LINK}
    assert "the check itself broke" in run.result(LINK)["message"]


def test_waiver_of_a_check_that_passes_is_no_longer_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_with(tmp_path, waiver(), observations=healthy())

    assert run.status == PASSED
    told = f"{LINK} on gpu01: eight lanes; a new board is ordered, until {LATER}"
    assert run.json["needless_waivers"] == [told]
    assert f"no longer needed, its check passed: the waiver of {told}" in capsys.readouterr().out
    assert "A waiver is no longer needed" in run.html


def test_waived_failure_does_not_stop_a_run_that_stops_at_failures(tmp_path: Path) -> None:
    run = run_with(tmp_path, waiver(), "-x")

    assert (run.status, run.ids("not run")) == (PASSED, set())


def test_named_file_takes_the_place_of_the_one_beside_the_inventory(tmp_path: Path) -> None:
    other = tmp_path / "accepted.toml"
    other.write_text(waiver())

    run = run_with(tmp_path, "no toml", f"--waivers={other}")

    assert (run.status, run.ids("waived")) == (PASSED, {LINK})


def test_limited_run_knows_the_other_hosts_and_checks(tmp_path: Path) -> None:
    assert run_with(tmp_path, waiver(), "--limit", "pve1").status == PASSED
    assert run_with(tmp_path, waiver(), "-k", "hypervisor.iommu").status == PASSED


GOOD = waiver()
CHECKS = {
    ("gpu01", LINK): Severity.MAJOR,
    ("gpu01", "vm.running"): Severity.CRITICAL,
    ("pve1", "hypervisor.kernel"): Severity.MAJOR,
}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[waiver]\n", "lab.waivers.toml: Expected"),
        (GOOD.replace(str(LATER), "2027-13-01"), "lab.waivers.toml: Expected newline"),
        (
            GOOD.replace('reason = "eight lanes; a new board is ordered"\n', ""),
            f"waiver 1 ({LINK} on gpu01): reason: missing",
        ),
        (waiver(reason='" "'), "reason = ' ': expected some text"),
        (waiver(until='"2027-03-31"'), "until = '2027-03-31': expected a date without quotes, such as 2027-03-31"),
        (waiver(until="2027-03-31T10:00:00"), "expected a date without quotes"),
        (waiver(untill="2027-03-31"), "untill: unknown key; did you mean `until`?"),
        (GOOD.replace("[[waiver]]", "[waiver]"), "one table; expected [[waiver]]"),
        (GOOD.replace("[[waiver]]", "[[waivers]]"), "waivers: unknown; expected only [[waiver]] tables"),
        (GOOD + GOOD, f"{LINK} on gpu01: waived twice; expected one waiver"),
        (waiver(host='"gpu9"'), f"{LINK}: host gpu9 is not in the inventory, which has pve1, gpu01"),
        (waiver("nvidia.gpu.lnik"), f"nvidia.gpu.lnik: gpu01 has no such check; did you mean {LINK}?"),
        (waiver(host='"pve1"'), f"{LINK}: pve1 has no such check"),
        (waiver("vm.running"), "vm.running on gpu01: critical checks can't be waived"),
    ],
)
def test_wrong_file_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "lab.waivers.toml"
    path.write_text(text)

    with pytest.raises(waivers.WaiverError) as refused:
        waivers.check(path, waivers.load(path), ["pve1", "gpu01"], CHECKS)

    assert said in str(refused.value)
    assert str(path) in str(refused.value)


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "lab.waivers.toml"
    path.write_text(waiver(reason='""') + waiver(host='""'))

    with pytest.raises(waivers.WaiverError, match=r"has 2 errors; nothing was checked.\n  waiver 1 .*\n  waiver 2 "):
        waivers.load(path)


def refused(folder: Path, *options: str) -> str:
    """What a run says that is refused before it has asked any host."""
    command = [sys.executable, "-m", "pytest", "verify", "-p", "no:cacheprovider", f"--lab={lab_file(folder)}"]
    done = subprocess.run(
        [*command, f"--report={folder / 'report'}", *options], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 4
    assert "Traceback" not in done.stderr
    assert not (folder / "report").exists()
    return done.stderr


def test_run_with_a_waiver_of_an_unknown_check_asks_no_host(tmp_path: Path) -> None:
    (tmp_path / "lab.waivers.toml").write_text(waiver("nvidia.gpu.lnik"))

    said = refused(tmp_path)

    assert f"nvidia.gpu.lnik: gpu01 has no such check; did you mean {LINK}?" in said
    assert "hint: docs/verify.md" in said


def test_named_file_has_to_be_there(tmp_path: Path) -> None:
    said = refused(tmp_path, f"--waivers={tmp_path / 'none.toml'}")

    assert f"{tmp_path / 'none.toml'}: No such file or directory" in said

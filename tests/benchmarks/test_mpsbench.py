# SPDX-License-Identifier: MIT
"""Clients of a simulated MPS server: what is counted of them, and which figure sees what a server does wrong."""

from __future__ import annotations

import ast
import itertools
import json
import os
import pwd
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.conftest import Driver
from tests.unit.benchmark_reports import of_tier_1, report
from verify.benchmarks import gpubench, mpsbench, program
from verify.benchmarks.contract import Report
from verify.benchmarks.figures import shares
from verify.benchmarks.mpsbench import Client, Over, ask

USER = pwd.getpwuid(os.geteuid()).pw_name
#: With so little effort that a test is done in seconds. What NVML tells of card and processes is the test's.
TINY = """
import json, os, sys
from verify.benchmarks import mpsbench
mpsbench.SLICE_S, mpsbench.WINDOW_S, mpsbench.WARM_S, mpsbench.SETTLE_S = 0.0001, 0, 0, 0
mpsbench.device = lambda kind: {
    "device": kind,
    "card": {"name": "NVIDIA RTX A4000", "pci_id": "10de:24b0", "uuid": "GPU-1"},
    "driver": "580.95.05",
}
mpsbench.others = lambda containers: sorted(set(json.loads(os.environ.get("OTHERS", "[]"))) - set(containers))
sys.exit(mpsbench.main(sys.argv[1]))
"""
#: As the real one answers.
CONTROL = """#!/bin/sh
read question
test "$question" = get_default_active_thread_percentage || { echo "Unknown command \\"$question\\""; exit; }
test "$CUDA_MPS_PIPE_DIRECTORY" = /run/test-mps || { echo "Cannot find MPS control daemon process" >&2; exit 1; }
echo "${SIM_SERVER:-100}.0"
"""
#: One of the simulated cards has so many multiprocessors and MiB, and clients a limit of so many MiB.
SMS, MIB, LIMIT = 16, 64, 8


# What the figures are.


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([5.0, 5.0, 5.0, 5.0], 1.0),
        ([8.0, 0.0, 0.0, 0.0], 0.25),
        ([1.0, 2.0, 3.0], 36 / 42),
        ([3.0, 3.0, 0.0], 2 / 3),
        ([0.0, 0.0], 0.0),
    ],
)
def test_fairness_is_jains_index(rates: list[float], expected: float) -> None:
    assert mpsbench.jain(rates) == pytest.approx(expected)
    # How much there is to share does not matter.
    assert mpsbench.jain([rate * 7 for rate in rates]) == pytest.approx(expected)


def test_gain_is_a_multiple_of_one_alone() -> None:
    assert mpsbench.gain([3.0, 3.0], [4.0, 2.0]) == 2.0
    assert mpsbench.gain([1.0, 1.0, 1.0, 1.0], [4.0, 4.0, 4.0, 4.0]) == 1.0


def test_higher_clock_of_a_part_of_the_card_is_no_share_of_it() -> None:
    part = {"operations": 300, "seconds": 1.0, "sm_mhz": 1500}
    whole = {"operations": 800, "seconds": 1.0, "sm_mhz": 1000}
    unknown = {"operations": 800, "seconds": 2.0, "sm_mhz": None}

    assert mpsbench.per_clock([part, whole]) == [0.2, 0.8]
    assert mpsbench.per_clock([part, unknown]) == [300.0, 400.0]


@pytest.mark.parametrize(
    ("percent", "given", "highest", "highest_given", "expected"),
    [
        pytest.param(25, 12, 100, 48, 0.25, id="exact"),
        pytest.param(30, 14, 100, 48, 14 / 48, id="rounded down to whole ones"),
        pytest.param(33, 14, 100, 48, 14 / 48, id="rounded down to pairs"),
        pytest.param(30, 48, 100, 48, 0.3, id="ignored"),
        pytest.param(50, 6, 100, 48, 0.5, id="far too few"),
        pytest.param(40, 19, 80, 38, 0.5, id="of a server that gives 80"),
    ],
)
def test_share_is_of_the_multiprocessors_given(
    percent: float, given: int, highest: float, highest_given: int, expected: float
) -> None:
    assert mpsbench.entitled(percent, given, highest, highest_given) == expected


def test_nearness_is_that_of_the_worst() -> None:
    assert mpsbench.nearness([0.25, 0.5, 1.0], [0.25, 0.5, 1.0]) == 1.0
    assert mpsbench.nearness([0.35, 0.3, 1.0], [0.25, 0.5, 1.0]) == pytest.approx(0.8)
    assert mpsbench.nearness([2.5, 1.0], [0.25, 1.0]) == 0.0


def test_no_client_asks_for_more_than_the_server_gives() -> None:
    assert mpsbench.capped([25, 50, 75, 100], 100) == [25, 50, 75, 100]
    assert mpsbench.capped([100, 50, 75], 60) == [50, 60]
    assert mpsbench.capped([50], 50) == [50]


def test_small_clients_leave_room_for_each_other() -> None:
    assert [mpsbench.small(count) for count in (2, 8, 48, 132)] == [1, 1, 6, 16]
    assert all(4 * mpsbench.small(count) <= count for count in range(4, 200))


def test_tries_are_on_both_sides_of_the_limit() -> None:
    assert list(itertools.islice(mpsbench.tries(1024), 4)) == [(1025, False), (256, True)] * 2


# One client.


@pytest.fixture
def server(driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A simulated MPS server for the clients of this test; arguments of mpsbench for it."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    (binaries / mpsbench.CONTROL).write_text(CONTROL)
    (binaries / mpsbench.CONTROL).chmod(0o755)
    (tmp_path / "gpubench.py").write_text(program())
    simulation = driver.environment(SIM_MPS=tmp_path / "card", SIM_SMS=SMS, SIM_MIB=MIB)
    for key, value in {**simulation, "PATH": f"{binaries}:{os.environ['PATH']}"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(mpsbench, "SLICE_S", 0.0001)
    return {
        "program": str(tmp_path / "gpubench.py"),
        "folder": str(tmp_path),
        "pipe": "/run/test-mps",
        "user": USER,
        "clients": 2,
        "percentages": [25, 50, 75, 100],
        "limit_mib": LIMIT,
        "containers": [],
        "limit_s": 60.0,
    }


@pytest.mark.parametrize(
    ("threads", "gives", "count"), [(100, 100, 16), (50, 100, 8), (30, 100, 4), (1, 100, 1), (100, 60, 9), (50, 60, 8)]
)
def test_client_sees_its_multiprocessors(
    server: dict[str, Any], monkeypatch: pytest.MonkeyPatch, threads: int, gives: int, count: int
) -> None:
    monkeypatch.setenv("SIM_SERVER", str(gives))
    client = Client(server, threads)
    client.greet()

    assert client.multiprocessors == count
    assert client.end() == 0


def test_counted_is_what_ran_in_between(server: dict[str, Any], driver: Driver) -> None:
    client = Client(server, 100)
    client.greet()
    [started] = ask([client], "start", blocks=4, rounds=3)
    ask([client], "count")
    [counted] = ask([client], "halt")
    [ended] = ask([client], "stop")

    assert client.end() == 0
    assert started == {"rounds": 3}
    assert counted["operations"] == counted["slices"] * gpubench.fma_flop(3, 4) > 0
    # A quarter of the card's 1 GFLOP/s, and next to nothing for the bytes that are filled and checked.
    assert mpsbench.rate(counted) == pytest.approx(1e9 / 4, rel=5e-3)
    assert (counted["sm_mhz"], counted["wrong"], ended) == (1500, 0, {"wrong": 0, "others": []})
    assert driver.wrong_use() == []
    assert driver.left() == ""


def test_client_has_work_on_the_card_all_along(server: dict[str, Any], driver: Driver) -> None:
    """The next slice is queued before the last one is waited for: a gap would go to the other clients."""
    client = Client(server, 100)
    client.greet()
    ask([client], "start", blocks=1, rounds=1)
    ask([client], "count")
    ask([client], "halt")
    ask([client], "stop")
    client.end()

    ahead = 0
    calls = [call for call in driver.calls() if call in ("cuLaunchKernel", "cuEventSynchronize")]
    assert len(calls) >= 6
    for number, call in enumerate(calls):
        ahead += 1 if call == "cuLaunchKernel" else -1
        # At the end nothing is left to be queued.
        assert ahead >= 1 or number == len(calls) - 1


def test_client_over_its_limit_is_refused_and_goes_on(server: dict[str, Any]) -> None:
    client = Client(server, 100, LIMIT)
    client.greet()

    # 1 MiB is the simulated context's own.
    asked = [LIMIT, LIMIT - 1, LIMIT + 1, 1]
    assert [ask([client], "allocate", mib=mib)[0]["let_in"] for mib in asked] == [False, True, False, True]
    [started] = ask([client], "start", blocks=None, rounds=1)
    assert started == {"rounds": 1}
    assert client.end() == 0


def test_children_of_one_process_are_no_strangers(
    server: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    beside = subprocess.Popen(["sleep", "60"])
    shell = "sleep 60 & echo $!; wait"
    parent = subprocess.Popen(["sh", "-c", shell], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    stranger = int(parent.stdout.readline())
    try:
        (tmp_path / "processes").write_text(f"mps {beside.pid}\ncompute {stranger}\n")
        monkeypatch.setenv("SIM_PROCESSES", str(tmp_path / "processes"))
        client = Client(server, 100)
        client.greet()
        client.end()
    finally:
        os.kill(stranger, signal.SIGKILL)
        for process in (beside, parent):
            process.kill()
            process.wait()
        parent.stdout.close()

    assert client.others == [f"PID {stranger} sleep"]


def test_client_past_the_server_is_none(server: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SIM_MPS")
    client = Client(server, 100)

    with pytest.raises(Over, match=f"PID {client.process.pid} uses the card past MPS, whose daemon answers"):
        client.greet()
    client.end()


def test_driver_that_does_not_know_the_question_is_taken_at_its_word(
    server: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second attribute that is asked for is whether there is MPS."""
    monkeypatch.setenv("SIM_FAIL", "cuDeviceGetAttribute:2:1")
    client = Client(server, 100)
    client.greet()
    assert client.end() == 0


def test_error_of_the_driver_is_told_with_the_clients_last_word(
    server: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIM_FAIL", "cuEventElapsedTime:2:719")
    client = Client(server, 100)
    client.greet()

    with pytest.raises(Over, match=r"cuEventElapsedTime: CUDA_ERROR_LAUNCH_FAILED \(719\)"):
        ask([client], "start", blocks=None, rounds=1)
        ask([client], "count")
    with pytest.raises(Over, match=f"client PID {client.process.pid} ended with status 1 and without a word"):
        ask([client], "count")


def test_client_that_does_not_answer_is_ended(server: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIM_HANG", "cuEventSynchronize")
    monkeypatch.setattr(mpsbench, "REPLY_S", 0.2)
    monkeypatch.setattr(mpsbench, "END_S", 0.1)
    client = Client(server, 100)
    client.greet()

    with pytest.raises(Over, match=f"client PID {client.process.pid} did not answer within 0 s"):
        ask([client], "start", blocks=None, rounds=1)
    assert client.end() == -signal.SIGKILL


def test_client_leaves_the_card_although_it_hangs(server: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody is left to end it."""
    monkeypatch.setenv("SIM_HANG", "cuEventSynchronize")
    text = Path(server["program"]).read_text()
    Path(server["program"]).write_text(text.replace("ENDED_S = 5.0", "ENDED_S = 0.1"))
    monkeypatch.setattr(mpsbench, "END_S", 60.0)
    client = Client(server, 100)
    client.greet()
    client.tell("start", blocks=None, rounds=1)

    assert client.end() == gpubench.EXIT["failed"]


# A run.


def start(arguments: dict[str, Any], **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", TINY, json.dumps(arguments)],
        env={**os.environ, **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ran(arguments: dict[str, Any], **more: str) -> dict[str, Any]:
    with start(arguments, **more) as process:
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    found: dict[str, Any] = json.loads(output)
    return found


def medians(result: dict[str, Any]) -> dict[str, float]:
    return {name: sorted(metric["samples"])[3] for name, metric in result["metrics"].items()}


#: The bytes that are filled before each launch, and checked after, take a moment, too.
NEAR = 0.01
KEPT = {"mps.gain": 2.0, "mps.fairness": 1.0, "mps.share": 1.0, "mps.limit": 0.0}


def test_run_has_the_simulated_servers_figures(server: dict[str, Any], driver: Driver) -> None:
    result = ran(server)

    assert (result["verdict"], result["reason"], result["not_run"]) == ("measured", "", {})
    assert medians(result) == pytest.approx(KEPT, abs=NEAR)
    assert all(len(metric["samples"]) == mpsbench.LEAST for metric in result["metrics"].values())
    assert all(metric["checked"] and metric["wrong"] == 0 for metric in result["metrics"].values())
    assert result["setting"] == "2 clients; 25/50/75/100 % of the threads; limit 8 MiB"
    assert dict(result["series"]["mps.share"]) == pytest.approx({25: 0.25, 50: 0.5, 75: 0.75, 100: 1.0}, abs=NEAR)
    assert dict(result["series"]["mps.together"]) == pytest.approx({1: 0.5, 2: 0.5}, abs=NEAR)
    assert driver.wrong_use() == []


def test_four_clients_share_a_card_whose_parts_are_no_whole_numbers(server: dict[str, Any]) -> None:
    """Of 10 multiprocessors 25 % are 2 and 75 % are 7: the figures are of those, not of what was asked for."""
    result = ran({**server, "clients": 4}, SIM_SMS="10")

    assert medians(result) == pytest.approx({**KEPT, "mps.gain": 4.0}, abs=NEAR)
    assert dict(result["series"]["mps.share"]) == pytest.approx({25: 0.2, 50: 0.5, 75: 0.7, 100: 1.0}, abs=NEAR)
    assert "mps.share: multiprocessors given, 25 %: 2, 50 %: 5, 75 %: 7, 100 %: 10" in result["notes"]


def test_server_that_gives_less_is_measured_by_what_it_gives(server: dict[str, Any]) -> None:
    result = ran(server, SIM_SERVER="50")

    assert medians(result) == pytest.approx(KEPT, abs=NEAR)
    assert dict(result["series"]["mps.share"]) == pytest.approx({25: 0.5, 50: 1.0}, abs=NEAR)


@pytest.mark.parametrize(
    ("broken", "metric", "figure"),
    [
        pytest.param("turns", "mps.gain", 1.0, id="clients take turns"),
        pytest.param("unfair", "mps.fairness", 1.05**2 / (2 * (1 + 0.05**2)), id="one client gets nearly all"),
        pytest.param("threads", "mps.share", 0.25, id="a share of the threads is ignored"),
        pytest.param("loose", "mps.share", 0.25, id="a share is told and not kept"),
        pytest.param("memory", "mps.limit", 1.0, id="a limit of memory is ignored"),
        pytest.param("fragile", "mps.limit", 1.0, id="who is refused takes the others along"),
    ],
)
def test_what_a_server_does_wrong_is_seen_by_its_figure_alone(
    server: dict[str, Any], broken: str, metric: str, figure: float
) -> None:
    result = ran(server, SIM_BROKEN=broken)

    assert result["verdict"] == "measured"
    assert medians(result) == pytest.approx({**KEPT, metric: figure}, abs=NEAR)


def test_limit_that_is_ignored_is_one_error_for_each_such_try(server: dict[str, Any]) -> None:
    result = ran(server, SIM_BROKEN="memory")

    assert result["metrics"]["mps.limit"]["samples"] == [1.0, 0.0] * 3
    assert "mps.limit: 9 MiB let in at a limit of 8 MiB" in result["notes"]


def test_client_that_a_refusal_took_along_is_told(server: dict[str, Any]) -> None:
    result = ran(server, SIM_BROKEN="fragile")

    assert result["metrics"]["mps.limit"]["samples"] == [1.0] * 6
    [note] = [note for note in result["notes"] if note.startswith("mps.limit")]
    assert re.match(r"mps.limit: 9 MiB asked for at a limit of 8 MiB, and after that: .*\(719\)", note)


def test_refusal_that_would_show_nothing_is_not_counted(server: dict[str, Any]) -> None:
    result = ran(server, SIM_MIB=str(LIMIT))

    assert "mps.limit" not in result["metrics"]
    assert result["not_run"] == {
        "mps.limit": "9 MiB can't be had without the limit either, so a refusal would show nothing"
    }


def test_wrong_results_end_the_run(server: dict[str, Any]) -> None:
    result = ran(server, SIM_WRONG="fp32_fma")

    wrong = result["metrics"]["mps.gain"]["wrong"]
    assert wrong > 0
    assert (result["verdict"], result["reason"]) == ("failed", f"mps.gain: {wrong} words wrong")
    assert set(result["not_run"]) == {"mps.fairness", "mps.share", "mps.limit"}


@pytest.mark.parametrize(
    ("simulation", "arguments", "verdict", "reason"),
    [
        ({"LD_LIBRARY_PATH": "/none"}, {}, "not run", "no CUDA driver"),
        ({"SIM_SERIAL": "simulated"}, {}, "not run", "no CUDA driver: this card is simulated"),
        (
            {},
            {"pipe": "/run/elsewhere"},
            "not run",
            "no MPS daemon: nvidia-cuda-mps-control says 'Cannot find MPS control daemon process'",
        ),
        ({"PATH": "/none"}, {}, "not run", "no MPS daemon: [Errno 2] No such file or directory: "),
        (
            {"OTHERS": '["PID 7 python", "milvus"]'},
            {"containers": ["milvus"]},
            "inconclusive",
            "GPU in use by PID 7 py",
        ),
    ],
)
def test_nothing_to_measure_is_told_at_once(
    server: dict[str, Any],
    driver: Driver,
    simulation: dict[str, str],
    arguments: dict[str, Any],
    verdict: str,
    reason: str,
) -> None:
    result = ran({**server, **arguments}, **simulation)

    assert result["verdict"] == verdict
    assert result["reason"].startswith(reason)
    assert result["metrics"] == {}
    assert set(result["not_run"]) == set(mpsbench.METRICS)
    assert "cuInit" not in driver.calls()


def test_services_that_may_be_there_are_no_strangers(server: dict[str, Any]) -> None:
    assert ran({**server, "containers": ["milvus"]}, OTHERS='["milvus"]')["verdict"] == "measured"


def test_who_comes_during_the_run_ends_it(server: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "processes"
    # On the card before, and for mpsbench.others() to judge.
    file.write_text("compute 1\n")
    with start(server, SIM_PROCESSES=str(file)) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        file.write_text("compute 1\ncompute 4194999\n")
        output, _ = process.communicate(timeout=60)
    result = json.loads(output)

    assert first.startswith("mps.gain: ")
    assert result["verdict"] == "inconclusive"
    assert result["reason"] == "GPU in use by PID 4194999 (not visible here), who came during the run"
    assert "mps.gain" in result["metrics"] and "mps.limit" in result["not_run"]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pids: list[int]) -> bool:
    def alive(pid: int) -> bool:
        with_state = Path(f"/proc/{pid}/stat")
        try:
            return with_state.read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    end = time.monotonic() + 30
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(alive, pids))


@pytest.fixture
def working(server: dict[str, Any]) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A run in the middle, and its clients."""
    with start({**server, "limit_s": 600.0}) as process:
        assert process.stderr is not None
        process.stderr.readline()
        clients: list[int] = []
        while len(clients) < 2 and process.poll() is None:
            clients = children(process.pid)
        yield process, clients
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_stopped_run_ends_its_clients_and_tells_what_it_has(
    working: tuple[subprocess.Popen[str], list[int]], number: signal.Signals
) -> None:
    process, clients = working
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    result = json.loads(output)

    assert (process.returncode, result["verdict"]) == (0, "inconclusive")
    assert result["reason"] == f"stopped by {number.name}"
    assert "mps.gain" in result["metrics"]
    assert len(clients) == 2 and gone(clients)


def test_clients_end_with_a_run_that_is_killed(
    working: tuple[subprocess.Popen[str], list[int]], driver: Driver
) -> None:
    process, clients = working
    process.kill()
    process.wait()

    assert len(clients) == 2 and gone(clients)
    # And free what they had.
    assert driver.left() == ""


def test_time_that_is_up_is_told(server: dict[str, Any]) -> None:
    result = ran({**server, "limit_s": 0.0})

    assert all(len(metric["samples"]) == 1 for metric in result["metrics"].values())
    assert "mps.gain: 1 samples instead of 6: the time was up" in result["notes"]


# The text that goes to the guest.


def test_texts_that_go_together_have_no_name_twice() -> None:
    """The modules that it imports are put in front of it: a name of one must not be another's."""
    folder = Path(mpsbench.__file__).parent
    names: Counter[str] = Counter()
    for path in (folder / "host.py", folder / "intervals.py", Path(mpsbench.__file__)):
        tree = ast.parse(path.read_text(), feature_version=(3, 10))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names[node.name] += 1
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names.update({each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)})
    assert [name for name, count in names.items() if count > 1] == []


# The drawing.


def shared(**series: list[tuple[float, float]]) -> Report:
    points = {name.replace("_", "."): each for name, each in series.items()}
    return report(**of_tier_1("mps", {"mps.gain": 2.0}, series=points))


def test_drawing_has_the_shares_the_diagonal_and_the_clients() -> None:
    alone, together = shares(
        shared(mps_share=[(25.0, 0.24), (50.0, 0.5), (100.0, 1.0)], mps_together=[(1.0, 0.7), (2.0, 0.3)])
    )

    assert (alone.title, together.title) == ("MPS shares", "MPS clients together")
    assert "25 % of the threads 24.0 %, 50 % of the threads 50.0 %, 100 % of the threads 100.0 %" in alone.svg
    [diagonal] = re.findall(r'<line class="bound" ([^>]*)>', alone.svg)
    [axis] = re.findall(r'<line class="axis" ([^>]*)>', alone.svg)
    left, right, bottom = (re.search(rf'{key}="([\d.]+)"', axis)[1] for key in ("x1", "x2", "y1"))  # type: ignore[index]
    assert diagonal == f'x1="{left}" y1="{bottom}" x2="{right}" y2="6.0"'
    assert "client 1 70.0 %; client 2 30.0 %" in together.svg
    assert len(re.findall('class="mark"', together.svg)) == 2


def test_nothing_measured_is_nothing_drawn() -> None:
    assert shares(shared()) == []

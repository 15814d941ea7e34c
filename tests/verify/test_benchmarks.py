# SPDX-License-Identifier: MIT
"""The GPU benchmarks as a part of verify: what becomes of a run of gpubench, and of the lab's history."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import inventory
from inventory import Lab
from tests.verify.healthy import GUEST, Doctored, Verified, benchmarks, healthy, lab_file, unmeasured, verify
from verify import conftest, readers
from verify.benchmarks import history
from verify.benchmarks.contract import TOOLS
from verify.benchmarks.gpubench import parser
from verify.hosts import Unreadable
from verify.observations import Observations
from verify.readers import Readers
from verify.verdicts import FAILED, INCOMPLETE, PASSED

IDS = {"benchmarks.gpu.answers", *(f"benchmarks.gpu.{name}" for name in TOOLS["gpubench"])}

#: Lines of the history of a lab that was measured five times, once a program.
KEPT = 5 * len(TOOLS)


def run(lab: Path, found: Any, *options: str) -> Verified:
    """Verify a healthy lab on whose guest gpubench found that."""
    return verify(lab, "--quick", *options, plugin=Doctored({**healthy(), "gpubench": found}))


def kept(lab: Path) -> list[str]:
    return (lab.parent / "state/benchmarks/pve1/gpu01.jsonl").read_text().splitlines()


def of_benchmarks(run: Verified) -> list[dict[str, Any]]:
    return [result for result in run.results if result["subject"] == "benchmarks"]


def test_card_in_use_is_inconclusive_and_says_what_to_do(tmp_path: Path) -> None:
    lab = lab_file(tmp_path)

    busy = run(lab, unmeasured("inconclusive", "GPU in use by PID 812 milvus"))

    assert busy.status == FAILED
    assert busy.ids("inconclusive") == IDS and not busy.ids("fail", "not run")
    assert {result["message"] for result in of_benchmarks(busy)} == {
        "GPU in use by PID 812 milvus; hint: --drain stops the services of gpu01 meanwhile"
    }
    assert len(kept(lab)) == KEPT


def test_what_was_drained_in_vain_is_not_to_be_drained(tmp_path: Path) -> None:
    found = unmeasured("inconclusive", "GPU in use by PID 9 python")
    found["notes"] = ["stopped for this run, and back: gpulab-heal.timer, ollama, milvus"]

    busy = run(lab_file(tmp_path), found)

    assert {result["message"] for result in of_benchmarks(busy)} == {"GPU in use by PID 9 python"}


def test_who_comes_later_spoils_what_was_measured(tmp_path: Path) -> None:
    lab, found = lab_file(tmp_path), benchmarks(2e9)
    found |= {"verdict": "inconclusive", "reason": "GPU in use by PID 9 python"}
    found["not_run"] = {"launch.latency": found["reason"]}
    del found["metrics"]["launch.latency"]

    late = run(lab, found)

    # Its memory kept what was written, whoever looked on.
    assert late.ids("inconclusive") == IDS - {"benchmarks.gpu.memory.pattern"}
    assert "391 GB/s" in late.result("benchmarks.gpu.memory.copy")["message"]
    assert len(kept(lab)) == KEPT


def test_wrong_results_fail_in_the_figure_that_has_them(tmp_path: Path) -> None:
    found = benchmarks(2e9)
    found |= {"verdict": "failed", "reason": "tensor.bf16: 3 words wrong"}
    found["metrics"]["tensor.bf16"]["wrong"] = 3

    wrong = run(lab_file(tmp_path), found)

    assert wrong.ids("fail") == {"benchmarks.gpu.tensor.bf16"}
    message = wrong.result("benchmarks.gpu.tensor.bf16")["message"]
    assert message == "gpu01: 3 values of its output are wrong, so its figure says nothing"


def test_guest_without_a_driver_is_not_run(tmp_path: Path) -> None:
    none = run(lab_file(tmp_path), unmeasured("not run", "no CUDA driver: libcuda.so.1 is not there"))

    assert (none.status, none.ids("not run")) == (INCOMPLETE, IDS)
    assert {each["message"] for each in of_benchmarks(none)} == {"no CUDA driver: libcuda.so.1 is not there"}


def test_simulated_lab_expects_it_and_lists_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guest = {"simulated": "rehearsal", "expected_not_run": ["benchmarks.gpu.*"]}
    reason = "no CUDA driver: this card is simulated"

    rehearsed = run(lab_file(tmp_path, guest=guest), unmeasured("not run", reason))

    assert (rehearsed.status, rehearsed.json["not_run"]) == (PASSED, len(IDS))
    assert set(rehearsed.json["expected_not_run"]) == IDS
    assert f"expected not to run on gpu01: {reason}\n    benchmarks.gpu.answers, " in capsys.readouterr().out


def test_pattern_excuses_no_other_check(tmp_path: Path) -> None:
    guest = {"simulated": "rehearsal", "expected_not_run": ["benchmarks.gpu.tensor.*"]}

    rehearsed = run(lab_file(tmp_path, guest=guest), unmeasured("not run", "no CUDA driver"))

    assert rehearsed.status == INCOMPLETE
    assert len(rehearsed.json["expected_not_run"]) == 4


def test_card_without_a_history_learns(tmp_path: Path) -> None:
    lab = lab_file(tmp_path)
    (tmp_path / "state/benchmarks/pve1/gpu01.jsonl").unlink()

    first = run(lab, benchmarks(1.9e9))

    assert first.status == PASSED
    assert "learning a baseline, run 1 of 5" in first.result("benchmarks.gpu.tensor.fp16")["message"]
    second = run(lab, benchmarks(1.9e9 + 3600))
    assert "learning a baseline, run 2 of 5" in second.result("benchmarks.gpu.tensor.fp16")["message"]


@pytest.mark.parametrize("options", [[], ["--limit", "gpu01"], ["-k", "tensor"], ["-x"]])
def test_measured_run_is_kept_once(tmp_path: Path, options: list[str]) -> None:
    lab = lab_file(tmp_path)

    run(lab, benchmarks(2e9), *options)

    assert len(kept(lab)) == KEPT + 1
    last = json.loads(kept(lab)[-1])
    assert (last["began"], last["quick"], set(last["figures"])) == (
        2e9,
        True,
        TOOLS["gpubench"].keys() - {"memory.pattern"},
    )


def test_history_that_cannot_be_written_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lab = lab_file(tmp_path)
    path = tmp_path / "state/benchmarks/pve1/gpu01.jsonl"
    path.unlink()
    path.mkdir()

    assert run(lab, benchmarks(2e9)).status == PASSED
    assert f"{path}: Is a directory: these benchmarks are not kept" in capsys.readouterr().out


def test_torn_line_of_the_history_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lab = lab_file(tmp_path)
    with open(tmp_path / "state/benchmarks/pve1/gpu01.jsonl", "a") as file:
        file.write('{"schema": 1, "to')

    run(lab, benchmarks(2e9))

    assert f"gpu01.jsonl, line {KEPT + 1}: left out (not a whole line of JSON)" in capsys.readouterr().out


def test_what_is_no_report_is_inconclusive(tmp_path: Path) -> None:
    lab = lab_file(tmp_path)

    odd = run(lab, {**benchmarks(2e9), "verdict": "fine"})

    assert odd.ids("inconclusive") == IDS
    assert "gpubench printed what is no report of it: verdict: expected" in of_benchmarks(odd)[0]["message"]
    assert len(kept(lab)) == KEPT


def test_benchmarks_can_be_left_out(tmp_path: Path) -> None:
    without = run(lab_file(tmp_path), AssertionError("read"), "--benchmarks", "off")

    assert without.status == PASSED
    assert of_benchmarks(without) == []
    # As without the option: a run of everything that verify asks by itself.
    assert without.json["selection"] == ""


def test_terminal_says_that_it_takes_a_while(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*options: str) -> str:
        slow = Slow()
        verify(lab_file(tmp_path), "-k", "benchmarks", *options, plugin=slow)
        return capsys.readouterr().out

    assert said("--quick").count("gpu01: benchmarks, quick, about 20 s\n") == 1
    assert said("--benchmarks", "full").count("gpu01: benchmarks, full, about 120 s\n") == 1
    assert said("--benchmarks", "full", "--quick").count("gpu01: benchmarks, quick, about 20 s\n") == 1


class Telling(Doctored):
    """Says how far the benchmarks are, and goes on when that was printed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
        super().__init__(healthy())
        self.lines, self.printed, self.waited = lines, threading.Event(), True
        say_now = conftest.say_now

        def say(config: pytest.Config, line: str) -> None:
            say_now(config, line)
            if line.endswith("last"):
                self.printed.set()

        monkeypatch.setattr(conftest, "say_now", say)

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        super().pytest_configure(config)
        self.progress = config.stash[conftest.PROGRESS]

    def read(self, host: str, subject: str) -> dict[str, Any]:
        if subject == "gpubench":
            for line in self.lines:
                self.progress.put(f"{host}: {line}")
            self.waited = self.printed.wait(30)
        return super().read(host, subject)


@pytest.mark.parametrize("options", [[], ["-x"], ["-v"], ["-s"]], ids=" ".join)
def test_terminal_says_how_far_it_is_while_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    telling = Telling(monkeypatch, "memory.copy: 391 GB/s", "odd \x1b[2J", "last")

    run = verify(lab_file(tmp_path), *options, plugin=telling)

    assert telling.waited and run.status == PASSED
    said = capsys.readouterr().out.splitlines()
    first = said.index("gpu01: memory.copy: 391 GB/s")
    assert said[first : first + 3] == ["gpu01: memory.copy: 391 GB/s", "gpu01: odd \ufffd[2J", "gpu01: last"]


def test_no_progress_is_printed_of_a_run_without_benchmarks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verify(lab_file(tmp_path), "--benchmarks", "off", plugin=Telling(monkeypatch, "last"))

    said = capsys.readouterr().out
    assert "gpu01: last" not in said and "gpu01: benchmarks" not in said


class Slow(Doctored):
    """Answers for the benchmarks a moment after the first check asks."""

    def __init__(self) -> None:
        super().__init__(healthy())

    def read(self, host: str, subject: str) -> dict[str, Any]:
        threading.Event().wait(0.5)
        return super().read(host, subject)


def test_run_that_was_stopped_begins_no_benchmarks() -> None:
    """They would take minutes for nobody."""
    begun, goes_on, asked = threading.Event(), threading.Event(), []

    def read(host: str, subject: str) -> dict[str, Any]:
        asked.append(subject)
        begun.set()
        goes_on.wait(5)
        return {}

    observations = Observations(read)
    observations.start([("gpu01", "nvidia"), ("gpu01", "gpubench")])
    begun.wait(5)
    closing = threading.Thread(target=observations.close)
    closing.start()
    while not observations._closed.is_set():
        pass
    goes_on.set()
    closing.join(5)

    assert asked == ["nvidia"]


# How it is read.


class Guestlike:
    """A guest's connection: answers in turn, and remembers what it was asked."""

    def __init__(self, *answers: tuple[int, str, str]) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[list[str], bytes, float]] = []
        self.sent: list[tuple[str, bytes]] = []
        self.told: list[str] = []

    def run(
        self,
        what: str,
        command: list[str],
        stdin: bytes,
        limit_s: float,
        tell: Callable[[str], None] = lambda line: None,
    ) -> tuple[int, str, str]:
        assert what == "benchmarks of gpu01"
        self.asked.append((command, stdin, limit_s))
        for line in self.answers[0][2].splitlines():
            tell(line)
        return self.answers.pop(0)

    def send(self, name: str, text: bytes) -> str:
        self.sent.append((name, text))
        return "/tmp/there"

    @property
    def machine(self) -> Any:
        return type("Machine", (), {"name": "gpu01"})


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    def read(guest: Guestlike, effort: str = "quick", drain: bool = False, **keys: Any) -> dict[str, Any]:
        lab = inventory.load(lab_file(tmp_path, guest=keys))
        made = Readers(lab, effort, drain, lambda host, line: guest.told.append(f"{host}: {line}"))
        monkeypatch.setattr(made, "_connection", lambda host: guest)
        return made.read("gpu01", "gpubench")

    return read


def answered(found: dict[str, Any], status: int = 0) -> tuple[int, str, str]:
    return status, json.dumps(found) + "\n", "memory.copy: 391 GB/s\n"


MPS = ["--user", "gpulab-gpu", "--mps-pipe", "/run/nvidia-mps"]
BUSY = answered(unmeasured("inconclusive", "GPU in use by PID 812 milvus"), 3)


def test_program_goes_over_stdin_to_a_client_of_mps(reader: Callable[..., dict[str, Any]]) -> None:
    guest, found = Guestlike(answered(benchmarks(2e9))), benchmarks(2e9)

    assert reader(guest) == found

    ((command, stdin, limit_s),) = guest.asked
    assert command == ["python3", "-I", "-", "--quick", *MPS]
    assert b"PTX = {" in stdin and b"def main(" in stdin
    assert limit_s >= 17 + 30


def test_full_run_without_mps(reader: Callable[..., dict[str, Any]]) -> None:
    guest = Guestlike(answered(benchmarks(2e9)))

    reader(guest, "full", nvidia={**GUEST["nvidia"], "sharing": "time-slice"})

    assert guest.asked[0][0] == ["python3", "-I", "-"]
    assert guest.asked[0][2] >= 110 + 30


def test_card_in_use_is_left_alone(reader: Callable[..., dict[str, Any]]) -> None:
    guest = Guestlike(BUSY)

    assert reader(guest)["verdict"] == "inconclusive"
    assert guest.sent == []


def test_drain_stops_what_this_guest_declares_and_only_where_the_card_is_in_use(
    reader: Callable[..., dict[str, Any]],
) -> None:
    idle = Guestlike(answered(benchmarks(2e9)))
    assert reader(idle, drain=True)["verdict"] == "measured"
    assert len(idle.asked) == 1

    guest = Guestlike(BUSY, answered(benchmarks(2e9)), (0, "", ""))
    assert reader(guest, drain=True)["verdict"] == "measured"

    assert guest.sent[0][0] == "gpubench.py" and guest.sent[0][1] == guest.asked[0][1]
    command = guest.asked[1][0]
    assert command[:3] == ["python3", "-I", "/tmp/there/gpubench.py"]
    told = parser().parse_args(command[3:])
    assert (told.drain, told.quick, told.user) == (True, True, "gpulab-gpu")
    assert (told.unit, told.container) == (["gpulab-heal.timer"], ["ollama", "milvus"])
    assert guest.asked[2][0] == ["rm", "-r", "/tmp/there"]
    measured = "gpu01: memory.copy: 391 GB/s"
    assert guest.told == [
        measured,
        "gpu01: services are stopped for the benchmarks, and started again after them",
        measured,
    ]


def test_full_run_waits_for_what_it_started_again(reader: Callable[..., dict[str, Any]]) -> None:
    guest = Guestlike(BUSY, answered(benchmarks(2e9)), (0, "", ""), (0, "", ""), (124, "", ""))

    # Who does not come back is told by the checks of that service.
    assert reader(guest, effort="full", drain=True)["verdict"] == "measured"

    waits = [command for command, *_ in guest.asked if command[0] == "timeout"]
    assert [command[-2:] for command in waits] == [["docker", "ollama"], ["docker", "milvus"]]
    # Seconds, as the inventory has them.
    assert [command[1] for command in waits] == ["180", "240"]


def test_wait_ends_when_the_container_is_healthy(tmp_path: Path) -> None:
    """The shell is real, the engine is a script: starting, then healthy."""
    engine = tmp_path / "docker"
    engine.write_text(
        f"#!/bin/sh\n[ \"$4 $3\" = 'milvus {{{{.State.Health.Status}}}}' ] || exit 1\n"
        f"echo again >> {tmp_path}/asked; [ $(wc -l < {tmp_path}/asked) -lt 2 ] && echo starting || echo healthy\n"
    )
    engine.chmod(0o755)

    done = subprocess.run(["timeout", "30", "sh", "-c", readers.HEALTHY, str(engine), "milvus"], check=False)

    assert done.returncode == 0
    assert (tmp_path / "asked").read_text() == "again\nagain\n"


@pytest.mark.parametrize("reason", ["stopped by SIGTERM", "not known whether the GPU is in use: libnvidia-ml.so.1"])
def test_nothing_is_stopped_for_another_reason(reader: Callable[..., dict[str, Any]], reason: str) -> None:
    guest = Guestlike(answered(unmeasured("inconclusive", reason), 3))

    assert reader(guest, drain=True)["reason"] == reason
    assert guest.sent == []


def test_services_of_podman_are_units(reader: Callable[..., dict[str, Any]]) -> None:
    services = {
        "milvus": {key: GUEST["services"]["milvus"][key] for key in ("image", "memory_budget_mib", "pool_init_mib")}
    }
    guest = Guestlike(BUSY, answered(unmeasured("failed", "not all that was stopped is back"), 1))

    found = reader(guest, drain=True, engine={"kind": "podman"}, services=services, healing=None, tenants=[])

    assert parser().parse_args(guest.asked[1][0][3:]).unit == ["milvus.service"]
    # systemd needs the program to start what is not back.
    assert found["verdict"] == "failed" and len(guest.asked) == 2


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((127, "", "python3: not found\n"), "ended with exit status 127: python3: not found"),
        ((1, "", ""), "ended with exit status 1: no word"),
        ((0, "[1", "odd\n"), "ended with exit status 0: odd"),
    ],
)
def test_run_that_prints_no_result_is_unreadable(
    reader: Callable[..., dict[str, Any]], answer: tuple[int, str, str], said: str
) -> None:
    with pytest.raises(Unreadable, match=f"the benchmarks of gpu01 {said}"):
        reader(Guestlike(answer))


def test_benchmarks_come_after_all_other_reads_of_their_guest(tmp_path: Path) -> None:
    lab: Lab = inventory.load(lab_file(tmp_path))

    # The card first: what runs on it warms it up, and a service that was stopped for it is back then.
    measuring = ("gpubench", "mpsbench", "torchbench", "ollamabench", "milvusbench")
    assert readers.SUBJECTS[-len(measuring) :] == measuring
    assert {Readers(lab).lane("gpu01", subject) for subject in ("nvidia", "ollama_load", *measuring)} == {"gpu01"}


def test_cards_of_a_node_are_measured_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Readers(inventory.load(lab_file(tmp_path)))
    under_way, most, lock = [0], [0], threading.Lock()

    class Counting(Guestlike):
        def run(self, *_: Any) -> tuple[int, str, str]:
            with lock:
                under_way[0] += 1
                most[0] = max(most[0], under_way[0])
            threading.Event().wait(0.05)
            with lock:
                under_way[0] -= 1
            return answered(benchmarks(2e9))

    monkeypatch.setattr(made, "_connection", lambda host: Counting())
    threads = [threading.Thread(target=made.read, args=("gpu01", "gpubench")) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert most == [1]


def test_history_lies_with_the_labs_state(tmp_path: Path) -> None:
    lab = inventory.load(lab_file(tmp_path))

    assert history.file_of(lab, lab.guests["gpu01"]) == tmp_path / "state/benchmarks/pve1/gpu01.jsonl"

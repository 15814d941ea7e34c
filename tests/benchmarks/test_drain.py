# SPDX-License-Identifier: MIT
"""What --drain stops and starts, with stand-ins for systemctl and docker. The real systemd: tests/lab/test_drain.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from verify.benchmarks import gpubench

#: A file below `services` holds `active` or `inactive`; `broken` below it makes every start of that name fail.
SYSTEMCTL = r"""#!/bin/sh
echo "systemctl $*" >> "$WORLD/calls"
for name; do :; done
case "$1" in
show) test -e "$WORLD/$name" || { echo not-found; echo inactive; exit; }
      case "$*" in *LoadState*) echo loaded;; esac
      cat "$WORLD/$name";;
stop) echo inactive > "$WORLD/$name";;
start) test ! -e "$WORLD/broken-$name" || { echo "Job for $name failed." >&2; exit 1; }; echo active > "$WORLD/$name";;
esac
"""
DOCKER = """#!/bin/sh
echo "docker $*" >> "$WORLD/calls"
for name; do :; done
test -e "$WORLD/$name" || { echo "Error: No such container: $name" >&2; exit 1; }
case "$1" in
inspect) if grep -qx active "$WORLD/$name"; then echo true; else echo false; fi;;
stop) echo inactive > "$WORLD/$name";;
start) test ! -e "$WORLD/broken-$name" || { echo "could not select device driver" >&2; exit 1; }
       echo active > "$WORLD/$name";;
esac
"""
TIMER = "gpulab-heal.timer"
OURS = (["milvus", "ollama"], [TIMER])


class World:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "kept/drained.json"
        for name, text in (("systemctl", SYSTEMCTL), ("docker", DOCKER)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        for name in (*OURS[0], *OURS[1]):
            self.put(name, "active")

    def put(self, name: str, what: str) -> None:
        (self.folder / name).write_text(f"{what}\n")

    def active(self) -> list[str]:
        return [name for name in (*OURS[0], *OURS[1]) if (self.folder / name).read_text() == "active\n"]

    def changes(self) -> list[str]:
        calls = (self.folder / "calls").read_text().splitlines()
        return [call for call in calls if call.split()[1] in ("start", "stop")]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("WORLD", str(tmp_path))
    return World(tmp_path)


def test_timer_goes_first_and_comes_last(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    gpubench.stop_services(world.state, *OURS)
    assert world.active() == []
    gpubench.start_services(world.state)

    assert world.active() == ["milvus", "ollama", TIMER]
    assert world.changes() == [
        f"systemctl stop {TIMER}",
        "docker stop -t 60 milvus",
        "docker stop -t 60 ollama",
        "docker start milvus",
        "docker start ollama",
        f"systemctl start {TIMER}",
    ]
    assert not world.state.exists()
    # Each takes up to a minute.
    words = [f"stopping {TIMER}", "stopping milvus", "stopping ollama"]
    words += ["starting milvus", "starting ollama", f"starting {TIMER}"]
    assert capsys.readouterr().err.splitlines() == words


def test_what_was_stopped_before_stays_so(world: World) -> None:
    world.put("ollama", "inactive")
    world.put(TIMER, "inactive")

    gpubench.stop_services(world.state, *OURS)
    gpubench.start_services(world.state)

    assert world.active() == ["milvus"]


@pytest.mark.parametrize(
    ("containers", "units", "reason"),
    [
        (["milvus", "nobody"], [TIMER], "Error: No such container: nobody"),
        (["milvus"], ["nothing.timer"], "there is no unit nothing.timer"),
    ],
    ids=["container", "unit"],
)
def test_unknown_name_stops_nothing(world: World, containers: list[str], units: list[str], reason: str) -> None:
    with pytest.raises(gpubench.Verdict, match=reason):
        gpubench.stop_services(world.state, containers, units)

    assert world.active() == ["milvus", "ollama", TIMER]
    assert not world.state.exists()


def test_one_that_does_not_start_keeps_no_other_down_and_is_tried_again(world: World) -> None:
    gpubench.stop_services(world.state, *OURS)
    (world.folder / "broken-milvus").touch()

    with pytest.raises(gpubench.Verdict, match="docker start milvus: could not select device driver"):
        gpubench.start_services(world.state)
    assert world.active() == ["ollama", TIMER]

    (world.folder / "broken-milvus").unlink()
    gpubench.start_services(world.state)
    assert world.active() == ["milvus", "ollama", TIMER]
    assert not world.state.exists()


def test_next_run_brings_back_what_a_power_cut_left_down(world: World) -> None:
    """Else it would take them for stopped by hand."""
    gpubench.stop_services(world.state, *OURS)

    gpubench.stop_services(world.state, *OURS)
    gpubench.start_services(world.state)

    assert world.active() == ["milvus", "ollama", TIMER]


def test_stop_that_fails_half_way_can_be_undone(world: World) -> None:
    (world.folder / "docker").write_text(DOCKER.replace("stop)", "stop) test $name != ollama || exit 1;"))

    with pytest.raises(gpubench.Verdict, match="docker stop -t 60 ollama: exit status 1"):
        gpubench.stop_services(world.state, *OURS)
    gpubench.start_services(world.state)

    assert world.active() == ["milvus", "ollama", TIMER]


#: Does what systemd does with the properties, in order, and keeps the command.
SYSTEMD_RUN = f"""#!{sys.executable}
import json, os, pathlib, shlex, subprocess, sys
world = pathlib.Path(os.environ["WORLD"])
(world / "unit").write_text(json.dumps(sys.argv[1:]))
words = sys.argv[1:]
properties = dict(word.partition("=")[2].split("=", 1) for word in words if word.startswith("--property="))
command = words[next(n for n, word in enumerate(words) if not word.startswith("--")):]
run = lambda text: subprocess.run(shlex.split(text)).returncode
failed = run(properties["ExecStartPre"])
status = failed or subprocess.run(command).returncode
run(properties["ExecStopPost"])
sys.exit(status)
"""


@pytest.fixture
def systemd_run(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    (world.folder / "systemd-run").write_text(SYSTEMD_RUN)
    (world.folder / "systemd-run").chmod(0o755)
    world.put("gpulab-bench.service", "inactive")
    return world


def drain(world: World, *words: str) -> tuple[int, dict[str, object], str]:
    own = [f"--container={name}" for name in OURS[0]] + [f"--unit={name}" for name in OURS[1]]
    command = [sys.executable, gpubench.__file__, "--drain", "--quick", *own, f"--state={world.state}", *words]
    done = subprocess.run(command, env={**os.environ, "LD_LIBRARY_PATH": "/none"}, capture_output=True, text=True)
    return done.returncode, json.loads(done.stdout), done.stderr


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="--drain must be root")


@needs_root
def test_run_is_a_unit_that_restores(systemd_run: World) -> None:
    status, result, _ = drain(systemd_run, "--seed", "4")

    assert (status, result["verdict"], result["reason"]) == (4, "not run", "no CUDA driver")
    assert result["seed"] == 4
    assert result["notes"] == ["stopped for this run, and back: gpulab-heal.timer, milvus, ollama"]
    assert systemd_run.active() == ["milvus", "ollama", TIMER]
    unit = json.loads((systemd_run.folder / "unit").read_text())
    assert unit[:5] == ["--unit=gpulab-bench.service", "--wait", "--pipe", "--collect", "--quiet"]
    # The run itself neither drains again nor restores.
    assert unit[-5:] == ["-I", str(Path(gpubench.__file__).resolve()), "--quick", "--seed", "4"]


@needs_root
def test_service_that_does_not_come_back_is_a_failure(systemd_run: World) -> None:
    (systemd_run.folder / "broken-ollama").touch()
    status, result, errors = drain(systemd_run)

    assert (status, result["verdict"]) == (1, "failed")
    assert str(result["reason"]).startswith("not all that was stopped is back, see journalctl -u gpulab-bench.service")
    assert "docker start ollama: could not select device driver" in errors


@needs_root
def test_second_drain_waits_for_nobody(systemd_run: World) -> None:
    systemd_run.put("gpulab-bench.service", "active")
    status, result, _ = drain(systemd_run)

    assert (status, result["verdict"]) == (3, "inconclusive")
    assert result["reason"] == "another run with --drain is under way"
    assert systemd_run.changes() == []


def test_words_for_systemd_are_taken_as_they_are() -> None:
    assert gpubench.quoted(["a b", 'c"d', "$HOME", "50%", "\\"]) == '"a b" "c\\"d" "$$HOME" "50%%" "\\\\"'


def test_arguments_of_draining_are_not_the_runs() -> None:
    words = ["--drain", "--quick", "--unit", "a", "--unit=b", "--container", "c", "--seed", "1", "--state", "x"]
    assert gpubench.without_drain(words) == ["--quick", "--seed", "1"]

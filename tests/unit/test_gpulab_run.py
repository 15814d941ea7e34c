# SPDX-License-Identifier: MIT
"""gpulab-run: its words for the engine, whom it refuses, time limit, turns and log, with a docker that is a script."""

from __future__ import annotations

import argparse
import grp
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inventory import budgets
from operations.containers.remote import gpulab_run

#: Runs the command of `docker run` itself; `ps` lists what the file says; `stop` ends the command, and what is listed.
DOCKER = """\
#!{python}
import json, os, signal, subprocess, sys
here = {here!r}
words = sys.argv[1:]
with open(here + "/calls", "a") as file:
    file.write(json.dumps(words) + "\\n")
if words[0] == "run":
    command = words[words.index("IMAGE") + 1:]
    process = subprocess.Popen(command)
    open(here + "/pid", "w").write(str(process.pid))
    sys.exit(process.wait() % 256)
if os.path.exists(here + "/down"):
    sys.exit("Cannot connect to the Docker daemon")
if words[0] == "ps" and os.path.exists(here + "/running"):
    print(open(here + "/running").read(), end="")
if words[0] == "image" and os.path.exists(here + "/removed"):
    sys.exit("[]\\nError response from daemon: No such image: IMAGE")
if words[0] == "attach":
    os.remove(here + "/running")
    print("attached", flush=True)
    sys.exit(5)
if words[0] == "stop":
    if os.path.exists(here + "/running"):
        os.remove(here + "/running")
        sys.exit(0)
    os.kill(int(open(here + "/pid").read()), signal.SIGTERM)
"""

Settings = dict[str, Any]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A guest with the tenants astro, who has a share, and ml, who has none."""
    (tmp_path / "bin").mkdir()
    docker = tmp_path / "bin/docker"
    docker.write_text(DOCKER.format(python=sys.executable, here=str(tmp_path)))
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.delenv("SUDO_UID", raising=False)
    found = {
        "data": str(tmp_path),
        "image": "IMAGE",
        "uid": 850,
        "tenants": {
            "astro": {"folder": str(tmp_path / "astro"), "shares": budgets.torch_shares(4096, 16376)},
            "ml": {"folder": str(tmp_path / "ml"), "shares": None},
        },
        "client": {"environment": {"X": "1"}, "mounts": {"/run/nvidia-mps": "/run/nvidia-mps"}, "ipc": "host"},
        "environment": "",
        "hook": str(tmp_path / "hook"),
        "time_limit_h": 1,
        "host_memory_mib": None,
        "shm_mib": 64,
        "network": "none",
        "profiles": {"quiet": {"PYTHONWARNINGS": "ignore"}},
        "simulated": "no card",
    }
    for name in ("astro", "ml"):
        (tmp_path / name).mkdir()
        (tmp_path / "logs" / name).mkdir(parents=True)
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook/sitecustomize.py").touch()
    (tmp_path / "tenants").mkdir()
    for name in ("astro", "ml"):
        (tmp_path / "tenants" / f"{name}.env").touch()
    monkeypatch.setattr(os.path, "ismount", lambda path: not (tmp_path / "unmounted").exists())
    places = {"LOGS": "logs", "LOCKS": "locks", "SETTINGS": "pytorch.json", "TENANTS": "tenants"}
    for name, path in places.items():
        monkeypatch.setattr(gpulab_run, name, str(tmp_path / path))
    (tmp_path / "pytorch.json").write_text(json.dumps(found))
    group = grp.struct_group(("gpulab-astro", "x", os.getgid(), []))
    monkeypatch.setattr(grp, "getgrnam", lambda name: group)
    return found


@pytest.fixture
def gpulab(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def call(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["gpulab-run", *words])
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
        try:
            return gpulab_run.main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    return call


def calls(folder: Path) -> list[list[str]]:
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


@given(st.integers(0, 99), st.integers(0, 59), st.integers(1, 59))
def test_durations_are_read_as_they_are_written(hours: int, minutes: int, rest: int) -> None:
    assert gpulab_run.seconds(f"{hours}h{minutes}m{rest}s") == hours * 3600 + minutes * 60 + rest


@pytest.mark.parametrize("text", ["", "0", "soon", "-1h", "1.5h", "2h "])
def test_other_durations_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        gpulab_run.seconds(text)


def test_job_runs_with_its_tenants_share_and_its_log_says_so(
    gpulab: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "astro/sub").mkdir()
    words = ["--tenant", "astro", "--name", "one", "--workdir", "sub", "--profile", "deterministic"]
    assert gpulab(*words, "--", "sh", "-c", "echo out; exit 7") == 7
    assert "out" in capfd.readouterr().out
    log = (tmp_path / "logs/astro/one.log").read_text()
    assert "start one tenant=astro user=root limit=3600s simulated (no card)" in log
    assert "\nout\n" in log
    assert "end one exit=7" in log
    run = next(each for each in calls(tmp_path) if each[0] == "run")
    for pair in (
        ["--user", "850:850"], ["--cap-drop", "ALL"], ["--security-opt", "no-new-privileges"], ["--ipc", "host"],
        ["--network", "none"], ["--workdir", "/workspace/sub"], ["--env-file", f"{tmp_path}/tenants/astro.env"],
        ["--name", "gpulab-job-astro"], ["--label", "org.gpulab.job=one"], ["--env", "USER=astro"],
        ["--env", "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT=0=4096M"], ["--env", "CUBLAS_WORKSPACE_CONFIG=:4096:8"],
        ["--env", f"GPULAB_TORCH_MEMORY_FRACTION={(4096 - 512) / 16376:.6f}"],
        ["--mount", f"type=bind,source={tmp_path}/astro,target=/workspace"],
    ):  # fmt: skip
        assert any(run[number : number + 2] == pair for number in range(len(run))), pair
    assert "--read-only" in run


def test_container_that_never_started_is_not_in_the_way(gpulab: Callable[..., int], tmp_path: Path) -> None:
    assert gpulab("--tenant", "astro", "--", "true") == 0
    words = [each[0] for each in calls(tmp_path)]
    assert words.index("ps") < words.index("rm") < words.index("run")
    assert ["rm", "--force", "gpulab-job-astro"] in calls(tmp_path)


def test_what_a_job_makes_its_group_may_change(gpulab: Callable[..., int], tmp_path: Path) -> None:
    assert gpulab("--tenant", "astro", "--", "sh", "-c", f"mkdir {tmp_path}/made") == 0
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o775


def test_workers_divide_the_share(settings: Settings) -> None:
    options = gpulab_run.parser().parse_args(["--tenant", "astro", "--workers", "2", "--", "python", "train.py"])
    options.name = "two"
    words = gpulab_run.container(settings, options, 60, 1)
    assert "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT=0=2048M" in words
    assert f"GPULAB_TORCH_MEMORY_FRACTION={(2048 - 512) / 16376:.6f}" in words
    assert words[-4:] == ["torchrun", "--standalone", "--nproc-per-node=2", "train.py"]
    settings["environment"] = "/data/pytorch/environments/abc"
    words = gpulab_run.container(settings, options, 60, 1)
    assert "type=bind,source=/data/pytorch/environments/abc,target=/opt/gpulab/environment,readonly" in words
    python = "/opt/gpulab/environment/bin/python"
    assert words[-6:] == [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--tenant", "ml", "--", "true"], "has no `memory_limit_mib` in the inventory"),
        (["--tenant", "none", "--", "true"], "--tenant none: expected one of astro, ml"),
        (["--tenant", "none", "--list"], "--tenant none: expected one of astro, ml"),
        (["--tenant", "astro", "--workers", "9", "--", "x"], "--workers 9: expected 1 to 4, which the share of astro"),
        (["--tenant", "astro", "--workers", "0", "--", "x"], "--workers 0: expected 1 to 4"),
        (["--tenant", "astro", "--workers", "two", "--", "x"], "argument --workers: invalid int value: 'two'"),
        (["--tenant", "astro", "--workers", "2", "--", "python"], "--workers: expected a script, or -m and a module"),
        (["--tenant", "astro", "--workers", "2", "--", "python3", "-c", "1"], "or -m and a module, got -c"),
        (["--tenant", "astro", "--time-limit", "2h", "--", "true"], "--time-limit: expected at most 1h, got 7200s"),
        (
            ["--tenant", "astro", "--time-limit", "soon", "--", "true"],
            "expected a duration as 2h, 30m or 1h30m, got 's",
        ),
        (["--tenant", "astro", "--time-limit", "0", "--", "true"], "expected more than nothing, got '0'"),
        (["--tenant", "astro"], "expected a command after --, or --shell"),
        (["--tenant", "astro", "python", "x.py", "--epochs", "1"], "--epochs is no option of gpulab-run"),
        (["--tenant", "astro", "--shell", "--", "bash"], "--shell: expected no command and no --workers beside it"),
        (["--tenant", "astro", "--shell"], "--shell: expected a terminal"),
        (["--tenant", "astro", "--workdir", "nowhere", "--", "true"], "--workdir nowhere: there is no folder"),
        (["--tenant"], "argument --tenant: expected one argument (gpulab-run --help)"),
        (["--stop", ""], "--stop : no such job of yours runs"),
        (["--tenant", "astro", "--profile", "fast", "--", "true"], "there are deterministic, quiet"),
        (["--tenant", "astro", "--workdir", "../ml", "--", "true"], "--workdir ../ml: expected a folder below"),
        (["--tenant", "astro", "--workdir", "/etc", "--", "true"], "expected a folder below"),
        (["--tenant", "astro", "--name", "a b", "--", "true"], "expected letters"),
        (["--stop", "ollama"], "no such job of yours runs"),
        (["--", "true"], "expected --tenant"),
    ],
)
def test_what_cannot_be_is_refused(
    gpulab: Callable[..., int], capfd: pytest.CaptureFixture[str], words: list[str], why: str
) -> None:
    assert gpulab(*words) == 2
    said = capfd.readouterr().err
    assert said.startswith("gpulab-run: ") and why in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("absent", "why"),
    [
        ("hook/sitecustomize.py", "missing on this guest: {}/hook/sitecustomize.py; a deploy brings it back"),
        ("tenants/astro.env", "missing on this guest: {}/tenants/astro.env; a deploy"),
        ("logs/astro", "the log {}/logs/astro/one.log: No such file or directory"),
        ("pytorch.json", "pytorch.json is missing: this guest runs no PyTorch jobs"),
        ("bin/docker", "the container engine does not answer: docker: No such file or directory"),
    ],
)
def test_what_is_missing_on_the_guest_is_named(
    gpulab: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str], absent: str, why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = tmp_path / absent
    path.rmdir() if path.is_dir() else path.unlink()
    if absent == "bin/docker":
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert gpulab("--tenant", "astro", "--name", "one", "--", "true") == 2
    assert why.format(tmp_path) in capfd.readouterr().err


@pytest.mark.parametrize(
    ("sign", "why"),
    [
        ("unmounted", "the data disk is not mounted at"),
        ("down", "the container engine does not answer: Cannot connect to the Docker daemon"),
        ("removed", "missing on this guest: image IMAGE; a deploy brings it back"),
    ],
)
def test_guest_that_is_not_well_runs_nothing(
    gpulab: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str], sign: str, why: str
) -> None:
    (tmp_path / sign).touch()
    assert gpulab("--tenant", "astro", "--", "true") == 2
    assert why in capfd.readouterr().err


def test_links_lead_to_where_they_do_in_the_tenants_folder_and_not_out_of_it(
    gpulab: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "astro/runs/7").mkdir(parents=True)
    (tmp_path / "astro/latest").symlink_to(tmp_path / "astro/runs/7")
    (tmp_path / "astro/out").symlink_to("/etc")
    assert gpulab("--tenant", "astro", "--workdir", "latest", "--", "true") == 0
    run = calls(tmp_path)[-2]
    assert run[run.index("--workdir") + 1] == "/workspace/runs/7"
    assert gpulab("--tenant", "astro", "--workdir", "out", "--", "true") == 2
    assert "--workdir out: expected a folder below" in capfd.readouterr().err


def test_job_goes_on_when_the_engine_comes_back(
    gpulab: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The client of the engine ends, and the container does not."""
    command = f"printf 'Up 3 seconds\tone\tastro\t60\n' > {tmp_path}/running; exit 125"
    assert gpulab("--tenant", "astro", "--name", "one", "--", "sh", "-c", command) == 5
    assert "the engine was away, and the job goes on" in capfd.readouterr().err
    log = (tmp_path / "logs/astro/one.log").read_text()
    assert "\nattached\n" in log
    assert "end one exit=5" in log


def test_job_that_the_engine_does_not_start_says_whose_words_these_are(
    gpulab: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    assert gpulab("--tenant", "astro", "--", "sh", "-c", "echo 'docker: no such network'; exit 125") == 125
    assert "the container engine did not start the job" in capfd.readouterr().err


def test_signal_to_gpulab_run_ends_its_job(gpulab: Callable[..., int], tmp_path: Path) -> None:
    ended = subprocess.Popen(["sh", "-c", f"sleep 1; kill -TERM {os.getpid()}"])
    began = time.monotonic()
    assert gpulab("--tenant", "astro", "--name", "long", "--", "sleep", "60") != 0
    assert time.monotonic() - began < 20
    assert ["stop", "-t", "30", "gpulab-job-astro"] in calls(tmp_path)
    assert "end long exit=" in (tmp_path / "logs/astro/long.log").read_text()
    ended.wait()


def test_signal_that_the_caller_ignores_is_ignored(gpulab: Callable[..., int]) -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        ended = subprocess.Popen(["sh", "-c", f"sleep 1; kill -HUP {os.getpid()}"])
        assert gpulab("--tenant", "astro", "--", "sleep", "2") == 0
        ended.wait()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_log_on_a_full_disk_has_a_gap_and_the_job_goes_on(
    gpulab: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs/astro/full.log").symlink_to("/dev/full")
    assert gpulab("--tenant", "astro", "--name", "full", "--", "sh", "-c", "echo out; exit 3") == 3
    said = capfd.readouterr()
    assert said.out == "out\n"
    assert said.err.count("the log has a gap: No space left on device; the job goes on") == 1


def test_job_over_its_time_limit_is_ended(gpulab: Callable[..., int], tmp_path: Path) -> None:
    began = time.monotonic()
    assert gpulab("--tenant", "astro", "--name", "long", "--time-limit", "1s", "--", "sleep", "60") == 124
    assert time.monotonic() - began < 20
    assert "end long exit=124 (time limit)" in (tmp_path / "logs/astro/long.log").read_text()


def test_second_job_of_a_tenant_is_refused_or_waits(
    gpulab: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "running").write_text("Up 3 seconds\tone\tastro\t60\n")
    assert gpulab("--list") == 0
    assert capfd.readouterr().out == "one\tastro\tUp 3 seconds\tlimit 60s\n"
    (tmp_path / "running").unlink()
    (tmp_path / "locks").mkdir()
    held = subprocess.Popen(["flock", str(tmp_path / "locks/astro.lock"), "sleep", "2"])
    time.sleep(0.5)
    assert gpulab("--tenant", "astro", "--no-wait", "--", "true") == 2
    assert "a job of astro runs already" in capfd.readouterr().err
    assert gpulab("--tenant", "astro", "--", "true") == 0
    assert "waiting: a job of astro runs" in capfd.readouterr().err
    held.wait()


def test_job_whose_gpulab_run_is_gone_is_ended_by_the_next_and_not_by_one_that_would_not_wait(
    gpulab: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "running").write_text("Up 3 seconds\tone\tastro\t60\n")
    assert gpulab("--tenant", "astro", "--no-wait", "--", "true") == 2
    assert (tmp_path / "running").exists()
    assert gpulab("--tenant", "astro", "--", "true") == 0
    assert "ending one, whose gpulab-run is gone" in capfd.readouterr().err
    assert not (tmp_path / "running").exists()


def test_job_is_ended_by_its_name_by_whoever_may(
    gpulab: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "running").write_text("Up 3 seconds\tone\tastro\t60\nUp 1 second\tone\tml\t60\n")
    assert gpulab("--stop", "one") == 2
    assert "--stop one: astro and ml have one: expected --tenant beside it" in capfd.readouterr().err
    monkeypatch.setenv("SUDO_UID", "65534")
    assert gpulab("--stop", "one") == 2
    assert "no such job of yours runs" in capfd.readouterr().err
    monkeypatch.delenv("SUDO_UID")
    (tmp_path / "running").write_text("Up 1 second\tone\tml\t60\n")
    assert gpulab("--stop", "one") == 0
    assert calls(tmp_path)[-1] == ["stop", "-t", "30", "gpulab-job-ml"]


def test_user_behind_sudo_needs_the_tenants_group(
    gpulab: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SUDO_UID", "65534")
    assert gpulab("--tenant", "astro", "--", "true") == 2
    assert "nobody is not in the group gpulab-astro" in capfd.readouterr().err
    monkeypatch.setattr(os, "getgrouplist", lambda user, gid: [os.getgid()])
    assert gpulab("--tenant", "astro", "--", "true") == 0


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become another user")
def test_log_is_opened_with_the_jobs_rights_and_follows_no_link(
    gpulab: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "astro"
    for parent in [folder, *folder.parents]:
        if parent.is_relative_to("/tmp/pytest-of-root"):
            parent.chmod(0o755)
    os.chown(folder, 850, 850)
    (folder / "link.log").symlink_to("/etc/gpulab-test-target")
    assert gpulab("--tenant", "astro", "--log", "link.log", "--", "true") == 2
    assert "Too many levels of symbolic links" in capfd.readouterr().err
    (folder / "ml").symlink_to(tmp_path / "ml")
    for outside in ("../ml/x.log", "ml/x.log"):
        assert gpulab("--tenant", "astro", "--log", outside, "--", "true") == 2
        assert f"--log {outside}: expected a file below {folder}" in capfd.readouterr().err
    assert list((tmp_path / "ml").iterdir()) == []
    os.mkfifo(folder / "pipe")
    for no_file in ("pipe", "."):
        assert gpulab("--tenant", "astro", "--log", no_file, "--", "true") == 2
        assert f"--log {no_file}: " in capfd.readouterr().err
    assert not Path("/etc/gpulab-test-target").exists()
    assert gpulab("--tenant", "astro", "--log", "own.log", "--", "true") == 0
    assert "exit=0" in (folder / "own.log").read_text()
    assert (folder / "own.log").stat().st_uid == 850

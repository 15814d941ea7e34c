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

#: Runs the command of `docker run` itself; `ps` lists what the file says; `stop` ends the command.
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
if words[0] == "ps" and os.path.exists(here + "/running"):
    print(open(here + "/running").read(), end="")
if words[0] == "stop":
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
        "image": "IMAGE",
        "uid": 850,
        "tenants": {
            "astro": {"folder": str(tmp_path / "astro"), "shares": budgets.torch_shares(4096, 16376)},
            "ml": {"folder": str(tmp_path / "ml"), "shares": None},
        },
        "client": {"environment": {"X": "1"}, "mounts": {"/run/nvidia-mps": "/run/nvidia-mps"}, "ipc": "host"},
        "environment": "",
        "hook": "/usr/local/lib/gpulab/pytorch",
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
    for name, path in {"LOGS": "logs", "LOCKS": "locks", "SETTINGS": "pytorch.json"}.items():
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
    run = calls(tmp_path)[-1]
    for pair in (
        ["--user", "850:850"], ["--cap-drop", "ALL"], ["--security-opt", "no-new-privileges"], ["--ipc", "host"],
        ["--network", "none"], ["--workdir", "/workspace/sub"], ["--env-file", "/etc/gpulab/tenants/astro.env"],
        ["--env", "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT=0=4096M"], ["--env", "CUBLAS_WORKSPACE_CONFIG=:4096:8"],
        ["--env", f"GPULAB_TORCH_MEMORY_FRACTION={(4096 - 512) / 16376:.6f}"],
        ["--mount", f"type=bind,source={tmp_path}/astro,target=/workspace"],
    ):  # fmt: skip
        assert any(run[number : number + 2] == pair for number in range(len(run))), pair
    assert "--read-only" in run


def test_workers_divide_the_share(settings: Settings) -> None:
    options = gpulab_run.parser().parse_args(["--tenant", "astro", "--workers", "2", "--", "python", "train.py"])
    options.name = "two"
    words = gpulab_run.container(settings, options, 60, 1)
    assert "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT=0=2048M" in words
    assert f"GPULAB_TORCH_MEMORY_FRACTION={(2048 - 512) / 16376:.6f}" in words
    assert words[words.index("IMAGE") + 1 :] == ["torchrun", "--standalone", "--nproc-per-node=2", "train.py"]
    settings["environment"] = "/data/pytorch/environments/abc"
    words = gpulab_run.container(settings, options, 60, 1)
    assert "type=bind,source=/data/pytorch/environments/abc,target=/opt/gpulab/environment,readonly" in words
    python = "/opt/gpulab/environment/bin/python"
    assert words[-6:] == [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--tenant", "ml", "--", "true"], "has no `memory_limit_mib` in the inventory"),
        (["--tenant", "none", "--", "true"], "no tenant none; there are astro, ml"),
        (["--tenant", "astro", "--workers", "9", "--", "x"], "does for 4 processes at most"),
        (["--tenant", "astro", "--time-limit", "2h", "--", "true"], "--time-limit: at most 1h"),
        (["--tenant", "astro"], "expected a command after --, or --shell"),
        (["--tenant", "astro", "--profile", "fast", "--", "true"], "there are deterministic, quiet"),
        (["--tenant", "astro", "--workdir", "../ml", "--", "true"], "expected a folder below"),
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
    assert why in capfd.readouterr().err


def test_job_over_its_time_limit_is_ended(gpulab: Callable[..., int], tmp_path: Path) -> None:
    began = time.monotonic()
    assert gpulab("--tenant", "astro", "--name", "long", "--time-limit", "1s", "--", "sleep", "60") == 124
    assert time.monotonic() - began < 20
    assert "end long exit=124 (time limit)" in (tmp_path / "logs/astro/long.log").read_text()


def test_second_job_of_a_tenant_is_refused_or_waits(
    gpulab: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "running").write_text("one\tastro\tUp 3 seconds\t60\n")
    assert gpulab("--list") == 0
    assert capfd.readouterr().out == "one\tastro\tUp 3 seconds\tlimit 60s\n"
    assert gpulab("--tenant", "astro", "--no-wait", "--", "true") == 2
    assert "a job of astro runs already" in capfd.readouterr().err
    gone = subprocess.Popen(["sh", "-c", f"sleep 1; rm {tmp_path}/running"])
    assert gpulab("--tenant", "astro", "--", "true") == 0
    assert "waiting: a job of astro runs" in capfd.readouterr().err
    gone.wait()


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
    assert gpulab("--tenant", "astro", "--log", "../ml/x.log", "--", "true") == 2
    assert not Path("/etc/gpulab-test-target").exists()
    assert gpulab("--tenant", "astro", "--log", "own.log", "--", "true") == 0
    assert "exit=0" in (folder / "own.log").read_text()
    assert (folder / "own.log").stat().st_uid == 850

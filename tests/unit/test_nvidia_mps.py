# SPDX-License-Identifier: MIT
"""MPS: what its daemon means by its words, what has to happen, and the installed program with the real daemon."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inventory import GpulabError
from operations.nvidia.mps import FILES, UNIT_FILE, decide, foreign_user, profile, wanted_files
from operations.nvidia.remote.mps import same_percentage, wrong
from operations.nvidia.units import installed
from operations.remote.common import same_memory
from rehearsal import image, paths
from rehearsal.nvidia import service

UID = 850
ORDER: dict[str, Any] = {"uid": UID, "active_thread_percentage": 80, "pinned_memory_limit_mib": 12288}


@pytest.mark.parametrize(
    ("told", "wanted", "same"),
    [("40.0", 40, True), ("100.0", 100, True), ("40.5", 40, False), ("5.0", 40, False), ("", 40, False)],
)
def test_percentage(told: str, wanted: int, same: bool) -> None:
    assert same_percentage(told, wanted) is same


@pytest.mark.parametrize(
    ("told", "wanted", "same"),
    [
        ("4G", 4096, True),
        ("4096M", 4096, True),
        ("512M", 512, True),
        ("1023M", 1023, True),
        ("", None, True),
        ("4G", None, False),
        ("", 4096, False),
        ("4G", 8192, False),
        ("3G", 4096, False),
        ("512M", 256, False),
        # All that the daemon tells of 4095 MiB.
        ("3G", 4095, True),
        ("Server 7 not found", 4096, False),
    ],
)
def test_memory(told: str, wanted: int | None, same: bool) -> None:
    assert same_memory(told, wanted) is same


def test_what_is_wrong_names_both_values() -> None:
    assert wrong({"percentage": "80.0", "memory": "12G"}, ORDER) == []
    assert wrong({"percentage": "5.0", "memory": ""}, ORDER) == [
        "active thread percentage: declared 80, in force 5.0",
        "pinned memory limit: declared 12288M, in force none",
    ]


values = st.text("ABCabc019_./:=,+-", min_size=1)


@given(st.dictionaries(st.from_regex(r"[A-Z][A-Z_]{0,8}", fullmatch=True), values, max_size=4))
def test_a_profile_reads_the_same_to_docker_and_to_a_shell(environment: dict[str, str]) -> None:
    lines = [line for line in profile(environment).splitlines() if line and not line.startswith("#")]
    docker = dict(line.partition("=")[::2] for line in lines)
    shell = dict(word.partition("=")[::2] for line in lines for word in shlex.split(line))
    assert docker == shell == environment


def test_a_profile_that_would_not_is_refused() -> None:
    with pytest.raises(GpulabError, match=r"A = 'x y' can't stand in an environment file"):
        profile({"A": "x y"})


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ({"uid": None, "gid": None, "user": None, "group": None}, ""),
        ({"uid": UID, "gid": UID, "user": "gpulab-gpu", "group": "gpulab-gpu"}, ""),
        ({"uid": 999, "gid": UID, "user": None, "group": "gpulab-gpu"}, "user gpulab-gpu has the id 999, expected 850"),
        ({"uid": None, "gid": 5, "user": None, "group": None}, "group gpulab-gpu has the id 5, expected 850"),
        (
            {"uid": None, "gid": None, "user": None, "group": "video2"},
            "group video2 has the id 850, which is to be gpulab-gpu's",
        ),
    ],
)
def test_who_has_the_services_name_or_number(user: dict[str, Any], expected: str) -> None:
    assert foreign_user({"user": user}, UID) == expected


def test_a_guest_that_does_not_exist_yet_gets_user_daemon_and_profiles() -> None:
    actions = decide({}, "mps", UID, ORDER, {"astro": {"A": "1"}})
    assert (actions.user, actions.start, actions.stop) == (True, "it is absent", False)
    assert set(actions.files) == {*FILES, "/etc/gpulab/tenants/astro.env"}


@pytest.mark.parametrize("mode", ["time-slice", "exclusive"])
def test_without_mps_a_new_guest_gets_profiles_alone(mode: str) -> None:
    actions = decide({}, mode, UID, ORDER, {"astro": {}})
    assert set(actions.files) == {"/etc/gpulab/tenants/astro.env"}
    assert not (actions.user or actions.start or actions.stop or actions.folder)


def test_the_unit_is_closed_and_sees_the_card() -> None:
    unit = wanted_files("mps", UID, ORDER)[UNIT_FILE]
    assert unit is not None
    lines = unit.content.splitlines()
    assert {"RuntimeDirectory=nvidia-mps", "RuntimeDirectoryMode=0700", "LogsDirectory=nvidia-mps"} <= set(lines)
    # Each of these would hide the card's nodes, or the memory that clients share with the server.
    for word in ("PrivateDevices=", "ProtectClock=", "PrivateIPC=", "RemoveIPC=", "DevicePolicy="):
        assert not [line for line in lines if line.startswith(word)]


# The real daemon, of Debian's package. It needs no GPU; its server does, and ends at once.


class Daemon:
    """Folder, user and environment of a control daemon; our program as it is installed."""

    def __init__(self, programs: Path, root: Path) -> None:
        self.root = root
        self.pipe = root / "pipe"
        for folder in (self.pipe, root / "log"):
            folder.mkdir(mode=0o700)
            os.chown(folder, UID, UID)
        self.environment = {
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "CUDA_MPS_PIPE_DIRECTORY": str(self.pipe),
            "CUDA_MPS_LOG_DIRECTORY": str(root / "log"),
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            [*user(UID), "nvidia-cuda-mps-control", "-f"],
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def kill(self) -> None:
        assert self.process
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def ask(self, *commands: str, uid: int = UID) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*user(uid), "nvidia-cuda-mps-control"],
            input="\n".join([*commands, ""]),
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
            start_new_session=True,
        )

    def apply(self, **order: Any) -> subprocess.CompletedProcess[str]:
        (self.root / "mps.json").write_text(json.dumps({**ORDER, "pipe": str(self.pipe), **order}))
        (self.root / "mps.json").chmod(0o644)
        text = installed("mps").content.replace("/etc/gpulab/mps.json", str(self.root / "mps.json"))
        text = text.replace("START_S = 10.0", "START_S = 3.0")
        argv = [*user(UID), sys.executable, "-c", text]
        return subprocess.run(argv, env=self.environment, capture_output=True, text=True, check=False)

    def read(self) -> dict[str, Any]:
        argument = {
            "paths": ["/etc/hostname"],
            "unit": "none.service",
            "pipe": str(self.pipe),
            "tenants": str(self.root),
            "user": "root",
            "uid": 0,
            "order": {**ORDER, "pipe": str(self.pipe)},
        }
        argv = [sys.executable, "-c", installed("mps").content, json.dumps(argument)]
        done = subprocess.run(argv, env=self.environment, capture_output=True, text=True, check=True)
        found: dict[str, Any] = json.loads(done.stdout)
        return found


def user(uid: int) -> list[str]:
    return ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]


@pytest.fixture(scope="module")
def programs() -> Iterator[Path]:
    """Debian's control daemon and server, where every user may start them."""
    if os.geteuid() != 0:
        pytest.skip("not run: only root can start the daemon as another user")
    paths.cache().mkdir(parents=True, exist_ok=True)
    try:
        with (paths.cache() / "packages.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            mps = service.real_mps(image.download)
    except GpulabError as error:
        pytest.skip(f"not run: Debian's nvidia-cuda-mps can't be had: {error}")
    # This machine need not run systemd.
    contents = {**mps.programs, "systemctl": b"#!/bin/sh\necho LoadState=not-found\n"}
    with open_folder() as folder:
        for name, content in contents.items():
            (folder / name).write_bytes(content)
            (folder / name).chmod(0o755)
        yield folder


@contextlib.contextmanager
def open_folder() -> Iterator[Path]:
    """A folder that the service's user gets into; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def daemon(programs: Path) -> Iterator[Daemon]:
    with open_folder() as root:
        running = Daemon(programs, root)
        running.start()
        yield running
        if running.process and running.process.poll() is None:
            running.kill()


def defaults(daemon: Daemon) -> list[str]:
    asked = daemon.ask("get_default_active_thread_percentage", "get_default_device_pinned_mem_limit 0")
    assert asked.returncode == 0, asked.stderr
    return asked.stdout.split()


def test_program_waits_for_the_daemon_and_gives_it_its_limits(daemon: Daemon) -> None:
    done = daemon.apply()
    assert done.returncode == 0, done.stderr
    # There is no GPU: told, and no failure.
    assert done.stderr == "no MPS server stays for uid 850: the first client will start one\n"
    assert defaults(daemon) == ["80.0", "12G"]
    found = daemon.read()
    assert (found["limits"], found["wrong"]) == ({"percentage": "80.0", "memory": "12G"}, [])
    assert found["pipe"] == {"uid": UID, "gid": UID, "mode": 0o700}


def test_program_takes_a_limit_away_again(daemon: Daemon) -> None:
    assert daemon.apply().returncode == 0
    assert daemon.apply(active_thread_percentage=100, pinned_memory_limit_mib=None).returncode == 0
    assert defaults(daemon) == ["100.0"]


@pytest.mark.parametrize(
    ("percentage", "memory"), [(100, 256), (33, 1023), (1, 1024), (50, 4095), (99, 16376), (80, None)]
)
def test_every_limit_of_an_inventory_is_taken(daemon: Daemon, percentage: int, memory: int | None) -> None:
    done = daemon.apply(active_thread_percentage=percentage, pinned_memory_limit_mib=memory)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("nonsense", [150, 0, "abc"])
def test_program_fails_where_the_daemon_keeps_its_own_value(daemon: Daemon, nonsense: Any) -> None:
    """The control tool itself ends with 0."""
    assert daemon.apply(active_thread_percentage=40).returncode == 0
    asked = daemon.ask(f"set_default_active_thread_percentage {nonsense}")
    assert (asked.returncode, asked.stdout) == (0, "40.0\n")

    done = daemon.apply(active_thread_percentage=nonsense)

    assert done.returncode == 1
    assert done.stderr == f"active thread percentage: declared {nonsense}, in force 40.0\n"


def test_limits_that_somebody_changed_are_found_and_set_again(daemon: Daemon) -> None:
    assert daemon.apply().returncode == 0
    daemon.ask("set_default_active_thread_percentage 5", "set_default_device_pinned_mem_limit 0 1G")
    assert daemon.read()["wrong"] == [
        "active thread percentage: declared 80, in force 5.0",
        "pinned memory limit: declared 12288M, in force 1G",
    ]
    assert daemon.apply().returncode == 0
    assert daemon.read()["wrong"] == []


def test_a_daemon_that_was_killed_comes_back_without_limits_and_gets_them(daemon: Daemon) -> None:
    assert daemon.apply().returncode == 0
    daemon.kill()
    assert daemon.read()["error"] == "Cannot find MPS control daemon process"
    # In the same folder, with all that the killed one left there.
    daemon.start()
    deadline = time.monotonic() + 5
    while daemon.ask("get_default_active_thread_percentage").stdout != "100.0\n":
        assert time.monotonic() < deadline
    assert daemon.apply().returncode == 0
    assert defaults(daemon) == ["80.0", "12G"]


def test_a_client_of_another_user_is_refused_at_once(daemon: Daemon) -> None:
    assert daemon.apply().returncode == 0
    refused = daemon.ask("get_server_list", uid=UID + 1)
    assert (refused.returncode, refused.stdout + refused.stderr) == (1, "Cannot find MPS control daemon process\n")


def test_quit_ends_the_daemon(daemon: Daemon) -> None:
    assert daemon.apply().returncode == 0
    assert daemon.process
    daemon.ask("quit -t 2")
    assert daemon.process.wait(timeout=10) in (0, 1)


def test_program_without_a_daemon_says_so(daemon: Daemon) -> None:
    daemon.kill()
    done = daemon.apply()
    assert (done.returncode, done.stderr) == (1, "Cannot find MPS control daemon process\n")


def test_a_guest_without_the_control_tool_is_told(daemon: Daemon) -> None:
    folder = Path(daemon.environment["PATH"].partition(":")[0])
    (daemon.root / "bin").mkdir()
    (daemon.root / "bin/systemctl").symlink_to(folder / "systemctl")
    daemon.environment["PATH"] = f"{daemon.root}/bin:/usr/bin:/bin"
    assert daemon.read()["error"] == "nvidia-cuda-mps-control is not installed"

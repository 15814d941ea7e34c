# SPDX-License-Identifier: MIT
"""What starts the containers at boot, against a `docker` that lists some and writes down which it is told to start."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from operations.containers.spec import AFTER, SERVICE
from operations.files import render

DOCKER = """#!/bin/sh
if [ "$1" = ps ]; then cat "$FOLDER/listed"; exit; fi
echo "$2" >> "$FOLDER/started"
[ "$2" != broken ]
"""


@pytest.mark.parametrize(
    ("listed", "started", "status"),
    [
        (["web web etcd,store", "store store etcd", "etcd etcd "], ["etcd", "store", "web"], 0),
        (["web web gone"], ["web"], 0),
        (["web.new web ", "web.previous web "], [], 0),
        (["broken broken ", "web web broken"], ["broken", "web"], 1),
        ([], [], 0),
    ],
)
def test_containers_start_behind_those_that_they_need(
    tmp_path: Path, listed: list[str], started: list[str], status: int
) -> None:
    (tmp_path / "docker").write_text(DOCKER)
    (tmp_path / "docker").chmod(0o755)
    (tmp_path / "listed").write_text("".join(f"{line}\n" for line in listed))
    script = render("containers/start-containers.sh.j2", label=SERVICE, after=AFTER)

    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "FOLDER": str(tmp_path)}
    done = subprocess.run(["sh", "-c", script], env=environment, check=False)

    said = tmp_path / "started"
    assert (said.read_text().split() if said.exists() else []) == started
    assert done.returncode == status

# SPDX-License-Identifier: MIT
"""Pulling an image: a few lines of progress, and what its failures mean."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import operations
from operations.containers.container import _not_pulled
from operations.containers.spec import ContainerSpec
from operations.remote import program

SPEC = ContainerSpec("web", "registry.example/a@sha256:" + 64 * "a")
DOCKER = """echo "registry.example/a@sha256:aa: Pulling from a"
for layer in 1 2; do echo "$layer: Pulling fs layer"; done
echo "1: Download complete"; echo "1: Pull complete"; sleep 1
echo "2: Pull complete"; echo "Digest: sha256:aa"
"""
PODMAN = """echo "Trying to pull registry.example/a..." >&2
echo "Copying blob sha256:1" >&2; echo "Copying blob sha256:2" >&2; echo "Copying blob sha256:1 done" >&2
sleep 1
echo "Copying blob sha256:2 done" >&2
"""


def pull(folder: Path, engine: str, script: str) -> subprocess.CompletedProcess[str]:
    (folder / engine).write_text(f"#!/bin/sh\n{script}")
    (folder / engine).chmod(0o755)
    text = program(str(Path(operations.__file__).parent / "containers" / "facts.py"), "pull")
    order = {"engine": engine, "image": SPEC.image, "every_s": 0.3}
    return subprocess.run(
        [sys.executable, "-c", text, json.dumps(order)],
        capture_output=True,
        text=True,
        env={"PATH": f"{folder}:/usr/bin:/bin"},
        check=False,
    )


@pytest.mark.parametrize(("engine", "script"), [("docker", DOCKER), ("podman", PODMAN)])
def test_a_long_pull_says_a_few_times_how_far_it_is(tmp_path: Path, engine: str, script: str) -> None:
    done = pull(tmp_path, engine, script)

    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert 1 <= len(lines) <= 2
    assert lines[-1].startswith("registry.example/a: 1 of 2 layers after ")


def test_a_short_pull_says_nothing(tmp_path: Path) -> None:
    done = pull(tmp_path, "docker", "echo '1: Pull complete'")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_pull_that_fails_ends_with_the_engines_last_word(tmp_path: Path) -> None:
    done = pull(tmp_path, "docker", "echo '1: Pulling fs layer'; echo 'manifest unknown' >&2; exit 1")
    assert (done.returncode, done.stderr) == (1, "manifest unknown\n")


@pytest.mark.parametrize(
    ("said", "brief"),
    [
        ("write /var/lib/docker/tmp/x: no space left on device", "web: the guest's disk is full"),
        ("manifest unknown: manifest unknown", "web: its registry has no such digest"),
        ("dial tcp 10.0.0.1:5000: connect: connection refused", "web: its registry does not answer"),
        ("x509: certificate signed by unknown authority", "web: its registry's certificate is of an unknown CA"),
        ("lookup registry.example: no such host", "web: its registry's name has no address"),
        ("unauthorized: authentication required", "web: its registry wants a login"),
        ("toomanyrequests: slow down", "web: its image could not be pulled"),
    ],
)
def test_what_a_failure_means(said: str, brief: str) -> None:
    error = _not_pulled(SPEC.name, SPEC.image, f"some progress\n{said}\n")
    assert error.brief == brief
    assert error.details is not None
    assert said in error.details and "No container was stopped or changed." in error.details

# SPDX-License-Identifier: MIT
"""Which engine a guest gets: versions, what is in its way, and what the check after an installation says."""

from __future__ import annotations

from typing import Any

import pytest

from inventory import GpulabError
from inventory.packages import DISTRIBUTIONS
from operations import step
from operations.containers import podman
from operations.containers.engine import LEAST, RIVALS, check, rival


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("26.1.5+dfsg1", (26, 1)),
        ("20.10.24+dfsg1", (20, 10)),
        ("29.0", (29, 0)),
        ("5.4.2", (5, 4)),
        ("29.0-rc.1", (29, 0)),
    ],
)
def test_version(text: str, numbers: tuple[int, ...]) -> None:
    assert podman.version(text) == numbers
    assert (podman.version(text) < LEAST) == text.startswith(("20.", "5."))


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_every_distributions_docker_has_a_rival_and_comes_first(name: str) -> None:
    packages = DISTRIBUTIONS[name].docker

    assert packages[0] in RIVALS
    assert rival(packages) not in packages
    assert (packages[0] == "docker-ce") == (DISTRIBUTIONS[name].docker_repository is not None)


@pytest.mark.parametrize(
    ("found", "brief"),
    [
        (None, "Podman does not answer"),
        ({"version": None, "error": "configure storage: x", "quadlet": True}, "Podman does not answer"),
        ({"version": "5.0.3", "error": "", "quadlet": True}, "Podman 5.0.3 does not read"),
        ({"version": "5.4.2", "error": "", "quadlet": False}, "Podman 5.4.2 has no Quadlet"),
    ],
)
def test_podman_that_cannot_be_used(found: dict[str, Any] | None, brief: str) -> None:
    error = podman.unfit({"podman": found})

    assert error is not None and error.brief.startswith(brief)
    assert podman.unfit({"podman": {"version": "5.1.0", "error": "", "quadlet": True}}) is None


def info(**keys: Any) -> dict[str, Any]:
    return {"version": "26.1.5", "cdi": ["/etc/cdi"], "live_restore": True, "log_driver": "local", **keys}


@pytest.mark.parametrize(
    ("kind", "facts", "brief"),
    [
        ("docker", {"info": None, "error": "no socket"}, "Docker does not answer"),
        ("docker", {"info": info(version="26.0.2")}, "Docker 26.0.2 does not read the container toolkit's"),
        ("docker", {"info": info(cdi=[])}, "Docker 26.1.5 does not read CDI specifications"),
        ("podman", {"podman": None}, "Podman does not answer"),
    ],
)
def test_check_after_an_installation(
    monkeypatch: pytest.MonkeyPatch, kind: str, facts: dict[str, Any], brief: str
) -> None:
    monkeypatch.setattr(step, "read", lambda fact, **_: facts)

    with pytest.raises(GpulabError) as refused:
        check(kind, ["docker.io"])

    assert refused.value.brief.startswith(brief)


def test_docker_that_does_not_answer_is_not_left_behind_unseen() -> None:
    units = {"docker.service": {"enabled": "enabled", "active": "active"}}
    with pytest.raises(GpulabError, match="Docker does not answer, and Podman is to take its place"):
        podman.leftovers({"units": units, "info": None, "error": "timed out"}, ["docker.service"])
    off = {"docker.service": {"enabled": "disabled", "active": "inactive"}}
    assert podman.leftovers({"units": off, "info": None, "error": ""}, ["docker.service"]) == ([], [])

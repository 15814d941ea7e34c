# SPDX-License-Identifier: MIT
"""One container on real engines: the same declaration in Docker and in Podman, its failures and its secrets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rehearsal import host
from tests.lab.commands import Outcome
from tests.lab.test_engine import GPU01, INVENTORY, PODMAN

#: Every field that an engine is told of, with words that a shell, systemd and Quadlet would each read in their way.
DEPLOY = """
import os
import inventory
from pyinfra import host, state
from operations import containers
from operations.containers.spec import ContainerSpec, Health

guest = inventory.of_run(state).guests[host.name]
health = Health(("test", "-e", os.environ.get("HEALTHY", "/run/secrets/root")), interval_s=1, timeout_s=2, retries=1)
containers.container(
    name="Run the probe",
    spec=ContainerSpec(
        "probe",
        guest.services.served()["ollama"].image,
        entrypoint="sh",
        command=("-c", 'id -u; echo "$WORDS" "$0"; ' + os.environ.get("END", "sleep 1000"), 'a b$HOME%n"z'),
        environment={"WORDS": "a $HOME %n 'q' \\\\\\\\"},
        volumes={"/srv/data/probe": "/data"},
        mounts=("/srv/data",),
        user="850:850",
        secrets={"/run/secrets/root": os.environ.get("SECRET", "hidden-one")},
        secrets_key="a key of the test",
        memory_mib=64, cpus=0.5, pids=50, shm_mib=32, ulimits={"nofile": 1024},
        health=health, restart="unless-stopped", after=("ollama",), labels={"x": 'y "z" %n'},
        stop_s=2, ready_s=8, engine=guest.engine.kind,
    ),
)
containers.undeclared(
    name="Look for others", names=["ollama", *os.environ.get("DECLARED", "probe").split()],
    engine=guest.engine.kind, prune="PRUNE" in os.environ,
)
"""

Run = Callable[..., Outcome]


@pytest.fixture(params=["docker", "podman"])
def engine(request: pytest.FixtureRequest, deployed: Any, tmp_path: Path) -> Iterator[tuple[str, Run]]:
    """An engine that runs on gpu01 as declared, and what runs the deploy above there."""
    lab = tmp_path / "lab.py"
    lab.write_text(Path(INVENTORY).read_text() + (PODMAN if request.param == "podman" else ""))
    done = deployed.pyinfra("deploy.py", "-y", *GPU01, lab=lab)
    assert done.status == 0, done.output[-3000:]
    (tmp_path / "probe.py").write_text(DEPLOY)

    def run(*words: str, **environment: str) -> Outcome:
        found: Outcome = deployed.pyinfra(
            str(tmp_path / "probe.py"), *(words or ("-y",)), *GPU01, lab=lab, **environment
        )
        return found

    yield request.param, run
    run(DECLARED="", PRUNE="1")
    if request.param == "podman":
        done = deployed.deploy(*GPU01)
        assert done.status == 0, done.output[-3000:]


def test_one_declaration_in_both_engines(deployed: Any, engine: tuple[str, Run]) -> None:
    kind, run = engine

    def inside(*words: str) -> str:
        return str(deployed.on("gpu01", kind, "exec", "probe", *words))

    def secrets() -> list[str]:
        return str(deployed.on("gpu01", "sh", "-c", "ls /etc/gpulab/secrets/probe")).split()

    done = run()
    assert done.status == 0, done.output[-3000:]
    assert inside("cat", "/run/secrets/root") == "hidden-one"
    said = deployed.on("gpu01", "sh", "-c", f"{kind} logs probe 2>&1")
    assert "850\na $HOME %n 'q' \\" in said and 'a b$HOME%n"z' in said
    assert "hidden-one" not in deployed.on("gpu01", kind, "inspect", "probe")
    kept = secrets()
    assert len(kept) == 1

    assert run().status == 0
    assert deployed.changed() == []

    # Unhealthy with another secret, and one that ends at once: the container before is there again, with its secret.
    for environment, why in (
        ({"HEALTHY": "/nowhere"}, "probe is not ready after 8 s: its health check says"),
        ({"END": "exit 3"}, "probe ended with status 3"),
    ):
        done = run(SECRET="hidden-two", **environment)
        assert done.status == 1
        assert why in done.output and "The previous container runs again." in done.output
        assert "hidden-two" not in done.output
        assert (inside("cat", "/run/secrets/root"), secrets()) == ("hidden-one", kept)
    assert run().status == 0
    assert deployed.changed() == []

    plan = run("--dry", SECRET="hidden-two")
    assert "secret /run/secrets/root: " in plan.output and "hidden" not in plan.output
    assert run(SECRET="hidden-two").status == 0
    assert inside("cat", "/run/secrets/root") == "hidden-two"
    assert len(secrets()) == 1 and secrets() != kept

    plan = run("--dry", SECRET="hidden-two", DECLARED="")
    assert "note: container probe is not declared" in plan.output
    assert run(SECRET="hidden-two", DECLARED="", PRUNE="1").status == 0
    assert host.run("gpu01", [kind, "inspect", "probe"]).returncode != 0
    assert host.run("gpu01", ["sh", "-c", f"{kind} network ls | grep gpulab-probe"]).returncode == 1
    assert host.run("gpu01", ["ls", "/etc/gpulab/secrets/probe"]).returncode != 0
    assert host.run("gpu01", ["test", "-d", "/srv/data/probe"]).returncode == 0

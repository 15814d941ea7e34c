# SPDX-License-Identifier: MIT
"""One container on real engines: the same declaration in Docker and in Podman, its failures and its secrets."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import inventory
from rehearsal import host
from tests.faults import healing
from tests.lab.commands import Outcome
from tests.lab.test_engine import GPU01, INVENTORY, PODMAN

#: Every field that an engine is told of, with words that a shell, systemd and Quadlet would each read in their way.
DEPLOY = """
import os
from operations import containers, run
from operations.containers.spec import ContainerSpec, Health

health = Health(("test", "-e", os.environ.get("HEALTHY", "/run/secrets/root")), interval_s=1, timeout_s=2, retries=1)
with run.of_host() as part:
    containers.container(
        name="Run the probe",
        spec=ContainerSpec(
            "probe",
            part.guest.services.served()["ollama"].image,
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
            stop_s=2, ready_s=int(os.environ.get("READY", "8")), engine=part.guest.engine.kind,
        ),
    )
    containers.undeclared(
        name="Look for others",
        names=[*part.guest.services.declared(), *os.environ.get("DECLARED", "probe").split()],
        engine=part.guest.engine.kind,
        prune="PRUNE" in os.environ,
    )
"""

Run = Callable[..., Outcome]


@dataclass(frozen=True)
class Engine:
    """An engine that runs on gpu01 as declared. `run`: the deploy above; `lab`: the inventory with that engine."""

    kind: str
    run: Run
    lab: Path


@pytest.fixture(scope="module", params=["docker", "podman"])
def engine(request: pytest.FixtureRequest, deployed: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp(request.param)
    # Group data lies beside its inventory.
    shutil.copytree("inventory/group_data", folder / "group_data")
    lab = folder / "lab.py"
    lab.write_text(Path(INVENTORY).read_text() + (PODMAN if request.param == "podman" else ""))
    done = deployed.pyinfra("deploy.py", "-y", *GPU01, lab=lab)
    assert done.status == 0, done.output[-3000:]
    (folder / "probe.py").write_text(DEPLOY)

    def run(*words: str, **environment: str) -> Outcome:
        found: Outcome = deployed.pyinfra(str(folder / "probe.py"), *(words or ("-y",)), *GPU01, lab=lab, **environment)
        return found

    yield Engine(request.param, run, lab)
    run(DECLARED="", PRUNE="1")
    if request.param == "podman":
        done = deployed.deploy(*GPU01)
        assert done.status == 0, done.output[-3000:]


def test_one_declaration_in_both_engines(deployed: Any, engine: Engine) -> None:
    kind, run = engine.kind, engine.run

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
        # systemd gives each of the restarts a little longer.
        ({"END": "exit 3", "READY": "40"}, "probe ended with status 3"),
    ):
        done = run(SECRET="hidden-two", **environment)
        assert done.status == 1
        assert why in done.output and "The previous container runs again." in done.output, done.output[-3000:]
        assert "hidden-two" not in done.output
        assert (inside("cat", "/run/secrets/root"), secrets()) == ("hidden-one", kept)
    assert run().status == 0
    assert deployed.changed() == []

    plan = run("--dry", SECRET="hidden-two")
    assert "secret /run/secrets/root: " in plan.output and "hidden" not in plan.output, plan.output[-3000:]
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


def unit(deployed: Any, key: str) -> str:
    return str(deployed.on("gpu01", "systemctl", "show", "--value", "-p", key, "ollama.service")).strip()


def identity(deployed: Any) -> str:
    return str(deployed.on("gpu01", "podman", "inspect", "--format", "{{.Id}}", "ollama")).strip()


def answers() -> bool:
    asked = ["curl", "--silent", "--fail", "http://127.0.0.1:11434/api/version"]
    return host.run("gpu01", asked).returncode == 0


def until(what: str, true: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.5)


@pytest.mark.parametrize("engine", ["podman"], indirect=True)
def test_services_are_units_of_quadlet(deployed: Any, engine: Engine) -> None:
    """A second deploy changes nothing, and verify finds every promise kept that it finds kept under Docker."""
    assert deployed.pyinfra("deploy.py", "-y", *GPU01, lab=engine.lab).status == 0
    assert deployed.changed() == []
    done, failed = deployed.verify(*GPU01, lab=engine.lab)
    assert (done.status, failed) == (0, set()), done.output[-3000:]

    for name in ("ollama", "milvus"):
        shown = deployed.on("gpu01", "systemctl", "show", "-p", "SourcePath,ActiveState", f"{name}.service")
        assert shown.split() == ["ActiveState=active", f"SourcePath=/etc/containers/systemd/{name}.container"]
    assert host.run("gpu01", ["systemctl", "is-active", "docker.service"]).stdout.strip() == "inactive"


@pytest.mark.parametrize("engine", ["podman"], indirect=True)
def test_killed_process_comes_back_with_its_unit(deployed: Any, engine: Engine) -> None:
    restarts = int(unit(deployed, "NRestarts"))
    pid = deployed.on("gpu01", "podman", "inspect", "--format", "{{.State.Pid}}", "ollama").strip()

    deployed.on("gpu01", "kill", "-KILL", pid)

    until("a restart by systemd", lambda: int(unit(deployed, "NRestarts")) > restarts)
    until("an answer", answers)
    assert "GPU 0" in deployed.on("gpu01", "podman", "exec", "ollama", "nvidia-smi", "-L")
    assert deployed.pyinfra("deploy.py", "-y", *GPU01, lab=engine.lab).status == 0
    assert deployed.changed() == []


@pytest.mark.parametrize("engine", ["podman"], indirect=True)
def test_unit_that_lost_its_gpu_is_restarted_without_a_deploy(deployed: Any, engine: Engine) -> None:
    healing.until("a service that is well", healing.well)
    before = len(healing.notes())

    deployed.on("gpu01", "sh", "-ec", healing.LOSE_GPU.replace("docker", "podman"))

    healing.until("a restart", lambda: len(healing.notes()) > before)
    note = healing.notes()[before]
    assert note["seen"].startswith("its container has lost the GPU") and note["done"].startswith("restarted (1 of 3")
    healing.until("a service that is well", healing.well)
    assert "GPU 0" in deployed.on("gpu01", "podman", "exec", "ollama", "nvidia-smi", "-L")


@pytest.mark.parametrize("engine", ["podman"], indirect=True)
def test_unit_is_made_anew_when_its_declaration_changes_and_not_left_when_that_fails(
    deployed: Any, engine: Engine
) -> None:
    declared = inventory.load(engine.lab).guests["gpu01"].services.model_dump(exclude_unset=True)

    def deploy(**keys: object) -> Outcome:
        services = json.dumps({**declared, "ollama": {**declared["ollama"], **keys}})
        done: Outcome = deployed.pyinfra("deploy.py", "-y", *GPU01, "--data", f"services={services}", lab=engine.lab)
        return done

    first = identity(deployed)
    done = deploy(keep_alive="7m")
    assert done.status == 0, done.output[-3000:]
    assert "gpu01: Run Ollama" in deployed.changed()
    second = identity(deployed)
    assert second != first
    assert "OLLAMA_KEEP_ALIVE=7m" in deployed.on("gpu01", "podman", "exec", "ollama", "env").splitlines()
    file = deployed.on("gpu01", "cat", "/etc/containers/systemd/ollama.container")

    done = deploy(keep_alive="7m", environment={"PATH": "/nowhere"}, ready_s=20)

    assert done.status == 1
    assert "The previous container runs again." in done.output, done.output[-3000:]
    assert deployed.on("gpu01", "cat", "/etc/containers/systemd/ollama.container") == file
    assert (unit(deployed, "ActiveState"), answers()) == ("active", True)
    assert "OLLAMA_KEEP_ALIVE=7m" in deployed.on("gpu01", "podman", "exec", "ollama", "env").splitlines()
    assert deploy(keep_alive="7m").status == 0
    assert deployed.changed() == []

    assert deploy().status == 0
    assert "gpu01: Run Ollama" in deployed.changed()
    assert "OLLAMA_KEEP_ALIVE=5m" in deployed.on("gpu01", "podman", "exec", "ollama", "env").splitlines()

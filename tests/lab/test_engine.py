# SPDX-License-Identifier: MIT
"""The real engines: containers keep their GPU, somebody's settings stay, ones that can't work cost nothing."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rehearsal import host

INVENTORY = "inventory/rehearsal.py"
DAEMON = "/etc/docker/daemon.json"
GPU01 = ("--limit", "gpu01")
#: The same lab with Podman on its first guest. Group data lies beside the original.
PODMAN = """
guests[0][1].update(engine={"kind": "podman"})
# gpulab-run speaks to Docker alone.
del guests[0][1]["services"]["pytorch"]
for _name, _data in guests:
    _data["_sudo"] = True
"""
QUADLET = """[Container]
Rootfs=/:O
AddDevice=nvidia.com/gpu=all
Network=none
Exec=sleep infinity
StopTimeout=1
[Install]
WantedBy=multi-user.target
"""


def write(deployed: Any, path: str, text: str) -> None:
    deployed.on("gpu01", "python3", "-c", "import sys; open(sys.argv[1], 'w').write(sys.argv[2])", path, text)


def ollama(deployed: Any) -> str:
    """The service's process and the time of its start."""
    return str(deployed.on("gpu01", "docker", "inspect", "--format={{.State.Pid}} {{.State.StartedAt}}", "ollama"))


def test_containers_keep_the_gpu_over_daemon_reload_and_engine_restart(deployed: Any) -> None:
    """On both: Debian's own Docker, and Docker's packages on Debian 12."""
    done, failed = deployed.verify("--disruptive", "-k", "containers.gpu or containers.engine")

    assert (done.status, failed) == (0, set()), done.output[-3000:]
    results = json.loads((deployed.reports / "verify.json").read_text())["results"]
    passed = {(each["id"], each["host"]) for each in results if each["verdict"] == "pass"}
    for guest in ("gpu01", "gpu02"):
        assert {("containers.gpu.daemon_reload", guest), ("containers.gpu.engine_restart.real", guest)} <= passed


def test_gpu_comes_into_any_container_by_name(deployed: Any) -> None:
    image = deployed.on("gpu01", "docker", "inspect", "--format={{.Image}}", "ollama").strip()
    words = ["docker", "run", "--rm", "--network=none", "--entrypoint=nvidia-smi"]

    assert "GPU 0" in deployed.on("gpu01", *words, "--device=nvidia.com/gpu=all", image, "-L")
    without = host.run("gpu01", [*words, image, "-L"])
    assert without.returncode != 0


def test_settings_of_somebody_else_stay_and_containers_go_on(deployed: Any) -> None:
    before = ollama(deployed)
    settings = json.loads(deployed.on("gpu01", "cat", DAEMON))
    write(deployed, DAEMON, json.dumps({"labels": ["site=lab"], "features": {"buildkit": True}}))

    done = deployed.deploy(*GPU01)

    assert done.status == 0, done.output[-3000:]
    merged = json.loads(deployed.on("gpu01", "cat", DAEMON))
    assert merged == settings | {"labels": ["site=lab"], "features": {"buildkit": True, "cdi": True}}
    assert "site=lab" in deployed.on("gpu01", "docker", "info", "--format={{.Labels}}")
    assert ollama(deployed) == before


def test_settings_that_are_broken_by_hand_are_shown_and_left(deployed: Any) -> None:
    before, broken = deployed.on("gpu01", "cat", DAEMON), '{\n  "labels": ["site=lab"]\n  "debug": true\n}\n'
    write(deployed, DAEMON, broken)
    try:
        done = deployed.deploy(*GPU01)

        assert done.status == 1
        assert f"{DAEMON} is not JSON: line 3, column 3: Expecting ',' delimiter" in done.output
        assert deployed.on("gpu01", "cat", DAEMON) == broken
    finally:
        write(deployed, DAEMON, before)
    assert deployed.deploy(*GPU01).status == 0
    assert deployed.changed() == []


def test_settings_that_docker_refuses_are_put_back(deployed: Any) -> None:
    """A flag of the unit and the same key in the file: Docker does not start with both."""
    before, drop_in = ollama(deployed), "/etc/systemd/system/docker.service.d/site.conf"
    start = deployed.on("gpu01", "sed", "-n", "s/^ExecStart=//p", "/usr/lib/systemd/system/docker.service").strip()
    deployed.on("gpu01", "mkdir", "-p", "/etc/systemd/system/docker.service.d")
    write(deployed, drop_in, f"[Service]\nExecStart=\nExecStart={start} --live-restore\n")
    theirs = '{"labels": ["site=lab"]}\n'
    write(deployed, DAEMON, theirs)
    try:
        deployed.on("gpu01", "systemctl", "daemon-reload")
        deployed.on("gpu01", "systemctl", "restart", "docker")

        done = deployed.deploy(*GPU01)

        assert done.status == 1
        assert "the following directives are specified both as a flag and in the configuration file" in done.output
        assert "The previous file is back, and Docker runs with it." in done.output
        assert deployed.on("gpu01", "cat", DAEMON) == theirs
        assert ollama(deployed) == before
    finally:
        deployed.on("gpu01", "rm", drop_in)
        deployed.on("gpu01", "systemctl", "daemon-reload")
    done = deployed.deploy(*GPU01)
    assert done.status == 0, done.output[-3000:]
    assert ollama(deployed) == before


def test_two_specifications_are_one_after_a_deploy(deployed: Any) -> None:
    deployed.on("gpu01", "mkdir", "-p", "/etc/cdi")
    deployed.on("gpu01", "sh", "-c", "sed s/nvidia0/nvidia9/ /var/run/cdi/nvidia.yaml > /etc/cdi/nvidia.yaml")
    assert deployed.verify(*GPU01, "-k", "containers.cdi")[1] == {"containers.cdi.fresh[gpu01]"}

    done = deployed.deploy(*GPU01)

    assert done.status == 0, done.output[-3000:]
    assert deployed.verify(*GPU01, "-k", "containers.cdi")[1] == set()
    assert host.run("gpu01", ["test", "-e", "/etc/cdi/nvidia.yaml"]).returncode == 1


def test_podman_takes_dockers_place_and_gives_it_back(deployed: Any, tmp_path: Path) -> None:
    """A GPU container that Quadlet was given outlives a reboot; Docker's containers are there after the way back."""
    lab = tmp_path / "lab.py"
    lab.write_text(Path(INVENTORY).read_text() + PODMAN)
    done = deployed.pyinfra("deploy.py", "-y", *GPU01, lab=lab)
    assert done.status == 0, done.output[-3000:]
    assert deployed.pyinfra("deploy.py", "-y", *GPU01, lab=lab).status == 0
    assert deployed.changed() == []
    assert host.run("gpu01", ["systemctl", "is-active", "docker.service", "docker.socket"]).stdout.split() == [
        "inactive",
        "inactive",
    ]
    assert "GPU 0" in deployed.on("gpu01", "podman", "exec", "ollama", "nvidia-smi", "-L")
    # Down with the data disk, and up with it.
    for act, state in ((("umount", "--lazy", "/srv/data"), 3), (("systemctl", "start", "srv-data.mount"), 0)):
        deployed.on("gpu01", *act)
        deadline = time.monotonic() + 60
        while host.run("gpu01", ["systemctl", "is-active", "ollama"]).returncode != state:
            assert time.monotonic() < deadline, act
            time.sleep(0.5)
    write(deployed, "/etc/containers/systemd/gpu.container", QUADLET)
    deployed.on("gpu01", "systemctl", "daemon-reload")
    deployed.on("gpu01", "systemctl", "start", "gpu.service")
    assert "GPU 0" in deployed.on("gpu01", "podman", "exec", "systemd-gpu", "nvidia-smi", "-L")
    deployed.on("gpu01", "systemctl", "daemon-reload")
    assert "GPU 0" in deployed.on("gpu01", "podman", "exec", "systemd-gpu", "nvidia-smi", "-L")

    host.request_reboot("gpu01")
    deadline = time.monotonic() + 120
    # Nothing fails on a guest that is not there; its checks are not run.
    while (done := deployed.verify(*GPU01, "-k", "containers", lab=lab)[0]).status and time.monotonic() < deadline:
        time.sleep(1)
    assert done.status == 0, done.output[-3000:]
    assert "GPU 0" in deployed.on("gpu01", "podman", "exec", "systemd-gpu", "nvidia-smi", "-L")

    deployed.on("gpu01", "systemctl", "stop", "gpu.service")
    deployed.on("gpu01", "rm", "/etc/containers/systemd/gpu.container")
    done = deployed.deploy(*GPU01)
    assert done.status == 0, done.output[-3000:]
    done, failed = deployed.verify(*GPU01)
    assert (done.status, failed) == (0, set()), done.output[-3000:]

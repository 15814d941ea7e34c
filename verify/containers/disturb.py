# SPDX-License-Identifier: MIT
"""Runs on the guest, as root: starts a GPU container of its own, disturbs it, and says whether it keeps its GPU.

The container is removed again. With Docker it is of an image that is there already; Podman needs none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

#: Marks the container, so that one that a killed run left behind is found.
LABEL = "org.gpulab.verify"
NAME = "gpulab-verify"
#: Seconds that it lives when nobody removes it.
LIFE_S = 300
#: Seconds for an engine to answer after its restart.
RESTART_S = 60.0

DISTURBANCES = {
    "daemon-reload": ["systemctl", "daemon-reload"],
    "engine-restart": ["systemctl", "restart", "docker.service"],
}


def observe(arguments: dict[str, Any]) -> dict[str, Any]:
    """`arguments`: `engine` (docker or podman), `disturbance`, `image_of` (a container), `user` inside, empty: any.

    `error`: why there is nothing to see. `before`, `after`: what nvidia-smi said inside; `same`: did every container
    run on, as the same process?
    """
    engine = arguments["engine"]
    clear(engine)
    try:
        if error := start(engine, arguments["image_of"], arguments["user"]):
            return {"error": error, "before": None, "after": None, "same": None, "simulated": []}
        before, processes = gpu(engine), running(engine)
        disturbed = run(DISTURBANCES[arguments["disturbance"]])
        answers = awaited(engine)
        after = gpu(engine)
        failed = disturbed.returncode or not answers
        return {
            "error": f"{arguments['disturbance']}: {words(disturbed)}" if failed else "",
            "before": before,
            "after": after,
            "same": processes.items() <= running(engine).items(),
            "simulated": ["nvidia-smi"] if "simulated" in before["output"].lower() else [],
        }
    finally:
        clear(engine)


def start(engine: str, image_of: str, user: str) -> str:
    """Start the container; why it could not be, or an empty text."""
    options = ["--detach", "--rm", f"--name={NAME}", f"--label={LABEL}=gpu", "--device=nvidia.com/gpu=all"]
    options += ["--network=none", "--cap-drop=ALL", "--security-opt=no-new-privileges"]
    options += [f"--user={user}"] if user else []
    if engine == "podman":
        # The guest's own system, with whatever would be written kept apart.
        what = ["--rootfs", "/:O", "sleep", str(LIFE_S)]
    else:
        inspected = run(["docker", "inspect", "--type=container", "--format={{.Image}}", image_of])
        if inspected.returncode:
            return f"there is no container {image_of}, whose image would be used"
        what = ["--read-only", "--entrypoint=sleep", inspected.stdout.strip(), str(LIFE_S)]
    started = run([engine, "run", *options, *what])
    return words(started) if started.returncode else ""


def gpu(engine: str) -> dict[str, Any]:
    """What nvidia-smi says inside."""
    asked = run([engine, "exec", NAME, "nvidia-smi", "-L"])
    return {"status": asked.returncode, "output": words(asked)}


def running(engine: str) -> dict[str, str]:
    """Each running container with its process and the time of its start."""
    names = run([engine, "ps", "--quiet", "--no-trunc"]).stdout.split()
    shown = (
        run([engine, "inspect", "--format={{.Name}} {{.State.Pid}} {{.State.StartedAt}}", *names]) if names else None
    )
    return dict(line.partition(" ")[::2] for line in shown.stdout.splitlines()) if shown else {}


def awaited(engine: str) -> bool:
    """Does the engine answer within its time?"""
    deadline = time.monotonic() + RESTART_S
    while run([engine, "ps", "--quiet"]).returncode:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def clear(engine: str) -> None:
    left = run([engine, "ps", "--all", "--quiet", "--filter", f"label={LABEL}"]).stdout.split()
    if left:
        run([engine, "rm", "--force", *left])


def words(done: subprocess.CompletedProcess[str]) -> str:
    """What a command said, in one line."""
    return " ".join((done.stdout + done.stderr).split())[-400:]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """A command that ended, with status 127 when it is not there or takes too long."""
    environment = {**os.environ, "LC_ALL": "C", "PODMAN_IGNORE_CGROUPSV1_WARNING": "1"}
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=90, env=environment)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


if __name__ == "__main__":
    json.dump(observe(json.loads(sys.argv[1])), sys.stdout)

# SPDX-License-Identifier: MIT
"""Makes on the guest what PyTorch jobs need; each part of the order is one that is missing."""

import grp
import json
import os
import shutil
import subprocess
import sys
from typing import Any

from operations.containers.remote.pytorch_environment import DESCRIPTION, state
from operations.remote.common import pip_words

ENVIRONMENT = "/opt/gpulab/environment"
LABEL = "org.gpulab.service=pytorch"


def checked(*argv: str, quiet: bool = True) -> str:
    done = subprocess.run(argv, stdout=subprocess.PIPE if quiet else None, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        tail = "\n".join((done.stdout or "").strip().splitlines()[-15:])
        sys.exit(f"{' '.join(argv[:3])} ended with {done.returncode}\n{tail}")
    return done.stdout or ""


def folder(path: str, uid: int, gid: int, mode: int) -> None:
    os.makedirs(path, exist_ok=True)
    os.chown(path, uid, gid)
    os.chmod(path, mode)


def sandbox(order: dict[str, Any], place: str, network: str, *command: str, writable: bool = True) -> str:
    """A command in a container of the image, with the environment where jobs have it; returns what it says."""
    uid = order["uid"]
    words = ["docker", "run", "--rm", "--user", f"{uid}:{uid}", "--read-only", "--tmpfs", "/tmp", "--network", network]
    words += ["--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--env", "HOME=/tmp"]
    words += ["--env", f"VIRTUAL_ENV={ENVIRONMENT}", "--label", LABEL]
    words += ["--mount", f"type=bind,source={place},target={ENVIRONMENT}" + ("" if writable else ",readonly")]
    return checked(*words, order["image"], *command)


def build(order: dict[str, Any], home: str) -> None:
    """An environment under its name; a half-made one never has it."""
    wanted = order["environment"]
    target, new = f"{home}/environments/{wanted['name']}", f"{home}/environments/.new"
    shutil.rmtree(new, ignore_errors=True)
    folder(new, order["uid"], order["uid"], 0o755)
    with open(f"{new}/requirements.txt", "w") as file:
        file.write(wanted["requirements"])
    if wanted["ca"]:
        with open(f"{new}/index-ca.pem", "w") as file:
            file.write(wanted["ca"])
    pip = (f"{ENVIRONMENT}/bin/python", "-m", "pip", "--isolated", "--disable-pip-version-check")
    sandbox(order, new, "none", "python3", "-m", "venv", "--system-site-packages", ENVIRONMENT)
    version = sandbox(order, new, "none", *pip, "--version", writable=False)
    bundle = f"{ENVIRONMENT}/index-ca.pem" if wanted["ca"] else ""
    # The image may say something of its own first.
    words = pip_words(next(line for line in version.splitlines() if line.startswith("pip ")), wanted["index"], bundle)
    install = ("install", "--no-cache-dir", "--require-hashes", "--requirement", f"{ENVIRONMENT}/requirements.txt")
    sandbox(order, new, order["build_network"], *pip, *install, *words)
    said = sandbox(order, new, "none", *pip, "list", "--format", "json", writable=False)
    versions = json.loads(next(line for line in said.splitlines() if line.startswith("[")))
    # Jobs run as the user who built it: they must not be able to change what the next one imports.
    checked("chown", "-R", "0:0", new)
    described = {
        "image": order["image"],
        "versions": {item["name"]: item["version"] for item in versions},
        "state": state(new),
    }
    with open(f"{new}/{DESCRIPTION}", "w") as file:
        json.dump(described, file, indent=2)
    if os.path.lexists(target):
        # One that somebody changed. A job may run with it, so it lies aside until the next time.
        aside = f"{home}/environments/.changed-{wanted['name']}"
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(target, aside)
    os.rename(new, target)


def main() -> int:
    order = json.loads(sys.argv[1])
    home = f"{order['data']}/pytorch"
    if not os.path.ismount(order["data"]):
        sys.exit(f"{order['data']}: the data disk is not mounted")
    for name in order["groups"]:
        checked("groupadd", "--system", name)
    for path in (home, f"{home}/environments", f"{home}/tenants", "/var/log/gpulab", "/var/log/gpulab/jobs"):
        os.makedirs(path, exist_ok=True)
    for name in order["folders"]:
        tenant, gid = name.removeprefix("gpulab-"), grp.getgrnam(name).gr_gid
        folder(f"{home}/tenants/{tenant}", order["uid"], gid, 0o2770)
        folder(f"/var/log/gpulab/jobs/{tenant}", 0, gid, 0o2750)
    if order["network"]:
        checked("docker", "network", "create", "--label", LABEL, order["network"])
    if order["environment"]:
        build(order, home)
    if order["current"]:
        link = f"{home}/environments/.current"
        if os.path.lexists(link):
            os.remove(link)
        os.symlink(order["current"], link)
        os.rename(link, f"{home}/environments/current")
    return 0


if __name__ == "__main__":
    sys.exit(main())

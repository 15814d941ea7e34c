# SPDX-License-Identifier: MIT
"""What breaks in a guest, one thing at a time, on a lab of real hosts: what its admin sees, and what heals it.

One lab for all of them, so one process. Needs root.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

import inventory
from rehearsal import host, paths
from tests.lab.commands import INVENTORY, Deployed

from . import pytorch, services, table
from .fault import GUEST, Fault, H, R, S, Words, both, meanwhile, nothing, service, sh
from .table import Row, Verdict

#: Makes the simulated card answer differently: see rehearsal/nvidia/source/gpu.h.
CARD = "/var/lib/lab-hardware/nvml.conf"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a lab needs root")


def nvidia(**keys: object) -> Words:
    """Words of a deploy in which `nvidia` of the guest is otherwise."""
    declared = inventory.load(INVENTORY).guests[GUEST].nvidia.model_dump(exclude_unset=True)
    return ("--data", f"nvidia={json.dumps({**declared, **keys})}")


#: A GGUF of a version that nobody reads any more.
BROKEN = b"GGUF\1\0\0\0"
BROKEN_MODEL = {"name": "own", "gguf": "/srv/data/broken.gguf", "gguf_sha256": hashlib.sha256(BROKEN).hexdigest()}


APT = "DEBIAN_FRONTEND=noninteractive apt-get -q -y --allow-change-held-packages --allow-downgrades"
TOOLKIT = "nvidia-container-toolkit"
REMOVE_TOOLKIT = f"{APT} remove {TOOLKIT}"
#: Both versions are in the repository; the pin allows them, and the guest has the newer one.
OLDER = "580.95.05-1"
OLDER_LIBRARIES = " ".join(f"{name}={OLDER}" for name in ("libcuda1", "libnvidia-ml1"))


def upgraded_by_hand(deployed: Deployed) -> None:
    """User space of another version under the loaded module, as unattended-upgrades leaves it."""
    names = "nvidia-driver-cuda nvidia-persistenced nvidia-kernel-open-dkms nvidia-kernel-support nvidia-modprobe"
    packages = " ".join(f"{name}={OLDER}" for name in f"{names} firmware-nvidia-gsp".split())
    deployed.on(GUEST, "sh", "-ec", f"{APT} install {packages} {OLDER_LIBRARIES}")


UNPACKING = "/run/unpacking"
#: dpkg tells it each state of each package at once. It halts both as soon as the toolkit is being unpacked.
HALT = f"""while read -r line; do case "$line" in "status: {TOOLKIT}"[:\\ ]*half-installed*)
pkill -STOP -x apt-get; pkill -STOP -x dpkg; touch {UNPACKING};; esac; done"""
LOGGER, LOGGED = "/root/halt", "/etc/dpkg/dpkg.cfg.d/halt"


def killed_installing(deployed: Deployed) -> None:
    """The run, apt and dpkg killed in the middle of unpacking."""
    deployed.on(GUEST, "sh", "-ec", REMOVE_TOOLKIT)
    write = 'printf \'%s\\n\' "$1" > "$2"'
    for text, path in ((HALT, LOGGER), (f"status-logger=sh {LOGGER}", LOGGED)):
        deployed.on(GUEST, "sh", "-ec", write, "write", text, path)
    unpacking = lambda: host.run(GUEST, ["test", "-e", UNPACKING]).returncode == 0  # noqa: E731
    deployed.killed_when(unpacking, "deploy.py", "-y", "--limit", GUEST)
    deployed.on(
        GUEST, "sh", "-ec", f"rm {UNPACKING} {LOGGER} {LOGGED}; pkill -KILL -x apt-get; pkill -KILL -x dpkg || true"
    )
    state = deployed.on(GUEST, "dpkg-query", "--show", "--showformat=${db:Status-Status}", TOOLKIT)
    assert state in ("half-installed", "unpacked")
    assert TOOLKIT in host.run(GUEST, ["dpkg", "--audit"]).stdout


def wait_for_mps(deployed: Deployed) -> None:
    """systemd starts it again by itself."""
    deadline = time.monotonic() + 20
    while host.run(GUEST, ["systemctl", "is-active", "--quiet", "gpulab-mps"]).returncode != 0:
        assert time.monotonic() < deadline, "gpulab-mps does not come back"
        time.sleep(0.2)


def expired_repository(deployed: Deployed) -> None:
    """The CUDA repository once more. Its key was extended in time, and those who trust it have the old one."""
    built = paths.cache() / "nvidia/www/compute/cuda/repos/debian13/x86_64"
    folder = expired()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("Packages", "Packages.gz", "Release"):
        shutil.copy(built / name, folder / name)
    then = ["--faked-system-time", "20240101T000000"]
    with tempfile.TemporaryDirectory() as home:

        def gpg(*words: str) -> str:
            quiet = ["--batch", "--quiet", "--pinentry-mode", "loopback", "--passphrase", ""]
            done = subprocess.run(
                ["gpg", "--homedir", home, *quiet, *words], check=True, capture_output=True, text=True
            )
            return done.stdout

        gpg(*then, "--quick-gen-key", "gpulab rehearsal, expired (simulated)", "rsa3072", "sign", "2024-06-01")
        gpg("--output", str(folder / "cuda-archive-keyring.gpg"), "--export")
        key = next(
            line.split(":")[9] for line in gpg("--with-colons", "--list-keys").splitlines() if line[:4] == "fpr:"
        )
        gpg(*then, "--quick-set-expire", key, "never")
        gpg("--clearsign", "--output", str(folder / "InRelease"), str(folder / "Release"))
        subprocess.run(["gpgconf", "--homedir", home, "--kill", "all"], check=True)


def expired() -> Path:
    return paths.cache() / "nvidia/www/expired/debian13/x86_64"


def of_expired() -> Words:
    declared = inventory.load(INVENTORY).guests[GUEST].nvidia.repository
    key = (expired() / "cuda-archive-keyring.gpg").read_bytes()
    address = declared.replace("/compute/cuda/repos", "/expired")
    return nvidia(repository=address, key_sha256=hashlib.sha256(key).hexdigest())


def refused_by_the_pin(deployed: Deployed) -> None:
    """Somebody else's package that needs branch 590: apt says no, and the driver stays."""
    done = host.run(GUEST, ["sh", "-c", f"{APT.replace('--allow-change-held-packages ', '')} install acme-gpu-tool"])
    assert done.returncode != 0
    assert "nvidia-driver-cuda (>= 590)" in done.stdout + done.stderr


def restart_vm(deployed: Deployed, *between: str) -> None:
    """Stopped and started on its node, with a command between the two."""
    deployed.on("pve1", "qm", "stop", "101")
    if between:
        deployed.on("pve1", *between)
    deployed.on("pve1", "qm", "start", "101")
    host.wait_ssh(inventory.load(INVENTORY).guests[GUEST].ssh_hostname)


def without_gpu(deployed: Deployed) -> None:
    restart_vm(deployed, "qm", "set", "101", "--delete", "hostpci0")


HOLD_LOCK = """python3 -c '
import fcntl, time
lock = open("/var/lib/dpkg/lock-frontend", "w")
fcntl.lockf(lock, fcntl.LOCK_EX)
time.sleep(12)'"""
FULL = """mount -t tmpfs -o size=16k full /var/cache/apt/archives
mkdir -p /var/cache/apt/archives/partial
dd if=/dev/zero of=/var/cache/apt/archives/rest bs=4k 2> /dev/null || true"""
OTHER_PIN = "Package: *nvidia*\nPin: version 590.*\nPin-Priority: 2000\n"
MPS = "CUDA_MPS_PIPE_DIRECTORY=/run/nvidia-mps nvidia-cuda-mps-control"

FAULTS = [
    Fault(
        "another version under the loaded driver",
        S,
        upgraded_by_hand,
        checks=("nvidia.driver.versions",),
    ),
    Fault("branch 590 declared, and 580 again", S, nothing, words=lambda: nvidia(branch="590")),
    Fault(
        "a module that DKMS can't build",
        H,
        sh(f"echo dkms=fail > {CARD}"),
        says="DKMS has not built the NVIDIA module",
        words=lambda: nvidia(version="580.95.05"),
        mend=sh(f"rm {CARD}"),
    ),
    Fault("apt's lock held for 12 s", S, both(sh(REMOVE_TOOLKIT), meanwhile(HOLD_LOCK))),
    Fault(
        "the repository's key expired",
        H,
        expired_repository,
        says="has expired",
        words=of_expired,
        mend=lambda deployed: shutil.rmtree(expired().parent.parent),
    ),
    Fault(
        "the pin overridden by another file",
        R,
        sh(f"printf '{OTHER_PIN}' > /etc/apt/preferences.d/zz-acme"),
        says="Something overrides the pin of the driver",
        checks=("nvidia.driver.pin",),
        mend=sh("rm /etc/apt/preferences.d/zz-acme"),
    ),
    Fault("a foreign package that wants branch 590", S, refused_by_the_pin),
    Fault(
        "the GPU lost",
        R,
        sh(f"echo lost=1 > {CARD}"),
        says="has fallen off the bus",
        checks=("nvidia.gpu.visible",),
        mend=sh(f"rm {CARD}"),
    ),
    Fault(
        "the GPU fallen off the bus",
        R,
        sh("python3 /usr/lib/nvidia-simulated/module.py fall-off"),
        says="has fallen off the bus",
        checks=("nvidia.gpu.visible",),
        mend=restart_vm,
    ),
    Fault("the VM started without its GPU", S, without_gpu, checks=("nvidia.gpu.visible",)),
    Fault("the MPS daemon killed", S, both(sh("systemctl kill -s KILL gpulab-mps"), wait_for_mps)),
    Fault("the MPS daemon stopped by hand", S, sh("systemctl stop gpulab-mps"), checks=("nvidia.mps.daemon",)),
    Fault(
        "an MPS limit changed by hand",
        S,
        sh(f"echo set_default_active_thread_percentage 7 | {MPS}"),
        checks=("nvidia.mps.limits",),
    ),
    Fault("the compute mode changed by hand", S, sh("nvidia-smi -c DEFAULT"), checks=("nvidia.gpu.compute_mode",)),
    Fault(
        "daemon.json broken by hand",
        R,
        sh("cp -a /etc/docker/daemon.json /root/kept; echo '{\"features\": {' > /etc/docker/daemon.json"),
        says="/etc/docker/daemon.json is not JSON",
        mend=sh("mv /root/kept /etc/docker/daemon.json"),
    ),
    Fault(
        "the disk full",
        R,
        both(sh(REMOVE_TOOLKIT), sh(FULL)),
        says="space",
        mend=sh("umount /var/cache/apt/archives"),
    ),
    Fault(
        "a model that nobody has",
        R,
        nothing,
        says="model nosuch: pull model manifest: file does not exist",
        words=lambda: service("ollama", models=["nosuch"]),
    ),
    Fault(
        "another digest than the model's declared",
        R,
        nothing,
        says=f"declared is {64 * 'a'}; the model stays as it was pulled",
        words=lambda: service("ollama", models=[{"name": "tiny", "digest": 64 * "a"}]),
    ),
    Fault(
        "a broken GGUF",
        R,
        sh("printf 'GGUF\\1\\0\\0\\0' > /srv/data/broken.gguf"),
        says="model own: unsupported version 1",
        words=lambda: service("ollama", models=[BROKEN_MODEL]),
        mend=sh("rm /srv/data/broken.gguf"),
    ),
    Fault(
        "the registry of models away",
        H,
        nothing,
        says="no such host",
        words=lambda: service("ollama", models=["tiny", "other"], environment={"GPULAB_STAND_IN_MODELS": "away"}),
    ),
    Fault("killed in the middle of an installation", H, killed_installing),
    *services.FAULTS,
    *pytorch.FAULTS,
]

#: What CI breaks: one for each promise of the services, here or in test_services.py. They take some seven minutes.
TYPICAL = {
    "a model that nobody has",
    "a broken GGUF",
    "the proxy reloaded under load",
    "a declaration with which Ollama does not start",
    "the registry away while the image is needed",
    "a digest that the registry does not have",
    "the disk full while an image is pulled",
    "the engine restarted",
    "a container's process killed",
    "the data disk gone from the VM",
    "Milvus killed while inserting",
}
assert {fault.injected for fault in FAULTS} >= TYPICAL


def marked(fault: Fault) -> Any:
    marks = [pytest.mark.typical] if fault.injected in TYPICAL else []
    return pytest.param(fault, id=fault.injected.replace(" ", "-"), marks=marks)


@pytest.mark.parametrize("fault", [marked(fault) for fault in FAULTS])
def test_guest_fault(deployed: Deployed, fault: Fault) -> None:
    seen = ""
    fault.inject(deployed)
    killed = fault.inject is killed_installing
    try:
        if fault.checks:
            done, failed = deployed.verify("--limit", GUEST, "-k", " or ".join(fault.checks))
            assert {f"{check}[{GUEST}]" for check in fault.checks} <= failed, done.output[-3000:]
            results = json.loads((deployed.reports / "verify.json").read_text())["results"]
            seen = next(item["message"] for item in results if item["id"] == fault.checks[0])
        words = fault.words()
        first = deployed.deploy("--limit", GUEST, *words)
        assert fault.says in first.output, first.output[-4000:]
        told = [line["error"] for line in deployed.record() if line.get("error")]
        # A step that failed half way has changed something, too.
        changed = deployed.changed() or re.search(r"executed [1-9][0-9]* commands", first.output)
    finally:
        fault.mend(deployed)
    # One that went through, as declared, is what verify looks at.
    again = deployed.deploy("--limit", GUEST) if first.status != 0 or killed or words else first
    done, failed = deployed.verify("--limit", GUEST)
    whole = (again.status, done.status, failed) == (0, 0, set())
    verdict = S if first.status == 0 and not killed else H if killed or changed else R
    table.ROWS.append(Row(GUEST, fault.injected, verdict if whole else Verdict.LOST, told[0] if told else seen))
    assert whole, again.output[-3000:] + done.output[-3000:]
    assert verdict is fault.expected, first.output[-4000:]

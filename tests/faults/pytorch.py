# SPDX-License-Identifier: MIT
"""What breaks in what PyTorch jobs need; `test_guest.py` runs these on its lab. `test_jobs.py` breaks the jobs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import inventory
from rehearsal import host
from tests.lab.commands import INVENTORY, Deployed

from .fault import GUEST, Fault, R, S, Words, both, sh

LOCKS = Path(__file__).parent / "locks"
#: The containers that a deploy has no business with, with the time of their start.
STARTED = "docker ps --format '{{.Names}} {{.ID}}' | sort"


def pytorch(**keys: Any) -> Words:
    """Words of a deploy in which PyTorch is declared otherwise."""
    declared = inventory.load(INVENTORY).guests[GUEST].services.model_dump(exclude_unset=True)
    return ("--data", f"services={json.dumps({**declared, 'pytorch': {**declared['pytorch'], **keys}})}")


def of_lock(name: str) -> Words:
    return pytorch(lock=str(LOCKS / name))


class Beside:
    """A job, and all other containers, which must not notice what is broken."""

    def begin(self, deployed: Deployed) -> None:
        words = ["gpulab-run", "--tenant", "astro", "--name", "beside"]
        code = "import time, einops; print('began', flush=True); time.sleep(600)"
        self.job = subprocess.Popen(
            [*host.enter(GUEST), *words, "--", "python", "-c", code], stdout=subprocess.PIPE, text=True
        )
        assert self.job.stdout is not None
        assert any("began" in line for line in self.job.stdout)
        self.ran = deployed.on(GUEST, "sh", "-c", STARTED)
        self.current = deployed.on(GUEST, "readlink", "/srv/data/pytorch/environments/current")

    def end(self, deployed: Deployed) -> None:
        try:
            assert deployed.on(GUEST, "sh", "-c", STARTED) == self.ran
            assert deployed.on(GUEST, "readlink", "/srv/data/pytorch/environments/current") == self.current
            assert self.job.poll() is None
        finally:
            deployed.on(GUEST, "gpulab-run", "--stop", "beside")
            self.job.wait(60)


beside = Beside()

PACKAGES = "/srv/data/pytorch/environments/current/lib/python3*/site-packages"
WITHOUT_IMAGE = """image=$(python3 -c 'import json; print(json.load(open("/etc/gpulab/pytorch.json"))["image"])')
docker rmi --force "$image" > /dev/null"""


def index_away(flag: str) -> str:
    port = (inventory.load(INVENTORY).guests[GUEST].pip_index()[0].split("/")[2].split(":")[1:] or ["443"])[0]
    return f"iptables {flag} FORWARD -p tcp --dport {port} -j REJECT --reject-with tcp-reset"


FAULTS = [
    Fault(
        "PyTorch's environment damaged by hand",
        S,
        sh(f"rm {PACKAGES}/einops/einops.py"),
        checks=("containers.pytorch.environment",),
    ),
    Fault(
        "a package put into PyTorch's environment by hand",
        S,
        sh(f"cd {PACKAGES}; cp -r einops-*.dist-info stars-1.dist-info; sed -i s/einops/stars/ stars-1*/METADATA"),
        checks=("containers.pytorch.environment",),
    ),
    Fault("PyTorch's image removed", S, sh(WITHOUT_IMAGE), checks=("containers.pytorch.image",)),
    Fault(
        "the Python index away while PyTorch's environment is needed",
        R,
        both(beside.begin, lambda deployed: sh(index_away("-I"))(deployed)),
        says="pytorch: the Python index does not answer",
        words=lambda: of_lock("another.lock"),
        mend=lambda deployed: [sh(index_away("-D"))(deployed), beside.end(deployed)],
    ),
    Fault(
        "a lock file with a hash that does not match",
        R,
        beside.begin,
        says="pytorch: the index has another file than the lock names",
        words=lambda: of_lock("wrong_hash.lock"),
        mend=beside.end,
    ),
]

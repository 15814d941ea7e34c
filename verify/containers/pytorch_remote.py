# SPDX-License-Identifier: MIT
"""Runs on the guest, as root, with the standard library alone: runs a job of a tenant's, and prints what it saw."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from verify.containers.jobs import PROGRAM, as_root

#: What marks the job's own line among what torch and the image say.
MARK = "gpulab-verify:"
#: Files of the environment above that size are not read whole, MiB.
WHOLE_MIB = 16
#: So many changed files are named.
SHOWN = 3
JOB = f"""
import base64, hashlib, importlib.metadata, json, os, re
import torch
limit = "/sys/fs/cgroup/memory.max"
status = dict(line.split(":\\t") for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
def name(item):
    return re.sub("[-_.]+", "-", item.metadata["Name"]).lower()

def differs(path, file):
    # Is it another than its package brought? Of big ones only the size is looked at.
    try:
        size = os.path.getsize(path)
        if size > {WHOLE_MIB} << 20:
            return file.size is not None and size != file.size
        digest = hashlib.new(file.hash.mode, open(path, "rb").read()).digest()
    except OSError:
        return True
    return base64.urlsafe_b64encode(digest).decode().rstrip("=") != file.hash.value

environment = os.environ.get("VIRTUAL_ENV", "")
installed = list(importlib.metadata.distributions())
own = [item for item in installed if environment and str(item.locate_file("")).startswith(environment + "/")]
changed = [
    str(file) for item in own for file in item.files or [] if file.hash and differs(item.locate_file(file), file)
]

def computed():
    # Sums of small whole numbers are exact in any order, so that the card's product can only be right or wrong.
    try:
        rows = torch.arange(256).remainder(7).float().repeat(256, 1)
        product = (rows.cuda() @ rows.cuda().T).cpu()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "" if bool((product == float((rows[0] * rows[0]).sum())).all()) else "a wrong product"

try:
    open("/gpulab-verify", "w")
    writable = True
except OSError:
    writable = False
print("{MARK}" + json.dumps({{
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "devices": torch.cuda.device_count() if torch.version.cuda else 0,
    "computed": computed() if torch.version.cuda else None,
    "versions": {{name(item): item.version for item in reversed(installed)}},
    "own": [name(item) for item in own],
    "changed": changed[:{SHOWN}],
    "uid": os.getuid(),
    "capabilities": int(status["CapEff"], 16),
    "no_new_privileges": status["NoNewPrivs"] == "1",
    "root_writable": writable,
    "environment": {{key: os.environ.get(key) for key in (
        "GPULAB_TORCH_MEMORY_FRACTION", "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
    )}},
    "memory_max": open(limit).read().strip() if os.path.exists(limit) else "",
}}), flush=True)
"""


def observe(arguments: dict[str, Any]) -> dict[str, Any]:
    """`arguments`: `image` by digest, and the `tenant` that runs the job (None: nobody can)."""
    words = ["docker", "image", "inspect", "--format", "{{json .RepoDigests}}\t{{json .Config.Labels}}"]
    done = subprocess.run([*words, arguments["image"]], capture_output=True, text=True, check=False)
    digests, labels = (json.loads(part) for part in done.stdout.split("\t")) if done.returncode == 0 else ([], {})
    job: dict[str, Any] | None = None
    if arguments["tenant"]:
        job = run(arguments["tenant"])
    simulated = ["pytorch"] if (labels or {}).get("org.gpulab.stand-in") else []
    return {"digests": digests, "simulated": simulated, "job": job}


def run(tenant: str) -> dict[str, Any]:
    """The job's exit status, what it said of itself (None: nothing), and the end of all that was said."""
    words = [PROGRAM, "--tenant", tenant, "--no-wait", "--time-limit", "2m", "--name", "gpulab-verify"]
    try:
        done = subprocess.run(
            [*words, "--", "python3", "-c", JOB], capture_output=True, text=True, env=as_root(), check=False
        )
    except FileNotFoundError:
        return {"status": 127, "saw": None, "said": f"{PROGRAM} is missing"}
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    saw = json.loads(lines[-1].removeprefix(MARK)) if lines else None
    return {"status": done.returncode, "saw": saw, "said": (done.stdout + done.stderr)[-1000:]}


if __name__ == "__main__":
    print(json.dumps(observe(json.loads(sys.argv[1]))))

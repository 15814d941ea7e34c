# SPDX-License-Identifier: MIT
"""Runs on the guest, as root, with the standard library alone: has a tenant's job measure PyTorch, and prints a report.

The job is torchjob.py, started by gpulab-run as a tenant starts one: its figures are those of the tenant's share.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

from verify.benchmarks.host import device, in_use, nvml_from, others, report, ruled, say
from verify.containers.jobs import PROGRAM, as_root

#: What marks the job's own line among what torch and the image say.
MARK = "gpulab-torchbench:"
#: How the names of the metrics begin.
METRICS = "pytorch."
#: gpulab-run's word for a tenant whose job runs.
BUSY = "runs already"
#: Exit status of what gpulab-run refuses.
REFUSED = 2
#: Seconds for a job to start and to check its results, and for gpulab-run to end one that takes longer.
START_S, END_S = 20, 35
#: Of what a job said last so much is told.
LAST_LINES, LAST_CHARACTERS = 3, 400


@dataclass
class Job:
    """How a job ended: exit status, its own object (None: it printed none), and all else that was said."""

    status: int
    saw: dict[str, Any] | None
    said: list[str]

    @property
    def last(self) -> str:
        """What was said last."""
        lines = " / ".join(line.strip() for line in self.said[-LAST_LINES:] if line.strip())
        return lines[-LAST_CHARACTERS:] or "it said nothing"


def observe(arguments: dict[str, Any]) -> dict[str, Any]:
    """`arguments`: the `tenant` that runs the job (None: nobody can), the text of the `job`, names of the declared
    services' `containers`, `limit_s` of sampling, the `folder` with pynvml.py.
    """
    began, found = time.monotonic(), report("pytorch")
    ruled(found, *measure(arguments, found))
    found["duration_s"] = time.monotonic() - began
    return found


def measure(arguments: dict[str, Any], found: dict[str, Any]) -> tuple[str, str]:
    """Fill in the report; verdict and reason."""
    if arguments["tenant"] is None:
        return "not run", "no tenant has a `memory_limit_mib`, so that nobody can run a job"
    if present := others(arguments["containers"]):
        return "inconclusive", in_use(present)
    job = run(arguments["tenant"], arguments["job"], arguments["limit_s"], found["seed"])
    # The image of a rehearsal says what it stands in for.
    found["notes"] += [line for line in job.said if "simulated" in line]
    if job.status == REFUSED and BUSY in job.last:
        return "inconclusive", job.last
    if job.saw is None:
        return "failed", f"the job ended with {job.status}: {job.last}"
    found.update(device(job.saw["device"]), software=f"torch {job.saw['torch']}")
    found.update({key: job.saw[key] for key in ("setting", "metrics", "not_run")})
    found["notes"] += job.saw["notes"]
    if wrong := [f"{name}: {each['wrong']} wrong" for name, each in found["metrics"].items() if each["wrong"]]:
        return "failed", ", ".join(wrong)
    if job.status != 0:
        return "failed", f"the job ended with {job.status} after its report: {job.last}"
    if job.saw.get("no_memory"):
        return "inconclusive", f"the share's memory is not free: {job.saw['no_memory']}"
    if present := others(arguments["containers"]):
        return "inconclusive", in_use(present)
    return "measured", ""


def run(tenant: str, text: str, limit_s: float, seed: int) -> Job:
    """Run the job, and pass on to stderr what it says of its metrics.

    It is ended after twice `limit_s` and what a start takes.
    """
    longest = int(2 * limit_s) + START_S
    words = [PROGRAM, "--tenant", tenant, "--no-wait", "--time-limit", f"{longest}s", "--name", "gpulab-torchbench"]
    # A job starts in the tenant's folder, where a module may have the name of one of Python's.
    words += ["--", "env", "PYTHONSAFEPATH=1", "python3", "-c", text]
    words.append(json.dumps({"seed": seed, "limit_s": limit_s, "mark": MARK}))
    saw, said = None, []
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=as_root(),
        )
    except OSError as error:
        return Job(127, None, [f"{PROGRAM}: {error.strerror}"])
    # An engine that does not answer keeps gpulab-run waiting.
    guard = threading.Timer(longest + END_S, process.terminate)
    guard.start()
    try:
        with process:
            for line in process.stdout or ():
                if line.startswith(MARK):
                    saw = as_json(line[len(MARK) :])
                else:
                    said.append(line.rstrip())
                    if line.startswith(METRICS):
                        say(line.rstrip())
    finally:
        guard.cancel()
    return Job(process.returncode, saw, said)


def as_json(text: str) -> dict[str, Any] | None:
    """The object of a line, None for one that was cut."""
    try:
        found: dict[str, Any] = json.loads(text)
    except ValueError:
        return None
    return found


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    nvml_from(given["folder"])
    print(json.dumps(observe(given)))

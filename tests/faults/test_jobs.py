# SPDX-License-Identifier: MIT
"""What breaks under a PyTorch job that runs, on a lab of real hosts: what its owner sees, and that the next one runs.

One lab for all of them, so one process. Needs root.
"""

from __future__ import annotations

import os
import subprocess
import threading
from dataclasses import dataclass

import pytest

from rehearsal import host
from tests.lab.commands import Deployed

from . import table
from .fault import GUEST
from .table import Row, Verdict

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a lab needs root")

RUN = ("gpulab-run", "--tenant", "astro")
JOBS = ("docker", "ps", "--all", "--quiet", "--filter", "label=org.gpulab.job")
#: Says what it does for about twelve seconds.
STEPS = "for step in $(seq 60); do echo step $step; sleep 0.2; done"


@dataclass(frozen=True)
class Broken:
    """`says`: to the owner, in the last lines but the job's own. `status`: the job's end, as the owner has it."""

    injected: str
    script: str
    status: int
    says: str
    log: str


GOES_ON = "the engine was away, and the job goes on"
BROKEN = [
    Broken(
        "a job's container killed",
        "docker kill gpulab-job-astro",
        137,
        "the job was killed: by hand, or for want of main memory",
        "exit=137",
    ),
    Broken("gpulab-run killed under its job", "kill -KILL $(pidof -x gpulab-run)", 137, "", "start"),
    Broken(
        "gpulab-run told to end", "kill -TERM $(pidof -x gpulab-run)", 143, "SIGTERM: broken is told to end", "exit=143"
    ),
    Broken(
        "the engine's client killed under a job",
        "kill -KILL $(pgrep -f '^docker run .*gpulab-job-astro')",
        0,
        GOES_ON,
        "exit=0",
    ),
    Broken("the engine restarted while a job runs", "systemctl restart docker", 0, GOES_ON, "exit=0"),
    Broken("the engine killed while a job runs", "systemctl kill --signal=KILL docker", 0, GOES_ON, "exit=0"),
]


@pytest.mark.parametrize("fault", BROKEN, ids=lambda fault: fault.injected.replace(" ", "-"))
def test_owner_of_a_job_sees_what_happened_and_can_start_the_next(deployed: Deployed, fault: Broken) -> None:
    log = "/var/log/gpulab/jobs/astro/broken.log"
    deployed.on(GUEST, "rm", "-f", log)
    words = [*host.enter(GUEST), *RUN, "--name", "broken", "--", "sh", "-c", STEPS]
    job = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert job.stdout is not None
    # A job that goes on for ever must not keep this waiting.
    clock = threading.Timer(120, job.kill)
    clock.start()
    try:
        said = []
        for line in job.stdout:
            said.append(line)
            if line == "step 3\n":
                deployed.on(GUEST, "sh", "-ec", fault.script)
        status = job.wait()
    finally:
        clock.cancel()

    told = [line.removeprefix("gpulab-run: ") for line in said if line.startswith("gpulab-run: ")]
    assert status in (fault.status, 128 - fault.status), said
    assert fault.says in "".join(told)
    assert ("step 60\n" in said) is (fault.status == 0)
    assert fault.log in deployed.on(GUEST, "cat", log)
    after = host.run(GUEST, [*RUN, "--time-limit", "1m", "--", "true"])
    assert after.returncode == 0, after.stderr
    assert deployed.on(GUEST, *JOBS) == ""
    done, failed = deployed.verify("--limit", GUEST, "-k", "pytorch or engine or ollama")
    assert failed == set(), done.output[-3000:]
    seen = told[0].strip() if told else f"exit status {fault.status}"
    table.ROWS.append(Row(GUEST, fault.injected, Verdict.SURVIVED, seen))

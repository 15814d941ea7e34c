# SPDX-License-Identifier: MIT
"""The guest's own view of its GPU: gpulab-health is there, and finds nothing that would make services fail."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pyinfra import host, logger

from inventory import GpulabError
from operations import files, step
from operations.files import File
from operations.nvidia.facts import NvidiaHealth
from operations.nvidia.library import nvml
from operations.nvidia.remote.gpulab_health import Finding, judge, summary
from operations.nvidia.remote.health import EXPECTED
from operations.remote import program

PROGRAM = "/usr/local/bin/gpulab-health"


def wanted_files(expected: Mapping[str, Any]) -> dict[str, File | None]:
    """The program, its module of NVML, and what it expects of the card."""
    return {
        PROGRAM: File(f"#!/usr/bin/python3\n{program(__file__, 'health', 'gpulab_health')}\n", mode=0o755),
        EXPECTED: File(json.dumps(expected, indent=2, sort_keys=True) + "\n"),
        **nvml(),
    }


def outdated(found: Mapping[str, Any], wanted: Mapping[str, File | None]) -> dict[str, File | None]:
    """Those files that are not on the guest as they should be: told by digest and mode, the module is large."""
    there = found.get("files", {})
    return {
        path: file
        for path, file in wanted.items()
        if file is not None and there.get(path) != [hashlib.sha256(file.content.encode()).hexdigest(), file.mode]
    }


def refused(findings: list[Finding]) -> GpulabError | None:
    """The error of the critical ones among them, None without any."""
    critical = [finding for finding in findings if finding.severity == "critical"]
    if not critical:
        return None
    worst, *others = critical
    seen = f"Seen: {worst.seen}; expected {worst.expected}."
    return GpulabError(worst.what[0].upper() + worst.what[1:], "\n".join([seen, *map(str, others)]), worst.command)


@step.step
def health(expected: Mapping[str, Any]) -> step.Commands:
    """
    Ensure that gpulab-health is on the guest and finds nothing critical; lesser findings are told as warnings.

    + expected: `link_width` and `link_generation` of the card, and `mps`: the `active_thread_percentage` and
        `pinned_memory_limit_mib` of every client, None without MPS
    """
    wanted = wanted_files(expected)
    found = step.read(NvidiaHealth, files=sorted(wanted))
    changing = outdated(found, wanted)
    if changing:
        for path in changing:
            step.changes(f"file {path}")
        yield files.write(changing)
        yield step.call(check, expected)
        return
    findings = judge(found["health"])
    if refused(findings) is not None:
        # Not refused here: what is planned before this step may heal it.
        yield step.call(check, expected)
        return
    warn(findings)
    told = "; ".join(map(str, findings))
    step.noop(told or summary(found["health"]))


def check(expected: Mapping[str, Any]) -> None:
    """
    Raises:
        GpulabError: the GPU is not fit for its services.
    """
    found = step.read(NvidiaHealth, files=sorted(wanted_files(expected)))
    findings = judge(found["health"])
    if (error := refused(findings)) is not None:
        raise error
    warn(findings)


def warn(findings: list[Finding]) -> None:
    """Say what is not as it should be and does not keep the services from running."""
    for finding in findings:
        logger.warning(f"{host.print_prefix}{finding}")

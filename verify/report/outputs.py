# SPDX-License-Identifier: MIT
"""A run for other programs: JUnit XML, JSON lines, and metrics for node_exporter's textfile collector."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from xml.etree import ElementTree

from verify.report.run import Run, printable
from verify.verdicts import Result, Verdict

#: The value of gpulab_verify_check.
VALUES = {Verdict.PASS: 1, Verdict.FAIL: 0, Verdict.WAIVED: 2, Verdict.INCONCLUSIVE: 3, Verdict.NOT_RUN: 4}
VALUES_TOLD = ", ".join(f"{value} {verdict.value}" for verdict, value in sorted(VALUES.items(), key=lambda x: x[1]))


def json_lines(run: Run) -> str:
    """One result a line, each with the lab and the time of the run."""
    about = {"lab": run.lab, "when": run.when, "began": round(run.began, 3)}
    return "".join(json.dumps({**about, **dataclasses.asdict(result)}) + "\n" for result in run.results)


def junit(run: Run) -> str:
    """One suite a subject, one case a check on a host: `classname` is the host, `name` the id.

    An inconclusive check is an error, one that was not run or is waived a skip.
    """
    root = ElementTree.Element("testsuites", {"name": printable(f"verify {run.lab}"), **_counts(run.results)})
    for subject in dict.fromkeys(result.subject for result in run.results):
        results = [result for result in run.results if result.subject == subject]
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(run.began))
        suite = ElementTree.SubElement(
            root, "testsuite", {"name": printable(subject), "timestamp": when, **_counts(results)}
        )
        for result in results:
            suite.append(_case(result))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _counts(results: list[Result]) -> dict[str, str]:
    found = {verdict: sum(result.verdict is verdict for result in results) for verdict in Verdict}
    return {
        "tests": str(len(results)),
        "failures": str(found[Verdict.FAIL]),
        "errors": str(found[Verdict.INCONCLUSIVE]),
        "skipped": str(found[Verdict.NOT_RUN] + found[Verdict.WAIVED]),
        "time": f"{sum(result.duration_s for result in results):.3f}",
    }


def _case(result: Result) -> ElementTree.Element:
    case = ElementTree.Element(
        "testcase", classname=printable(result.host), name=printable(result.id), time=f"{result.duration_s:.3f}"
    )
    told = {"title": result.title, "severity": result.severity.value, "promise": result.promise}
    told |= {"simulated": result.simulated, "waiver": result.waiver}
    properties = ElementTree.SubElement(case, "properties")
    for name, value in told.items():
        if value:
            ElementTree.SubElement(properties, "property", name=name, value=printable(value))
    message, first = printable(result.message), printable(result.message.partition("\n")[0])
    match result.verdict:
        case Verdict.FAIL | Verdict.INCONCLUSIVE as verdict:
            kind = "failure" if verdict is Verdict.FAIL else "error"
            found = ElementTree.SubElement(case, kind, type=result.severity.value, message=first)
            found.text = message + (f"\nfix: {printable(result.fix)}" if result.fix else "")
        case Verdict.NOT_RUN:
            expected = "not run, as expected" if result.expected else "not run"
            ElementTree.SubElement(case, "skipped", message=f"{expected}: {message}")
        case Verdict.WAIVED:
            ElementTree.SubElement(case, "skipped", message=f"waived ({printable(result.waiver)}): {message}")
        case Verdict.PASS if message:
            ElementTree.SubElement(case, "system-out").text = message
    return case


def prometheus(run: Run, before: Iterable[Result] = ()) -> str:
    """Metrics in the text format, without time stamps: the textfile collector refuses them. `before`: what checks that
    the run left out came to when they were last made, so that leaving them out ends no alarm.
    """
    lab = {"lab": run.lab}
    families: list[tuple[str, str, Sequence[tuple[Mapping[str, str], float]]]] = [
        (
            "gpulab_verify_check",
            f"What a check came to: {VALUES_TOLD}.",
            [
                ({**lab, **_about(result), "severity": result.severity.value}, VALUES[result.verdict])
                for result in [*run.results, *before]
            ],
        ),
        (
            "gpulab_verify_check_duration_seconds",
            "How long a check took, what it had to wait for included.",
            [({**lab, **_about(result)}, round(result.duration_s, 3)) for result in run.results],
        ),
        (
            "gpulab_verify_checks",
            "Checks by what they came to.",
            [
                ({**lab, "verdict": verdict.value}, sum(result.verdict is verdict for result in run.results))
                for verdict in Verdict
            ],
        ),
        ("gpulab_verify_exit_status", "0 passed, 1 failed, 2 incomplete.", [(lab, run.exit_status)]),
        ("gpulab_verify_simulated", "1: something stood in for real hardware.", [(lab, bool(run.stand_ins))]),
        ("gpulab_verify_run_timestamp_seconds", "When the run began.", [(lab, round(run.began, 3))]),
        ("gpulab_verify_run_duration_seconds", "How long the run took.", [(lab, round(run.duration_s, 3))]),
    ]
    return "".join(_family(*family) for family in families)


def _about(result: Result) -> dict[str, str]:
    return {"host": result.host, "id": result.id}


def _family(name: str, help_: str, samples: Iterable[tuple[Mapping[str, str], float]]) -> str:
    lines = [f"# HELP {name} {help_}", f"# TYPE {name} gauge"]
    for labels, value in samples:
        told = ",".join(f'{key}="{_label(text)}"' for key, text in labels.items())
        lines.append(f"{name}{{{told}}} {value + 0}")
    return "\n".join(lines) + "\n"


def _label(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

# SPDX-License-Identifier: MIT
"""Tier 1 of the benchmarks as a part of verify: what becomes of what its programs print, and what they are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import inventory
from tests.unit.benchmark_reports import PROCESSOR, of_tier_1
from tests.verify.healthy import GUEST, READ_AS, TIER_1, Doctored, Verified, healthy, lab_file, of_service, verify
from verify.benchmarks.contract import TOOLS
from verify.readers import Readers
from verify.verdicts import FAILED, INCOMPLETE, PASSED

IDS = {f"benchmarks.{name}" for tool in TIER_1 for name in TOOLS[tool]}


def run(lab: Path, tool: str, found: dict[str, Any], *options: str) -> Verified:
    """Verify a healthy lab on whose guest that program printed that."""
    return verify(lab, *options, plugin=Doctored({**healthy(), READ_AS[tool]: found}))


def ids_of(tool: str) -> set[str]:
    return {f"benchmarks.{name}" for name in TOOLS[tool]}


def unmeasured(tool: str, verdict: str, reason: str) -> dict[str, Any]:
    return of_service(tool, 2e9) | {"verdict": verdict, "reason": reason, "metrics": {}}


@pytest.mark.parametrize(("option", "there"), [("off", False), ("quick", False), ("full", True)])
def test_services_are_measured_by_a_full_run_alone(tmp_path: Path, option: str, there: bool) -> None:
    found = verify(lab_file(tmp_path), f"--benchmarks={option}", plugin=Doctored(healthy()))

    assert found.status == PASSED
    assert IDS & found.ids("pass") == (IDS if there else set())


@pytest.mark.parametrize("tool", list(TIER_1))
def test_program_that_broke_fails_its_checks_and_no_other(tmp_path: Path, tool: str) -> None:
    found = run(lab_file(tmp_path), tool, unmeasured(tool, "failed", "the server has gone"))

    assert (found.status, found.ids("fail")) == (FAILED, ids_of(tool))
    assert {found.result(name)["message"] for name in ids_of(tool)} == {"gpu01: the server has gone"}


@pytest.mark.parametrize("tool", list(TIER_1))
def test_card_in_use_is_inconclusive(tmp_path: Path, tool: str) -> None:
    found = run(lab_file(tmp_path), tool, unmeasured(tool, "inconclusive", "GPU in use by PID 9 python"))

    assert (found.status, found.ids("inconclusive")) == (FAILED, ids_of(tool))
    # No service of ours, which could be stopped.
    assert {found.result(name)["message"] for name in ids_of(tool)} == {"GPU in use by PID 9 python"}


def test_what_cannot_be_measured_is_not_run(tmp_path: Path) -> None:
    found = run(lab_file(tmp_path), "mps", unmeasured("mps", "not run", "no CUDA driver"))

    assert (found.status, found.ids("not run")) == (INCOMPLETE, ids_of("mps"))


@pytest.mark.parametrize("tool", ["pytorch", "ollama"])
def test_service_that_fell_back_to_the_processor_fails(tmp_path: Path, tool: str) -> None:
    found = run(lab_file(tmp_path), tool, of_tier_1(tool, TIER_1[tool], **PROCESSOR))

    assert found.ids("fail") == ids_of(tool)
    told = found.result(f"benchmarks.{next(iter(TIER_1[tool]))}")["message"]
    assert told == f"gpu01: {tool} 1.0 computed on the CPU (AMD EPYC 7313), expected the GPU"


def test_index_of_the_processor_is_measured_there_and_says_so(tmp_path: Path) -> None:
    found = run(lab_file(tmp_path), "milvus", of_tier_1("milvus", TIER_1["milvus"], **PROCESSOR))

    assert found.status == PASSED
    told = found.result("benchmarks.milvus.recall")["message"]
    # Nobody has measured it on a processor before.
    assert "learning a baseline, run 1 of 5" in told and "computed on the CPU, AMD EPYC 7313" in told


def test_rehearsal_measures_on_the_processor(tmp_path: Path) -> None:
    lab = lab_file(tmp_path, guest={"simulated": "rehearsal"})

    found = run(lab, "pytorch", of_tier_1("pytorch", TIER_1["pytorch"], **PROCESSOR))

    assert found.status == PASSED
    assert found.result("benchmarks.pytorch.vae")["simulated"] == "rehearsal"


def test_rehearsal_learns_no_baseline(tmp_path: Path) -> None:
    """Its processor is that of a machine which does other things, too."""
    lab, slow = lab_file(tmp_path), of_tier_1("ollama", {name: level / 2 for name, level in TIER_1["ollama"].items()})
    assert run(lab, "ollama", slow).ids("fail") == ids_of("ollama")

    found = run(lab_file(tmp_path, guest={"simulated": "rehearsal"}), "ollama", slow)

    assert found.status == PASSED
    told = found.result("benchmarks.ollama.generation")["message"]
    assert "nothing bounds it in a simulated lab" in told and "% against the last " in told


def test_other_settings_are_not_compared(tmp_path: Path) -> None:
    found = run(lab_file(tmp_path), "ollama", of_service("ollama", 2e9) | {"setting": "another model"})

    assert "learning a baseline, run 1 of 5" in found.result("benchmarks.ollama.generation")["message"]


def test_other_version_learns_anew_and_is_compared_with_the_one_before(tmp_path: Path) -> None:
    slower = of_tier_1("ollama", {name: 0.8 * level for name, level in TIER_1["ollama"].items()}, software="ollama 2.0")

    found = run(lab_file(tmp_path), "ollama", slower)

    told = found.result("benchmarks.ollama.generation")["message"]
    assert "learning a baseline, run 1 of 5" in told
    assert "-20.0 % against the last 5 runs under driver 580.95.05, ollama 1.0" in told


def test_framework_is_compared_with_the_bare_card_of_the_same_run(tmp_path: Path) -> None:
    found = verify(lab_file(tmp_path), plugin=Doctored(healthy()))
    alone = verify(lab_file(tmp_path), "-k", "benchmarks.pytorch", plugin=Doctored(healthy()))

    told = found.result("benchmarks.pytorch.gemm.fp16")["message"]
    assert "88.3 % of what tensor.fp16 did in this run, 70.2 TFLOP/s" in told
    assert "did in this run" not in alone.result("benchmarks.pytorch.gemm.fp16")["message"]


def test_services_with_nothing_to_measure_have_no_such_checks(tmp_path: Path) -> None:
    services = {name: dict(each) for name, each in GUEST["services"].items()}
    del services["ollama"]["models"], services["milvus"]["indexes"], services["milvus"]["collections"]
    # Whoever has no limit of memory starts no job.
    lab = lab_file(tmp_path, guest={"services": services, "tenants": [{"name": "ml", "active_thread_percentage": 60}]})

    found = verify(lab, "-k", "benchmarks", plugin=Doctored(healthy()))

    assert IDS & found.ids("pass") == ids_of("mps")


class Program:
    """A guest's connection that runs any program of ours, and remembers what it was given."""

    def __init__(self) -> None:
        self.given: dict[str, tuple[dict[str, Any], object]] = {}
        self.removed: list[list[str]] = []

    def read(
        self, script: Path, arguments: dict[str, Any], limit_s: float, secret: object, tell: object
    ) -> dict[str, Any]:
        self.given[script.name] = arguments, secret
        return {}

    def send(self, name: str, text: bytes) -> str:
        return "/tmp/there"

    def run(self, what: str, command: list[str], stdin: bytes, limit_s: float) -> tuple[int, str, str]:
        self.removed.append(command)
        return 0, "", ""


def test_programs_are_given_what_the_inventory_declares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, program = Readers(inventory.load(lab_file(tmp_path)), "full"), Program()
    monkeypatch.setattr(made, "_connection", lambda host: program)

    for subject in READ_AS.values():
        made.read("gpu01", subject)

    mps, _ = program.given["mpsbench.py"]
    torch, _ = program.given["torchbench.py"]
    ollama, _ = program.given["ollamabench.py"]
    milvus, secret = program.given["milvusbench.py"]
    assert (mps["program"], mps["clients"], mps["user"]) == ("/tmp/there/gpubench.py", 2, "gpulab-gpu")
    # NVML's module for each of them, and the clients' program.
    assert program.removed == [["rm", "-r", "/tmp/there"]] * 5
    assert torch["tenant"] == "astro" and "import torch" in torch["job"]
    assert (ollama["model"], ollama["digest"]) == ("tiny", 64 * "d")
    assert (milvus["dimension"], milvus["index"]["index_type"], milvus["search"]) == (
        128,
        "GPU_CAGRA",
        {"itopk_size": 128},
    )
    assert secret == {"root": None}
    assert {tuple(each["containers"]) for each, _ in program.given.values()} == {("ollama", "milvus")}

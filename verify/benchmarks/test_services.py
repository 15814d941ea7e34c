# SPDX-License-Identifier: MIT
"""Is what runs on the card as fast as it was, and do those who share it get their shares? Tier 1, with a full run."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from inventory import Guest
from verify.benchmarks.measured import Measured
from verify.benchmarks.test_gpu import SLOW, decided

MPS = (
    "systemctl restart gpulab-mps on {host}, then "
    "pytest verify --lab {lab} --limit {host} --benchmarks full -k benchmarks.mps"
)


@pytest.mark.on("mps")
@pytest.mark.major
@pytest.mark.promise("benchmarks.{mps_figure}", "nvidia.sharing", "nvidia.mps", fix=MPS)
def test_clients_share_the_card(
    guest: Guest, mps_figure: str, mps_benchmark: Measured, seen: Callable[[str], None]
) -> None:
    told(guest, mps_benchmark, mps_figure, seen)


@pytest.mark.on("mps")
@pytest.mark.major
@pytest.mark.promise("benchmarks.mps.limit", "nvidia.sharing", "tenants.memory_limit_mib", fix=MPS)
def test_client_over_its_memory_limit_is_refused_alone(
    guest: Guest, mps_benchmark: Measured, seen: Callable[[str], None]
) -> None:
    told(guest, mps_benchmark, "mps.limit", seen)


@pytest.mark.on("pytorch")
@pytest.mark.major
@pytest.mark.promise("benchmarks.{pytorch_figure}", "services.pytorch.image", "card.name", fix=SLOW)
def test_pytorch_is_as_fast_as_it_was(
    guest: Guest, pytorch_figure: str, pytorch_benchmark: Measured, seen: Callable[[str], None]
) -> None:
    on_the_card(guest, pytorch_benchmark)
    told(guest, pytorch_benchmark, pytorch_figure, seen)


@pytest.mark.on("ollama")
@pytest.mark.major
@pytest.mark.promise("benchmarks.{ollama_figure}", "services.ollama.image", "services.ollama.models", fix=SLOW)
def test_ollama_is_as_fast_as_it_was(
    guest: Guest, ollama_figure: str, ollama_benchmark: Measured, seen: Callable[[str], None]
) -> None:
    on_the_card(guest, ollama_benchmark)
    told(guest, ollama_benchmark, ollama_figure, seen)


@pytest.mark.on("milvus")
@pytest.mark.major
@pytest.mark.promise("benchmarks.{milvus_figure}", "services.milvus.image", "services.milvus.indexes", fix=SLOW)
def test_milvus_is_as_good_as_it_was(
    guest: Guest, milvus_figure: str, milvus_benchmark: Measured, seen: Callable[[str], None]
) -> None:
    told(guest, milvus_benchmark, milvus_figure, seen)


def told(guest: Guest, benchmark: Measured, metric: str, seen: Callable[[str], None]) -> None:
    """End the check with the verdict on that metric.

    A program that broke has not measured the rest; what it computed wrong is told by the check of that figure.
    """
    report = benchmark.report
    assert report.verdict != "failed" or metric in report.metrics, f"{guest.name}: {report.reason}"
    decided(guest, benchmark, metric, seen)


def on_the_card(guest: Guest, benchmark: Measured) -> None:
    """A figure of the processor says nothing about a service that is to use the card."""
    report = benchmark.report
    assert not (report.device == "cpu" and report.metrics and guest.gpu is not None and not guest.simulated), (
        f"{guest.name}: {report.software} computed on the CPU ({report.processor}), expected the GPU"
    )

# SPDX-License-Identifier: MIT
"""What a guest says of its GPU, driver and container toolkit."""

from __future__ import annotations

from collections.abc import Sequence

from pyinfra.api import StringCommand

from operations.facts import JsonFact
from operations.remote import program


class DriverFacts(JsonFact):
    """The driver from the PCI bus to nvidia-smi: see `remote/driver.py`."""

    script = program(__file__, "driver")

    def command(self, package_names: Sequence[str], blacklist: str) -> StringCommand:
        return super().command(package_names=list(package_names), blacklist=blacklist)


class NvidiaHealth(JsonFact):
    """Whether the GPU is sound, and what of gpulab-health is on the guest: see `remote/health.py`."""

    script = program(__file__, "health")

    def command(self, files: Sequence[str]) -> StringCommand:
        return super().command(files=list(files))


class PersistenceFacts(JsonFact):
    """The persistence daemon: see `remote/persistence.py`."""

    script = program(__file__, "persistence")

    def command(self, unit: str) -> StringCommand:
        return super().command(unit=unit)


class ToolkitFacts(JsonFact):
    """The container toolkit and its CDI specification: see `remote/toolkit.py`."""

    script = program(__file__, "toolkit")

    def command(self, package_names: Sequence[str], specification: str, unit: str) -> StringCommand:
        return super().command(package_names=list(package_names), specification=specification, unit=unit)

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

    def command(self, package_names: Sequence[str], blacklist: str, policy: bool = False) -> StringCommand:
        return super().command(package_names=list(package_names), blacklist=blacklist, policy=policy)


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


class KernelFacts(JsonFact):
    """The guest's kernels, their modules, and which one boots next: see `remote/kernels.py`."""

    script = program(__file__, "kernels")

    def command(self, dropin: str) -> StringCommand:
        return super().command(dropin=dropin)


class CudaFacts(JsonFact):
    """The CUDA toolkits, and what installing `simulate` would change: see `remote/cuda.py`."""

    script = program(__file__, "cuda")

    def command(self, package_names: Sequence[str], simulate: Sequence[str] = ()) -> StringCommand:
        return super().command(package_names=list(package_names), simulate=list(simulate))

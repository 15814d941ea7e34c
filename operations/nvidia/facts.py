# SPDX-License-Identifier: MIT
"""What a guest says of its GPU, driver and container toolkit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pyinfra.api import StringCommand

from operations.facts import JsonFact
from operations.remote import program


class DriverFacts(JsonFact):
    """The driver from the PCI bus to nvidia-smi: see `remote/driver.py`."""

    script = program(__file__, "driver")

    def command(self, package_names: Sequence[str], blacklist: str, policy: bool = False) -> StringCommand:
        return super().command(package_names=list(package_names), blacklist=blacklist, policy=policy)


class NvidiaHealth(JsonFact):
    """Whether the GPU is sound, and what of gpulab-health is on the guest: see `remote/health.py`."""

    script = program(__file__, "health")

    def command(self, files: Sequence[str]) -> StringCommand:
        return super().command(files=list(files))


class SettingsFacts(JsonFact):
    """What the card is set to, and the unit that sets it: see `remote/settings.py`."""

    script = program(__file__, "settings")

    def command(self, paths: Sequence[str], unit_names: Sequence[str]) -> StringCommand:
        return super().command(paths=list(paths), unit_names=list(unit_names))


class ThermalFacts(JsonFact):
    """The thermal policy's daemon: see `remote/thermal.py`."""

    script = program(__file__, "thermal")

    def command(self, paths: Sequence[str], unit: str) -> StringCommand:
        return super().command(paths=list(paths), unit=unit)


class MpsFacts(JsonFact):
    """MPS: its daemon, limits, user and tenants' profiles: see `remote/mps.py`."""

    script = program(__file__, "mps")

    def command(
        self, paths: Sequence[str], unit: str, pipe: str, tenants: str, user: str, uid: int, order: Mapping[str, Any]
    ) -> StringCommand:
        return super().command(
            paths=list(paths), unit=unit, pipe=pipe, tenants=tenants, user=user, uid=uid, order=dict(order)
        )


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

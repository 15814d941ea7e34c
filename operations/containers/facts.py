# SPDX-License-Identifier: MIT
"""What a guest says of its container engine and of the containers of ours in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pyinfra.api import StringCommand

from operations.facts import JsonFact
from operations.remote import program


class EngineFacts(JsonFact):
    """The engine, its files, images, our containers and what their services answer: see `remote/engine.py`."""

    script = program(__file__, "engine")

    def command(
        self,
        package_names: Sequence[str] = (),
        unit_names: Sequence[str] = (),
        files: Sequence[str] = (),
        probes: Mapping[str, str] | None = None,
        inside: bool = False,
    ) -> StringCommand:
        return super().command(
            package_names=list(package_names),
            unit_names=list(unit_names),
            files=list(files),
            probes=dict(probes or {}),
            inside=inside,
        )


class ProxyFacts(JsonFact):
    """nginx, its unit and our files in it, of the secret ones their digests only: see `remote/proxy_state.py`."""

    script = program(__file__, "proxy_state")

    def command(
        self, package_names: Sequence[str], shown: Sequence[str], secret: Sequence[str], folder: str, socket_path: str
    ) -> StringCommand:
        return super().command(
            package_names=list(package_names),
            shown=list(shown),
            secret=list(secret),
            folder=folder,
            socket_path=socket_path,
        )


class HealingFacts(JsonFact):
    """What looks after the services, and its alarms: see `remote/healing.py`."""

    script = program(__file__, "healing")

    def command(self, paths: Sequence[str], unit: str) -> StringCommand:
        return super().command(paths=list(paths), unit=unit)


class PyTorchFacts(JsonFact):
    """What PyTorch jobs need: see `remote/pytorch.py`."""

    script = program(__file__, "pytorch_environment", "pytorch")

    def command(
        self, image: str, network: str, data: str, mounted: str, paths: Sequence[str], groups: Sequence[str]
    ) -> StringCommand:
        return super().command(
            image=image, network=network, data=data, mounted=mounted, paths=list(paths), groups=list(groups)
        )

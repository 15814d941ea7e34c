# SPDX-License-Identifier: MIT
"""Builds `lab/pytorch`: real PyTorch for the CPU on Debian 12, in place of `pytorch/pytorch:X-cudaY-runtime`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rehearsal.registry import oci
from rehearsal.registry.pytorch import wheels
from rehearsal.registry.recipe import Base, Recipe, Workshop, fingerprint

FOLDER = Path(__file__).parent
#: Debian 12 has the Python that the wheels are for; pip and venv, as an environment is made inside the image.
BASE = Base("bookworm", ("python3", "python3-venv", "python3-pip", "ca-certificates", "libgomp1", "libstdc++6"))
PYTHON = "3.11"
TORCH = ("torch==2.13.0",)
NEEDS = (
    "filelock==4.3.1", "fsspec==2026.9.0", "jinja2==3.1.6", "markupsafe==3.0.4", "mpmath==1.3.0", "networkx==3.6.1",
    "numpy==2.4.6", "sympy==1.14.0", "typing_extensions==4.16.0",
)  # fmt: skip
#: What the image says when a container of it starts.
ENTRY = """\
#!/bin/sh
echo "pytorch: simulated: a real PyTorch, built for the CPU" >&2
exec "$@"
"""


def build(workshop: Workshop) -> oci.Image:
    """The whole image; what changes most often lies on top."""
    return assemble(
        [workshop.base(BASE), _layer(workshop, TORCH), _layer(workshop, NEEDS)],
        workshop.layers,
    )


def _layer(workshop: Workshop, pins: Sequence[str]) -> oci.Layer:
    def make() -> oci.Layer:
        workshop.report(f"building lab/pytorch: {', '.join(pins)}")
        return wheels.layer(workshop.wheels(pins, PYTHON), workshop.scratch, workshop.layers)

    compiled = sys.version_info[:2] == wheels.PYTHON
    key = fingerprint("wheels", pins, PYTHON, compiled, Path(wheels.__file__).read_text())
    return workshop.layer(key, make)


def assemble(below: list[oci.Layer], folder: Path) -> oci.Image:
    """The first process over the layers `below`."""
    top = oci.layer_of_files({"opt/gpulab/entry": ENTRY.encode()}, folder, executable=["opt/gpulab/entry"])
    settings = oci.Settings(
        entrypoint=["/opt/gpulab/entry"],
        command=["bash"],
        environment={
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "NVIDIA_VISIBLE_DEVICES": "all",
            "NVIDIA_DRIVER_CAPABILITIES": "compute,utility",
            "PYTORCH_VERSION": TORCH[0].partition("==")[2],
        },
        labels={
            "org.gpulab.stand-in": "simulated",
            "org.opencontainers.image.title": "real PyTorch for the CPU in place of the CUDA image (simulated)",
        },
        working_dir="/workspace",
    )
    return oci.image([*below, top], settings)


RECIPE = Recipe("pytorch", BASE, [*FOLDER.glob("*.py")], build, pins=[*TORCH, *NEEDS])

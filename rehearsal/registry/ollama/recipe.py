# SPDX-License-Identifier: MIT
"""Builds `lab/ollama`: the API's stand-in, real llama.cpp and one tiny model, with the settings of the real image."""

from __future__ import annotations

import zipfile
from pathlib import Path

from rehearsal.registry import fixture, oci
from rehearsal.registry.recipe import Base, Recipe, Workshop, fingerprint, safe

FOLDER = Path(__file__).parent
OPT = "opt/ollama"
#: llama.cpp with its server, as a wheel with the library inside; the version decides the image's digest.
LLAMA = "xllamacpp==2026.10.11549"
#: What the images on Debian 13 hold of it. The wheel's library links to the C++ and OpenMP libraries.
BASE = Base("trixie", ("python3", "python3-yaml", "libstdc++6", "libgomp1", "curl"))
PYTHON = "3.13"


def programs() -> list[Path]:
    """The modules that run inside the image."""
    return [path for path in sorted(FOLDER.glob("*.py")) if path.name not in ("__init__.py", "recipe.py")]


def build(workshop: Workshop) -> oci.Image:
    """The whole image."""
    library = workshop.layer(fingerprint("ollama", LLAMA, PYTHON), lambda: _library(workshop))
    return assemble([workshop.base(BASE), library], workshop.scratch, workshop.layers)


def assemble(below: list[oci.Layer], scratch: Path, folder: Path) -> oci.Image:
    """The stand-in's programs and its one model over the layers `below`."""
    model = scratch / "tiny_latest.gguf"
    fixture.write_tiny(model)
    files: dict[str, bytes | Path] = {f"{OPT}/{path.name}": path for path in programs()}
    files[f"{OPT}/available/{model.name}"] = model
    files["usr/bin/ollama"] = f'#!/bin/sh\nexec /usr/bin/python3 -IS /{OPT}/server.py "$@"\n'.encode()
    top = oci.layer_of_files(files, folder, executable=["usr/bin/ollama"])
    settings = oci.Settings(
        entrypoint=["/bin/ollama"],
        command=["serve"],
        environment={
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "OLLAMA_HOST": "0.0.0.0:11434",
            "NVIDIA_VISIBLE_DEVICES": "all",
            "NVIDIA_DRIVER_CAPABILITIES": "compute,utility",
        },
        labels={"org.gpulab.stand-in": "simulated", "org.opencontainers.image.title": "Ollama stand-in (simulated)"},
        ports=[11434],
    )
    return oci.image([*below, top], settings)


def _library(workshop: Workshop) -> oci.Layer:
    """llama.cpp's files where the runner looks for them."""
    workshop.report("building lab/ollama")
    (wheel,) = workshop.wheels([LLAMA], PYTHON)
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/") and safe(name)]
        return oci.layer_of_files({f"{OPT}/lib/{name}": archive.read(name) for name in names}, workshop.layers)


RECIPE = Recipe("ollama", BASE, [*FOLDER.glob("*.py"), Path(fixture.__file__)], build, pins=[LLAMA])

# SPDX-License-Identifier: MIT
"""Builds `lab/milvus`: the real Milvus server of PyPI's `milvus` on Debian, laid out and set as `milvusdb/milvus` is.

The package holds upstream's server, libraries and settings file for the CPU. `lab/milvus-before` is an older one.
"""

from __future__ import annotations

import lzma
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

from rehearsal.registry import oci
from rehearsal.registry.ollama.recipe import BASE
from rehearsal.registry.recipe import Recipe, Workshop, fingerprint

FOLDER = Path(__file__).parent
NOW = "milvus==2.3.5"
#: The server before it, for the check that an upgrade keeps what collections answer.
EARLIER = "milvus==2.3.3"
#: Only to choose a wheel by: the package's own code is not used.
PYTHON = "3.13"
#: Values of the package's settings file, where upstream's image has other ones than its text's defaults. Storage and
#: etcd are upstream's, too: whoever wants all in one container has to say so.
UPSTREAM = {
    "etcd_data_dir": "default.etcd",
    "local_storage_dir": "/var/lib/milvus/data/",
    "rocksmq_data_dir": "/var/lib/milvus/rdb_data",
    "system_log_path": "",
}
#: The same for lines that no placeholder is in.
EDITS = (
    ("    embed: true ", "    embed: false "),
    ("  storageType: local ", "  storageType: remote "),
)  # fmt: skip
#: What the GPU image's file has beside it: MiB that its pool takes, at first and at most.
GPU = "\ngpu:\n  initMemSize: 2048\n  maxMemSize: 4096\n"
#: The C library's own comes with Debian's.
NOT_TAKEN = ("libresolv.so.2",)


def server_files(wheel: Path) -> dict[str, bytes]:
    """The server, its libraries and settings: path in the image to content."""
    files = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            path = Path(name)
            if path.suffix == ".lzma" and path.stem not in NOT_TAKEN:
                folder = "bin" if path.stem == "milvus" else "lib"
                files[f"milvus/{folder}/{path.stem}"] = lzma.decompress(archive.read(name))
            elif path.name == "glog.conf":
                files["milvus/configs/glog.conf"] = archive.read(name)
            elif path.name == "config.yaml.template":
                files["milvus/configs/milvus.yaml"] = settings_file(archive.read(name).decode()).encode()
    return files


def settings_file(template: str, values: Mapping[str, str] = UPSTREAM) -> str:
    """milvus.yaml: the package's template, with the values of upstream's image."""

    def filled(match: re.Match[str]) -> str:
        name, _, default = match.group(1).partition(":")
        name = name.partition("(")[0].strip()
        return values.get(name, default.strip())

    text = re.sub(r"\{\{(.*?)\}\}", filled, template)
    for before, after in EDITS:
        if before not in text:
            raise ValueError(f"milvus.yaml: expected a line with {before.strip()!r}")
        text = text.replace(before, after)
    return text + GPU


def assemble(below: list[oci.Layer], folder: Path) -> oci.Image:
    """The first process over the layers `below`, with the settings of the real image."""
    files: dict[str, bytes | Path] = {"opt/milvus/entry.py": FOLDER / "entry.py"}
    # Not -S: yaml is a package of Debian's.
    files["tini"] = b'#!/bin/sh\nexec /usr/bin/python3 -IB /opt/milvus/entry.py "$@"\n'
    top = oci.layer_of_files(files, folder, executable=["tini"])
    settings = oci.Settings(
        entrypoint=["/tini", "--"],
        command=["milvus", "run", "standalone"],
        environment={
            "PATH": "/milvus/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "NVIDIA_VISIBLE_DEVICES": "all",
            "NVIDIA_DRIVER_CAPABILITIES": "compute,utility",
        },
        labels={
            "org.gpulab.stand-in": "simulated",
            "org.opencontainers.image.title": "real Milvus server for the CPU in place of the GPU image (simulated)",
        },
        ports=[19530, 9091],
        working_dir="/milvus",
    )
    return oci.image([*below, top], settings)


def recipe(name: str, pin: str, on_request: bool = False) -> Recipe:
    """The image of one version of the server."""

    def server(workshop: Workshop) -> oci.Layer:
        workshop.report(f"building lab/{name}")
        (wheel,) = workshop.wheels([pin], PYTHON)
        files = server_files(wheel)
        return oci.layer_of_files(
            files, workshop.layers, executable=[path for path in files if "/configs/" not in path]
        )

    def build(workshop: Workshop) -> oci.Image:
        key = fingerprint("milvus", pin, UPSTREAM, EDITS, GPU, NOT_TAKEN)
        return assemble([workshop.base(BASE), workshop.layer(key, lambda: server(workshop))], workshop.layers)

    return Recipe(name, BASE, [*FOLDER.glob("*.py")], build, pins=[pin], on_request=on_request)


RECIPE = recipe("milvus", NOW)
BEFORE = recipe("milvus-before", EARLIER, on_request=True)

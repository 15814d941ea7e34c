# SPDX-License-Identifier: MIT
"""Installs wheels into a layer: their files, compiled, without what no program reads."""

from __future__ import annotations

import compileall
import hashlib
import py_compile
import sys
import zipfile
from collections.abc import Iterable
from configparser import ConfigParser
from pathlib import Path

from rehearsal.registry import oci
from rehearsal.registry.recipe import safe

SITE = "usr/local/lib/python3.11/dist-packages"
PYTHON = (3, 11)
#: Folders and endings that are for tests, or for who compiles against a package.
FOLDERS = ("tests", "test", "include", "cmake")
ENDINGS = (".a", ".h", ".hpp", ".cuh", ".cpp", ".pyi", ".pxd", ".pyx", ".lib")
#: These names are modules that programs import, too.
NEEDED = ("torch/utils/", "torch/testing/", "torch/distributed/", "torch/_inductor/")


def wanted(name: str) -> bool:
    """Does a file of a wheel go into the image?"""
    if name.endswith("/") or not safe(name) or name.endswith(ENDINGS):
        return False
    return name.startswith(NEEDED) or not set(Path(name).parts[:-1]) & set(FOLDERS)


def unpack(wheels: Iterable[Path], target: Path) -> list[str]:
    """Unpack wheels below `target` as pip would; returns the programs, as paths in the image."""
    programs = []
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in filter(wanted, archive.namelist()):
                path = target / SITE / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(name))
                # Zip archives keep a file's mode in the upper half.
                if archive.getinfo(name).external_attr >> 16 & 0o111 and "/bin/" in f"/{name}":
                    programs.append(f"{SITE}/{name}")
                if name.endswith(".dist-info/entry_points.txt"):
                    programs += _scripts(path.read_text(), target)
    return programs


def _scripts(text: str, target: Path) -> list[str]:
    entries = ConfigParser(delimiters=("=",))
    entries.optionxform = str  # type: ignore[assignment, method-assign]
    entries.read_string(text)
    made = []
    for name, place in entries["console_scripts"].items() if entries.has_section("console_scripts") else []:
        module, _, function = place.partition(":")
        script = target / "usr/local/bin" / name
        script.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            "#!/usr/bin/python3",
            "import sys",
            "",
            f"from {module} import {function}",
            "",
            f"sys.exit({function}())",
        ]
        script.write_text("\n".join([*lines, ""]))
        made.append(f"usr/local/bin/{name}")
    return made


def compile_all(target: Path) -> None:
    """Compiled modules beside the sources: nobody can write them where the root is read-only.

    They carry a hash in place of a time, and it is not checked. Another version of Python than the image's compiles
    nothing: the image works all the same, and slowly.
    """
    if sys.version_info[:2] == PYTHON:
        compileall.compile_dir(
            target / SITE, quiet=2, workers=0, stripdir=str(target), prependdir="/",
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )  # fmt: skip


def layer(wheels: Iterable[Path], scratch: Path, folder: Path) -> oci.Layer:
    """A layer with these wheels installed."""
    found = list(wheels)
    target = scratch / f"installed-{hashlib.sha256(str(found).encode()).hexdigest()[:8]}"
    programs = unpack(found, target)
    compile_all(target)
    files: dict[str, bytes | Path] = {
        str(path.relative_to(target)): path for path in target.rglob("*") if path.is_file()
    }
    return oci.layer_of_files(files, folder, executable=programs)

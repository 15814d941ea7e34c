# SPDX-License-Identifier: MIT
"""How an image of the lab is described, and what one build of it may use: bases of Debian, wheels, cached layers."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from inventory import GpulabError
from rehearsal import image
from rehearsal.registry import oci

Report = Callable[[str], None]

#: Paths of a base that programs do not read, or that differ from one build to the next.
LEFT_OUT = (
    "usr/share/doc/", "usr/share/man/", "usr/share/locale/", "usr/share/info/", "var/cache/", "var/log/",
    "var/lib/apt/", "var/lib/dpkg/info/", "etc/machine-id", "etc/hostname", "etc/resolv.conf",
    "etc/apt/sources.list", "dev/",
)  # fmt: skip
#: What wheels of compiled code may be built for: the bases have newer C libraries than these.
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "linux_x86_64")


@dataclass(frozen=True)
class Base:
    """A Debian root of one suite with packages; images that name the same one share its layer."""

    suite: str
    packages: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """One image. It is built again when its base, its module's files or `pins` change, and not when another's do."""

    name: str
    base: Base
    #: Files that decide what the image is, beside `recipe.py` and `oci.py`.
    sources: Sequence[Path]
    build: Callable[[Workshop], oci.Image]
    #: What is downloaded for it: `package==version`.
    pins: Sequence[str] = ()
    #: Built when it is asked for by name, and not for every lab.
    on_request: bool = False

    def key(self) -> str:
        """A digest of all that the image is made from."""
        digest = hashlib.sha256(json.dumps([self.name, list(self.pins), base_key(self.base)]).encode())
        for path in sorted({Path(__file__), Path(oci.__file__), *self.sources}):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()


@dataclass
class Workshop:
    """Where one build of images works. `known` are layers of earlier builds, by their key."""

    scratch: Path
    report: Report
    known: dict[str, oci.Layer] = field(default_factory=dict)

    @property
    def layers(self) -> Path:
        """The folder of the layers that this build makes."""
        folder = self.scratch / "layers"
        folder.mkdir(exist_ok=True)
        return folder

    def layer(self, key: str, make: Callable[[], oci.Layer]) -> oci.Layer:
        """The layer of this key, made unless an earlier build has."""
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]

    def base(self, base: Base) -> oci.Layer:
        """A base's layer."""

        def make() -> oci.Layer:
            self.report(f"building a base of the lab's container images (Debian {base.suite})")
            return oci.layer_of_tar(debian(base, self.scratch, self.scratch / "base.tar"), self.layers, keep=kept)

        return self.layer(base_key(base), make)

    def wheels(self, requirements: Sequence[str], python: str) -> list[Path]:
        """Wheels of exactly these `package==version`, for a version of Python."""
        target = self.scratch / fingerprint("wheels", *requirements, python)
        download(requirements, python, target, "--no-deps")
        return sorted(target.glob("*.whl"))


def fingerprint(name: str, *parts: object) -> str:
    """The key of a layer that is made from `parts`."""
    return f"{name}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}"


def base_key(base: Base) -> str:
    """A digest of all that a base's layer is made from."""
    stanzas = [source.stanza() for source in image.sources(base.suite)]
    parts = [
        base.suite,
        base.packages,
        LEFT_OUT,
        stanzas,
        inspect.getsource(debian),
        inspect.getsource(oci.layer_of_tar),
    ]
    return fingerprint("base", *parts)


def kept(path: str) -> bool:
    """Does an entry of a base go into the image?"""
    return not f"{path}/".startswith(LEFT_OUT)


def debian(base: Base, folder: Path, target: Path) -> Path:
    """A root of Debian as a tar archive, from the control machine's own package sources.

    Raises:
        GpulabError: mmdebstrap failed.
    """
    log = folder / "base.log"
    command = [
        "mmdebstrap", "--mode=root", "--variant=essential", "--format=tar", f"--include={','.join(base.packages)}",
        *(f"--aptopt={setting.rstrip(';')}" for setting in image.apt_settings()),
        base.suite, str(target), "-",
    ]  # fmt: skip
    text = "\n".join(source.stanza() for source in image.sources(base.suite)).encode()
    # SOURCE_DATE_EPOCH makes Python's compiled files carry a hash instead of a time.
    environment = {**os.environ, "TMPDIR": str(target.parent), "SOURCE_DATE_EPOCH": "0"}
    with open(log, "wb") as sink:
        done = subprocess.run(command, input=text, stdout=sink, stderr=subprocess.STDOUT, env=environment, check=False)
    if done.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise GpulabError(f"Building the images' base ended with {done.returncode}", tail)
    return target


def download(requirements: Sequence[str], python: str, target: Path, *options: str) -> None:
    """Wheels into `target`, by the control machine's own pip settings.

    Raises:
        GpulabError: pip cannot.
    """
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    argv = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--only-binary=:all:",
        *options, "--python-version", python, *platforms, "--dest", str(target), *requirements,
    ]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise GpulabError(f"pip could not download {', '.join(requirements)} for Python {python}", done.stderr.strip())


def safe(name: str) -> bool:
    """Does a name of an archive stay inside its folder?"""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts

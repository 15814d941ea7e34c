# SPDX-License-Identifier: MIT
"""What the lab calls: `prepare()` builds the images into the cache, `start()` serves them under the lab's CA."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from inventory import GpulabError
from rehearsal import ca, image, network, paths, processes
from rehearsal.registry import fixture, oci, server

PORT = 5000
PROCESS = "registry"
OLLAMA = Path(__file__).parent / "ollama"
OPT = "opt/ollama"
#: llama.cpp with its server, as a wheel with the library inside; the version decides the image's digest.
LLAMA = "xllamacpp==2026.10.11549"
#: What the image holds of Debian 13, and what the wheel's library links to.
BASE = ("python3", "libstdc++6", "libgomp1")
PYTHON = "3.13"
#: Paths of the base that programs do not read, or that differ from one build to the next.
LEFT_OUT = (
    "usr/share/doc/", "usr/share/man/", "usr/share/locale/", "usr/share/info/", "var/cache/", "var/log/",
    "var/lib/apt/", "var/lib/dpkg/info/", "etc/machine-id", "etc/hostname", "etc/resolv.conf",
    "etc/apt/sources.list", "dev/",
)  # fmt: skip


def cache() -> Path:
    """The folder of the built images: `store/` is the registry's, `images.json` names them by digest."""
    return paths.cache() / "registry"


def programs() -> Path:
    """Where docker-registry is unpacked to when it is not installed."""
    return cache() / "programs"


def host() -> str:
    """`address:port` under which the lab's hosts know the registry."""
    return f"{network.current().gateway}:{PORT}"


def prepare(report: Callable[[str], None] = print) -> dict[str, str]:
    """Build the images unless the cache has them from the same sources; returns name -> reference by digest.

    Raises:
        GpulabError: a build step failed.
    """
    folder = cache()
    folder.mkdir(parents=True, exist_ok=True)
    server.fetch(programs(), report)
    digests = folder / "digests.json"
    wanted = key()
    known = json.loads(digests.read_text()) if digests.exists() else {}
    if known.get("key") != wanted:
        digests.unlink(missing_ok=True)
        known = {"key": wanted, "ollama": _build_ollama(folder, report)}
        digests.write_text(json.dumps(known, indent=2) + "\n")
    references = {name: f"{host()}/lab/{name}@{digest}" for name, digest in known.items() if name != "key"}
    (folder / "images.json").write_text(json.dumps(references, indent=2) + "\n")
    return references


def read() -> dict[str, str]:
    """What `prepare()` built: name -> reference by digest."""
    found: dict[str, str] = json.loads((cache() / "images.json").read_text())
    return found


def start() -> dict[str, dict[str, str]]:
    """Serve the store over TLS on the bridge until the lab goes down.

    Returns:
        `registry_ca` (registry to the PEM file of its CA) and `images` (name to reference by digest).
    """
    gateway = network.current().gateway
    authority = ca.authority(paths.ca())
    if not processes.running(PROCESS):
        pair = authority.issue("registry", [gateway])
        settings = server.write_settings(
            paths.lab() / "registry.yml", cache() / "store", gateway, PORT, pair.certificate, pair.key
        )
        processes.start(PROCESS, [str(server.program(programs())), "serve", str(settings)])
    server.wait(oci.Registry(f"https://{host()}", authority.certificate))
    return {"registry_ca": {host(): str(authority.certificate)}, "images": read()}


def key() -> str:
    """A digest of all that the images are made from."""
    digest = hashlib.sha256(json.dumps([LLAMA, BASE, PYTHON, LEFT_OUT]).encode())
    digest.update("".join(source.stanza() for source in image.sources()).encode())
    for path in sorted([Path(fixture.__file__), Path(oci.__file__), Path(__file__), *OLLAMA.glob("*.py")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _build_ollama(folder: Path, report: Callable[[str], None]) -> str:
    """Build and push `lab/ollama`; returns its digest."""
    layers = folder / "layers"
    layers.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        report("building the base of the lab's container images")
        base = oci.layer_of_tar(_base(folder, Path(scratch) / "base.tar"), layers, keep=kept)
        report("building lab/ollama")
        wheel = _wheel(Path(scratch))
        built = ollama_image([base, _library_layer(wheel, layers)], Path(scratch), layers)
        store = Path(scratch) / "store"
        with server.temporary(store, Path(scratch) / "registry.yml", server.program(programs())) as registry:
            digest = registry.push("lab/ollama", built)
        shutil.rmtree(folder / "store", ignore_errors=True)
        store.rename(folder / "store")
    shutil.rmtree(layers)
    return digest


def ollama_image(below: list[oci.Layer], scratch: Path, folder: Path) -> oci.Image:
    """The stand-in's programs and its one model over the layers `below`; the same settings as the real image."""
    model = scratch / "tiny_latest.gguf"
    fixture.write_tiny(model)
    files: dict[str, bytes | Path] = {f"{OPT}/{path.name}": path for path in OLLAMA.glob("*.py")}
    files[f"{OPT}/available/{model.name}"] = model
    files[f"{OPT}/available/{model.with_suffix('.json').name}"] = model.with_suffix(".json")
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


def kept(path: str) -> bool:
    """Does an entry of the base go into the image?"""
    return not f"{path}/".startswith(LEFT_OUT)


def _base(folder: Path, target: Path) -> Path:
    """A Debian 13 root with Python, from the control machine's own package sources."""
    settings = image.apt_settings()
    log = folder / "base.log"
    command = [
        "mmdebstrap", "--mode=root", "--variant=essential", "--format=tar", f"--include={','.join(BASE)}",
        *(f"--aptopt={setting.rstrip(';')}" for setting in settings),
        image.SUITE, str(target), "-",
    ]  # fmt: skip
    text = "\n".join(source.stanza() for source in image.sources()).encode()
    # SOURCE_DATE_EPOCH makes Python's compiled files carry a hash instead of a time.
    environment = {**os.environ, "TMPDIR": str(target.parent), "SOURCE_DATE_EPOCH": "0"}
    with open(log, "wb") as sink:
        done = subprocess.run(command, input=text, stdout=sink, stderr=subprocess.STDOUT, env=environment, check=False)
    if done.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise GpulabError(f"Building the images' base ended with {done.returncode}", tail, f"the whole log: {log}")
    return target


def _wheel(folder: Path) -> Path:
    """llama.cpp's wheel for the image's Python, by the control machine's own pip settings."""
    argv = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
        "--python-version", PYTHON, "--platform", "manylinux_2_28_x86_64", "--platform", "manylinux2014_x86_64",
        "--dest", str(folder), LLAMA,
    ]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    found = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not found:
        raise GpulabError(f"pip could not download {LLAMA} for Python {PYTHON}", done.stderr.strip())
    return found[0]


def _library_layer(wheel: Path, folder: Path) -> oci.Layer:
    """A wheel's files as a layer, where the runner looks for them."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/") and safe(name)]
        return oci.layer_of_files({f"{OPT}/lib/{name}": archive.read(name) for name in names}, folder)


def safe(name: str) -> bool:
    """Does a name of an archive stay inside its folder?"""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts

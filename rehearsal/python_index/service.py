# SPDX-License-Identifier: MIT
"""What the lab calls: `prepare()` downloads the wheels into the cache, `start()` serves them under the lab's CA.

The wheels are PyPI's own, brought by the control machine's pip; a guest's pip asks this index and no other.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rehearsal import ca, network, paths, processes
from rehearsal.nvidia.service import wait_listening
from rehearsal.registry.recipe import download

PORT = 8097
PROCESS = "python-index"
#: What the index holds, by the version of Python that it is for: the driver of Milvus with all it needs, for the
#: guests' own Python, and packages for an environment of PyTorch jobs, which have the Python of their image.
DRIVER = (
    "pymilvus==3.0.2", "cachetools==8.0.2", "grpcio==1.85.3", "numpy==2.4.6", "orjson==3.13.0", "pandas==3.1.1",
    "protobuf==7.36.2", "python-dateutil==2.9.0.post0", "python-dotenv==1.2.4", "requests==2.34.2", "six==1.17.0",
    "typing_extensions==4.16.0", "tzdata==2026.6", "urllib3==2.8.0", "certifi==2026.10.18",
    "charset-normalizer==3.5.3", "idna==3.20", "setuptools==84.2.1",
)  # fmt: skip
PACKAGES: Mapping[str, Sequence[str]] = {"3.13": DRIVER, "3.11": (*DRIVER, "einops==0.8.2")}

Fetch = Callable[[Sequence[str], str, Path], None]


def wheels(requirements: Sequence[str], python: str, target: Path) -> None:
    """Wheels of exactly these packages."""
    download(requirements, python, target, "--no-deps")


def prepare(folder: Path | None = None, fetch: Fetch = wheels) -> Path:
    """Fill the index in `folder` (default: the cache), unless it holds these packages already.

    Raises:
        GpulabError: pip cannot download one.
    """
    folder = folder or cache()
    stamp = folder / "key.json"
    wanted = json.dumps({python: sorted(names) for python, names in PACKAGES.items()}, indent=2) + "\n"
    if not stamp.exists() or stamp.read_text() != wanted:
        print("filling the lab's Python index (wheels of PyPI)")
        new = folder / "www.new"
        shutil.rmtree(new, ignore_errors=True)
        (new / "files").mkdir(parents=True)
        for python, names in PACKAGES.items():
            fetch(names, python, new / "files")
        write_pages(new)
        stamp.unlink(missing_ok=True)
        shutil.rmtree(folder / "www", ignore_errors=True)
        new.rename(folder / "www")
        stamp.write_text(wanted)
    return folder


def start() -> dict[str, dict[str, str]]:
    """Serve the index on the bridge until the lab goes down; returns keys of an inventory, `python_index`.

    Raises:
        GpulabError: the server does not listen within seconds.
    """
    gateway = network.current().gateway
    authority = ca.authority(paths.ca())
    if not processes.running(PROCESS):
        pair = authority.issue(PROCESS, [gateway])
        argv = [sys.executable, "-m", "rehearsal.python_index", "--address", gateway, "--port", str(PORT)]
        argv += ["--certificate", str(pair.certificate), "--key", str(pair.key), str(cache() / "www")]
        processes.start(PROCESS, argv)
    wait_listening(PROCESS, PORT)
    return {"python_index": {"url": f"https://{gateway}:{PORT}/simple", "ca": str(authority.certificate)}}


def cache() -> Path:
    """The folder of the index; `www` in it is what is served."""
    return paths.cache() / "python-index"


def write_pages(www: Path) -> None:
    """PEP 503's pages below `simple/`, each link with the digest of its wheel in `files/`."""
    projects: dict[str, list[Path]] = {}
    for path in sorted((www / "files").glob("*.whl")):
        projects.setdefault(normalised(path.name.partition("-")[0]), []).append(path)
    _page(www / "simple/index.html", [(f"{name}/", name) for name in projects])
    for name, found in projects.items():
        links = [(f"../../files/{path.name}#sha256={_digest(path)}", path.name) for path in found]
        _page(www / f"simple/{name}/index.html", links)


def normalised(name: str) -> str:
    """A project's name as PEP 503 has it."""
    return re.sub("[-_.]+", "-", name).lower()


def _page(path: Path, links: Sequence[tuple[str, str]]) -> None:
    path.parent.mkdir(parents=True)
    anchors = "\n".join(f'<a href="{html.escape(target)}">{html.escape(text)}</a>' for target, text in links)
    path.write_text(f"<!DOCTYPE html>\n<title>Python index of the rehearsal</title>\n{anchors}\n")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

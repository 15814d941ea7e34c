# SPDX-License-Identifier: MIT
"""NVML for the programs of ours that stay on a guest: nvidia-ml-py's one file, as it is installed here.

Guests' own packages of it are years apart and lie in `contrib`; this one is pinned with the rest of our packages.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from inventory import GpulabError
from operations.files import File

#: Where programs of ours look for modules of ours.
FOLDER = "/usr/local/lib/gpulab"
PATH = f"{FOLDER}/pynvml.py"


def nvml() -> dict[str, File | None]:
    """The file to put on a guest, by its path there.

    Raises:
        GpulabError: nvidia-ml-py is not installed beside gpulab.
    """
    module = importlib.util.find_spec("pynvml")
    if module is None or module.origin is None:
        raise GpulabError("nvidia-ml-py is not installed beside gpulab", resolution="make setup")
    return {PATH: File(Path(module.origin).read_text())}

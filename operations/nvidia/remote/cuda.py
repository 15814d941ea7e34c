# SPDX-License-Identifier: MIT
"""Runs on the guest: its CUDA toolkits, and what apt would do to install others."""

import re
from typing import Any

from operations.remote.common import answer, packages, run


def read(package_names: list[str], simulate: list[str]) -> dict[str, Any]:
    """The installed toolkits, and the packages that installing `simulate` would change."""
    toolkits = packages(["cuda-toolkit-*"])
    asked = ["apt-get", "-s", "-q", "--no-install-recommends", "install", *simulate]
    status, output, errors = run(*asked, timeout=120) if simulate else (0, "", "")
    return {
        "packages": packages(package_names),
        "toolkits": {
            name: version
            for name, version in sorted(toolkits.items())
            if version and re.fullmatch(r"cuda-toolkit-\d+-\d+", name)
        },
        "driver": run("modinfo", "-F", "version", "nvidia")[1].strip() or None,
        "simulation": {"status": status, "output": output + errors},
    }


if __name__ == "__main__":
    answer(read)

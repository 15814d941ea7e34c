# SPDX-License-Identifier: MIT
"""Runs on the guest: the container toolkit and the CDI specification that it wrote."""

import os
import re
from typing import Any

from operations.remote.common import answer, packages, run, text, units


def read(package_names: list[str], specification: str, unit: str) -> dict[str, Any]:
    """The toolkit's packages, the unit's file and state, and what the CDI specification describes."""
    spec = text(specification)
    # JSON is YAML too, and there is no YAML parser to count on.
    versions = sorted(set(re.findall(r"lib(?:cuda|nvidia-ml)\.so\.([0-9]+(?:\.[0-9]+)+)", spec or "")))
    paths = set(re.findall(r"(?:hostPath|path)\"?: *\"?(/[^\"\s,}]+)", spec or ""))
    return {
        "packages": packages(package_names),
        "unit_file": text(f"/etc/systemd/system/{unit}"),
        "unit": units([unit])[unit],
        "loaded": (text("/sys/module/nvidia/version") or "").strip() or None,
        "specification": spec is not None,
        "specification_versions": versions,
        # A library or a device node that is gone makes every start fail.
        "specification_missing": sorted(path for path in paths if not os.path.exists(path)),
        "devices": sorted(set(run("nvidia-ctk", "cdi", "list")[1].split())),
    }


if __name__ == "__main__":
    answer(read)

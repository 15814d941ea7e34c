# SPDX-License-Identifier: MIT
"""Runs on the guest: the container toolkit and the CDI specifications of the GPU, ours and others."""

import glob
import os
import re
from typing import Any

from operations.remote.common import answer, packages, run, text, units

KIND = "nvidia.com/gpu"
#: Where engines look for specifications.
FOLDERS = ("/etc/cdi", "/var/run/cdi")
#: Injects a GPU into every container that asks by its environment, besides CDI: left by old toolkits and guides.
HOOK = "/usr/share/containers/oci/hooks.d/oci-nvidia-hook.json"
#: Settings of the unit of NVIDIA's own that writes the specification, too.
REFRESH = "/etc/nvidia-container-toolkit/nvidia-cdi-refresh.env"


def read(package_names: list[str], specification: str, unit: str) -> dict[str, Any]:
    """The toolkit's packages, the unit's file and state, and what the CDI specifications describe."""
    spec = text(specification)
    # JSON is YAML too, and there is no YAML parser to count on.
    versions = sorted(set(re.findall(r"lib(?:cuda|nvidia-ml)\.so\.([0-9]+(?:\.[0-9]+)+)", spec or "")))
    paths = set(re.findall(r"(?:hostPath|path)\"?: *\"?(/[^\"\s,}]+)", spec or ""))
    refresh = re.findall(r"^\s*NVIDIA_CTK_CDI_OUTPUT_FILE_PATH=[\"']?([^\"'\s]+)", text(REFRESH) or "", re.M)
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
        "seconds": seconds(specification, device_names(spec or "")),
        "hook": HOOK if os.path.exists(HOOK) else None,
        "refresh": {"file": REFRESH, "output": refresh[-1]} if refresh else None,
    }


def seconds(specification: str, names: set[str]) -> list[str]:
    """The other specifications of the same kind that describe a device of ours once more."""
    files = sorted(path for folder in FOLDERS for path in glob.glob(f"{folder}/*") if path != specification)
    # Every specification of a GPU has an `all`.
    return [path for path in files if device_names(text(path) or "") & (names | {"all"})]


def device_names(spec: str) -> set[str]:
    """The devices of a specification of our kind: names in lists or objects, not those of hooks or variables."""
    if not re.search(rf"""["']?kind["']?\s*:\s*["']?{re.escape(KIND)}(?:["'\s,}}]|$)""", spec):
        return set()
    return set(re.findall(r"""(?:-\s+|["'{,]\s*|^\s+)["']?name["']?\s*:\s*["']?([^\s"',}]+)""", spec, re.M))


if __name__ == "__main__":
    answer(read)

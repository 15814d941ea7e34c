# SPDX-License-Identifier: MIT
"""Runs on the guest: what is there of the healing of services, and the alarms that it has raised."""

import os
from typing import Any

from operations.remote.common import answer, files, text, units

ALARMS = "/var/lib/gpulab/heal/alarm"


def read(paths: list[str], unit: str) -> dict[str, Any]:
    """The files, the timer, and why each alarm was raised."""
    names = sorted(os.listdir(ALARMS)) if os.path.isdir(ALARMS) else []
    alarms = {name: (text(f"{ALARMS}/{name}") or "").strip() for name in names}
    return {"files": files(paths), "unit": units([unit])[unit], "alarms": alarms}


if __name__ == "__main__":
    answer(read)

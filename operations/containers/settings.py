# SPDX-License-Identifier: MIT
"""Docker's settings, daemon.json: what is ours in it, put into what somebody else wrote there.

| key | what becomes of it |
|---|---|
| `features.cdi` | true; other features stay |
| `live-restore` | true |
| `log-driver`, `log-opts` | where nobody chose: `local` with bounds; `local` and `json-file` get the bounds they lack; any other driver and its options stay |
| `cdi-spec-dirs` | a list of somebody else's gets the folder that it lacks |
| `userns-remap` | refused where clients share the GPU by MPS |
| all others | stay as they are |
"""  # noqa: E501

from __future__ import annotations

import json
from typing import Any

from inventory import GpulabError

DAEMON = "/etc/docker/daemon.json"

#: What bounds a container's log on the disk; json-file is without bounds unless told.
BOUNDS = {"max-size": "20m", "max-file": "5"}
#: The log drivers that take these options. Docker's own default is json-file.
BOUNDED = ("local", "json-file")

#: Where the container toolkit's specification lies: /var/run is /run.
SPECIFICATIONS = ("/var/run/cdi", "/run/cdi")


def parsed(text: str | None) -> dict[str, Any]:
    """What stands in daemon.json, nothing for one that is absent or empty.

    Raises:
        GpulabError: it is not a JSON object.
    """
    if text is None or not text.strip():
        return {}
    mend = f"mend {DAEMON} in the guest; `python3 -m json.tool {DAEMON}` prints it once it is right"
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        line = (text.splitlines() or [""])[min(error.lineno, len(text.splitlines())) - 1].strip()
        raise GpulabError(
            f"{DAEMON} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}",
            f"The line: {line}\nThe file was left as it is.",
            mend,
        ) from None
    if not isinstance(found, dict):
        raise GpulabError(f"{DAEMON} is not a JSON object", "The file was left as it is.", mend)
    return found


def daemon_settings(text: str | None, sharing: str = "") -> str:
    """daemon.json with our settings put into what is there.

    + text: the file as it is
    + sharing: how the GPU is shared, as the inventory says it

    Raises:
        GpulabError: the file is not a JSON object, or maps users where MPS needs them as they are.
    """
    current = parsed(text)
    if sharing == "mps" and current.get("userns-remap"):
        raise GpulabError(
            f"{DAEMON} has userns-remap = {current['userns-remap']!r}, and the GPU is shared by MPS",
            "An MPS server serves one user id, so one must be the same inside and outside of a container. "
            "The file was left as it is.",
            f"take userns-remap out of {DAEMON}, or set `nvidia.sharing` to time-slice",
        )
    features = current.get("features")
    current["features"] = {**(features if isinstance(features, dict) else {}), "cdi": True}
    # Containers outlive a restart of the engine.
    current["live-restore"] = True
    current.update(_logs(current))
    folders = current.get("cdi-spec-dirs")
    if isinstance(folders, list) and not set(SPECIFICATIONS) & {str(folder).rstrip("/") for folder in folders}:
        current["cdi-spec-dirs"] = [*folders, SPECIFICATIONS[0]]
    return json.dumps(current, indent=2, sort_keys=True) + "\n"


def _logs(current: dict[str, Any]) -> dict[str, Any]:
    """The log settings to put in; none where somebody chose a driver that keeps its bounds elsewhere."""
    if "log-driver" not in current and "log-opts" not in current:
        return {"log-driver": "local", "log-opts": dict(BOUNDS)}
    if log_driver(current) not in BOUNDED:
        return {}
    options = current.get("log-opts")
    return {"log-opts": {**BOUNDS, **(options if isinstance(options, dict) else {})}}


def log_driver(settings: dict[str, Any]) -> str:
    """The log driver that Docker takes by these settings."""
    return str(settings.get("log-driver") or "json-file")


def same(current: str | None, wanted: str) -> bool:
    """Do two texts of daemon.json say the same? Order and spacing of the keys are whoever's wrote it."""
    try:
        return current is not None and _normal(current) == _normal(wanted)
    except ValueError:
        return False


def _normal(text: str) -> str:
    # Compared as text: to Python, 1 is true.
    return json.dumps(json.loads(text), sort_keys=True)

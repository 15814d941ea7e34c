# SPDX-License-Identifier: MIT
"""What the API says of one VM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class VmState:
    """A VM as the API shows it. `uptime_s`: seconds since its start, 0 when stopped."""

    status: str
    uptime_s: float = 0
    lock: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

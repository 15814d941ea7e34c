# SPDX-License-Identifier: MIT
"""What the front answers itself: method, path template, who may call it, and the function that answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rehearsal.pve import access
from rehearsal.pve.state import Store

Value = str | list[str]


@dataclass(frozen=True)
class Call:
    """One authenticated request. `params` holds query, body and path parameters, as text or lists of text."""

    method: str
    path: str
    user: str
    params: Mapping[str, Value] = field(default_factory=dict)

    @property
    def is_root(self) -> bool:
        """Only the root@pam login itself: a token of root is somebody else."""
        return self.user == access.ROOT

    def text(self, name: str, default: str = "") -> str:
        value = self.params.get(name, default)
        return value if isinstance(value, str) else value[-1]

    def number(self, name: str, default: int = 0) -> int:
        return int(self.text(name) or default)

    def flag(self, name: str, default: bool = False) -> bool:
        return self.text(name, "1" if default else "0").lower() in ("1", "on", "yes", "true")

    def items(self, name: str) -> list[str]:
        """An array parameter: repeated, or once."""
        value = self.params.get(name, [])
        return [value] if isinstance(value, str) else list(value)

    def names(self, name: str) -> list[str]:
        """A list in one string, split as PVE does."""
        return [part for part in re.split(r"[\s,;]+", self.text(name)) if part]

    @property
    def vmid(self) -> int:
        return self.number("vmid")


Handler = Callable[[Call], Any]
Guard = Callable[[Store, Call], None]


@dataclass(frozen=True)
class Route:
    """`unlocked` handlers wait for something (a guest, a file lock) and take the store's lock themselves."""

    method: str
    template: str
    handler: Handler
    guard: Guard | None = None
    unlocked: bool = False


def needs(path: str, *privileges: str) -> Guard:
    """All of these privileges on a path template such as `/vms/{vmid}`."""

    def check(store: Store, call: Call) -> None:
        access.require(store.state, call.user, _fill(path, call), *privileges)

    return check


def needs_any(path: str, *privileges: str) -> Guard:
    """One of these privileges on a path template."""

    def check(store: Store, call: Call) -> None:
        access.require_any(store.state, call.user, _fill(path, call), *privileges)

    return check


def compile_template(template: str) -> re.Pattern[str]:
    """`/nodes/{node}/qemu` as a pattern with named groups; `{volume}` may hold slashes, as volume ids do."""
    pattern = re.sub(
        r"\\{(\w+)\\}", lambda m: f"(?P<{m[1]}>{'.+' if m[1] == 'volume' else '[^/]+'})", re.escape(template)
    )
    return re.compile(pattern)


def _fill(template: str, call: Call) -> str:
    return re.sub(r"\{([\w-]+)\}", lambda m: call.text(m[1]), template)

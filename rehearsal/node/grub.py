# SPDX-License-Identifier: MIT
"""Which kernel GRUB boots, and with which words: the entry of grub.cfg that `set default` names (simulated)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_TITLE = re.compile(r"""^(menuentry|submenu)\s+(['"])(?P<title>.*?)\2""")
_ID = re.compile(r"""\$menuentry_id_option\s+(['"])(?P<id>.*?)\1""")
_DEFAULT = re.compile(r"""^set default=(['"]?)(?P<default>.*)\1$""")


@dataclass
class Entry:
    """A menu entry or a submenu. `cmdline`: what /proc/cmdline says when it is booted."""

    title: str = ""
    id: str = ""
    cmdline: str = ""
    entries: list[Entry] = field(default_factory=list)

    @property
    def kernel(self) -> str:
        """The version of the kernel that it boots."""
        return self.cmdline.split()[0].partition("vmlinuz-")[2]


def default_entry(grub_cfg: str) -> Entry:
    """The entry that GRUB boots when nobody touches a key; the first one where `set default` names none.

    Raises:
        ValueError: no entry boots a kernel.
    """
    menu, default = _read(grub_cfg)
    chosen = menu
    for part in default.split(">"):
        chosen = _named(chosen.entries, part) or chosen
    while chosen.entries:
        chosen = chosen.entries[0]
    if not chosen.cmdline:
        raise ValueError("grub.cfg has no `linux` line")
    return chosen


def _named(entries: list[Entry], name: str) -> Entry | None:
    """By number, title or id, as GRUB takes it."""
    if name.isdigit():
        return entries[int(name)] if int(name) < len(entries) else None
    return next((entry for entry in entries if name in (entry.title, entry.id)), None)


def _read(grub_cfg: str) -> tuple[Entry, str]:
    """(the whole menu, what `set default` says)."""
    menu = Entry()
    open_ = [menu]
    default = ""
    for line in grub_cfg.splitlines():
        stripped = line.strip()
        if match := _TITLE.match(stripped):
            named = _ID.search(stripped)
            entry = Entry(match["title"], named["id"] if named else "")
            open_[-1].entries.append(entry)
            open_.append(entry)
        elif stripped == "}" and len(open_) > 1:
            open_.pop()
        elif stripped.startswith("linux") and (words := stripped.split())[0] == "linux":
            open_[-1].cmdline = " ".join([f"BOOT_IMAGE={words[1]}", *words[2:]])
        elif match := _DEFAULT.match(stripped):
            default = match["default"]
    return menu, default

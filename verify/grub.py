# SPDX-License-Identifier: MIT
"""GRUB's configuration: the entry that boots by default. Sent to a host in front of the script that imports it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from typing import Any


def grub_entry(config: str, environment: str) -> dict[str, Any] | None:
    """The entry of a grub.cfg that boots by default, with `kernel` and `words`; None: no entry boots a kernel."""
    variables = dict(line.split("=", 1) for line in environment.splitlines() if "=" in line and line[:1] != "#")
    default = "0"
    for value in re.findall(r"^\s*set default=(.*)$", config, re.MULTILINE):
        value = value.strip().strip("\"'")
        variable = re.fullmatch(r"\$\{?(\w+)\}?", value)
        value = variables.get(variable[1], "") if variable else value
        default = value or default
        if value and variable and variable[1] == "next_entry":
            break  # what follows is the other branch, for a boot without it
    here = grub_menu(iter(config.splitlines()))
    first = next((entry for entry in here if entry["kernel"]), None)
    chosen = None
    for part in default.split(">"):
        by_name = (entry for entry in here if part in entry["names"])
        by_number = here[int(part)] if part.isdigit() and int(part) < len(here) else None
        chosen = next(by_name, by_number)
        here = chosen["menu"] if chosen else []
    return chosen if chosen and chosen["kernel"] else first


def grub_menu(lines: Iterator[str]) -> list[dict[str, Any]]:
    """The entries of a menu, up to its closing brace: title and id, then `kernel` and `words`, or a `menu` below."""
    found = []
    for line in lines:
        head = line.strip()
        if head == "}":
            break
        if head.endswith("{"):
            below = grub_menu(lines)
            if head.startswith(("menuentry ", "submenu ")):
                boots = [entry for entry in below if not entry["names"]]
                loads = boots[0] if boots else {"kernel": None, "words": ""}
                menu = [entry for entry in below if entry["names"]]
                found.append({**loads, "names": grub_names(head), "menu": menu})
        elif loaded := re.match(r"linux(?:16|efi)?\s+\S*vmlinuz-(\S+)\s*(.*)", head):
            found.append({"names": [], "kernel": loaded[1], "words": loaded[2], "menu": []})
    return found


def grub_names(head: str) -> list[str]:
    """What an entry can be called by: its title and its id, from `menuentry 'title' … $menuentry_id_option 'id' {`."""
    try:
        words = shlex.split(head)
    except ValueError:
        words = head.split()
    ids = [after for before, after in pairwise(words) if before in ("--id", "$menuentry_id_option")]
    return [words[1], *ids]

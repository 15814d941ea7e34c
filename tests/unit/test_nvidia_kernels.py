# SPDX-License-Identifier: MIT
"""Which kernel boots next, and the one that is kept when the newest has no NVIDIA module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from inventory import GpulabError
from operations.files import render
from operations.nvidia.kernels import boots_next, decide, kept, require_module, told
from operations.nvidia.remote.kernels import default, entries, order

#: As grub-mkconfig 2.12 of Debian 13 wrote it for two kernels.
CONFIG = (Path(__file__).parent.parent / "hosts" / "grub-debian13.cfg").read_text()
UUID = "6b8b4567-327b-23c6-643c-986966334873"
OLD, NEW = "6.12.117+deb13-cloud-amd64", "6.12.118+deb13-cloud-amd64"
OLD_ENTRY = f"gnulinux-advanced-{UUID}>gnulinux-{OLD}-advanced-{UUID}"


def guest(
    running: str = OLD, new: str | None = None, grub_default: str = "0", dropin: str | None = None
) -> dict[str, Any]:
    """A guest with both kernels; `new`: the module's version for the newer one."""
    modules = {OLD: "580.95.05", NEW: new}
    return {
        "running": running,
        "kernels": [
            {"release": name, "headers": name == OLD, "headers_exist": True, "module": module}
            for name, module in modules.items()
        ],
        "source": "nvidia/580.95.05",
        "grub": {"entries": entries(CONFIG), "default": grub_default},
        "dropin": dropin,
    }


DROPIN = render("nvidia/zz-gpulab-kernel.cfg.j2", kernel=NEW, source="nvidia/580.95.05", entry=OLD_ENTRY)


def test_the_entries_of_a_real_menu() -> None:
    assert entries(CONFIG) == [
        {"path": f"gnulinux-simple-{UUID}", "release": NEW},
        {"path": f"gnulinux-advanced-{UUID}>gnulinux-{NEW}-advanced-{UUID}", "release": NEW},
        {"path": OLD_ENTRY, "release": OLD},
    ]


@pytest.mark.parametrize(
    ("config", "environment", "expected"),
    [
        (CONFIG, {}, "0"),
        (CONFIG, {"next_entry": "1>2"}, "1>2"),
        ('set default="${saved_entry}"', {"saved_entry": "gnulinux-x"}, "gnulinux-x"),
        ('set default="${saved_entry}"', {}, "0"),
        (f'set default="${{next_entry}}"\nset default="{OLD_ENTRY}"', {}, OLD_ENTRY),
        ("", {}, "0"),
    ],
)
def test_the_default_of_a_menu(config: str, environment: dict[str, str], expected: str) -> None:
    assert default(config, environment) == expected


def test_kernels_compare_number_by_number() -> None:
    releases = [NEW, "6.9.7-amd64", OLD, "6.12.9+deb13-amd64", "5.10.0-32-amd64"]
    assert sorted(releases, key=order) == ["5.10.0-32-amd64", "6.9.7-amd64", "6.12.9+deb13-amd64", OLD, NEW]


def test_a_new_kernel_gets_headers_and_module_before_it_is_booted() -> None:
    actions = decide(guest())
    assert actions.headers == (f"linux-headers-{NEW}",)
    assert actions.build == (NEW,)


def test_a_new_kernel_with_its_module_is_booted() -> None:
    assert not decide(guest(new="580.95.05")).any()
    assert told(guest(new="580.95.05")) == f"kernel {NEW} boots next: NVIDIA 580.95.05 is built for it"


def test_the_running_kernel_is_kept_while_the_newest_does_not_build() -> None:
    assert kept(guest()) == DROPIN
    assert f'GRUB_DEFAULT="{OLD_ENTRY}"' in DROPIN


def test_what_did_not_build_is_not_tried_again_at_each_deploy() -> None:
    found = guest(dropin=DROPIN, grub_default=OLD_ENTRY)
    assert not decide(found).any()
    assert told(found) == f"kernel {OLD} boots next: {NEW} has no NVIDIA module"


def test_it_is_tried_again_with_another_driver() -> None:
    found = {**guest(dropin=DROPIN, grub_default=OLD_ENTRY), "source": "nvidia/590.44.01"}
    assert decide(found).build == (NEW,)


def test_the_drop_in_goes_once_the_newest_kernel_has_its_module() -> None:
    actions = decide(guest(new="580.95.05", dropin=DROPIN, grub_default=OLD_ENTRY))
    assert actions.regenerate and actions.dropin is None and not actions.build


def test_a_run_killed_before_update_grub_is_finished() -> None:
    """The file is there, and GRUB's menu does not know of it."""
    assert decide(guest(dropin=DROPIN)).regenerate


def test_a_guest_without_grub_has_only_its_kernel() -> None:
    found = {**guest(), "grub": None}
    assert not decide(found).any()
    assert boots_next(found) == OLD
    assert told(found) == f"no GRUB here: the guest boots {OLD}, its only kernel"


def test_a_default_that_grub_does_not_find_is_its_first_entry() -> None:
    assert boots_next(guest(grub_default="gnulinux-gone")) == NEW
    # Without the submenu's id it is found, too.
    assert boots_next(guest(grub_default=f"gnulinux-{OLD}-advanced-{UUID}")) == OLD


def test_a_kernel_that_grub_has_no_entry_for_cannot_be_kept() -> None:
    found = guest()
    found["grub"]["entries"] = found["grub"]["entries"][:2]
    with pytest.raises(GpulabError, match="can't be kept as the default"):
        kept(found)


def test_no_reboot_into_a_kernel_without_module() -> None:
    require_module(guest(new="580.95.05"))
    require_module(guest(grub_default=OLD_ENTRY))
    with pytest.raises(GpulabError) as raised:
        require_module(guest())
    assert raised.value.brief == f"The kernel that would boot next, {NEW}, has no NVIDIA module"
    assert "was not rebooted" in raised.value.details

# SPDX-License-Identifier: MIT
"""fstab: our line, and nobody else's touched."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inventory import GpulabError
from operations.system.data_disk import decide, fstab_line, fstab_with

FOREIGN = st.builds(
    lambda source, point, options: f"{source} {point} ext4 {options} 0 2",
    st.sampled_from(["UUID=1-2", "/dev/sdc1", "LABEL=x"]),
    st.sampled_from(["/", "/home", "/srv", "/srv/data2"]),
    st.sampled_from(["defaults", "rw,noatime", "x-systemd.automount"]),
)
LINES = st.lists(st.one_of(FOREIGN, st.sampled_from(["", "# a comment", "#UUID=9 /srv/data ext4 defaults 0 2"])))


@given(LINES)
def test_a_second_edit_changes_nothing_and_foreign_lines_stay(lines: list[str]) -> None:
    text = "".join(f"{line}\n" for line in lines)
    once = fstab_with(text, "aa-bb", "/srv/data")
    assert fstab_with(once, "aa-bb", "/srv/data") == once
    assert once.splitlines()[:-1] == lines
    assert once.splitlines()[-1] == fstab_line("aa-bb", "/srv/data")


def test_the_line_of_an_earlier_data_disk_is_replaced() -> None:
    before = f"proc /proc proc defaults 0 0\n{fstab_line('old', '/srv/data')}\n"
    after = fstab_with(before, "new", "/srv/data")
    assert "old" not in after
    assert after.startswith("proc ")


def test_a_foreign_line_for_the_mount_point_is_refused() -> None:
    with pytest.raises(GpulabError, match="not ours"):
        fstab_with("/dev/sdc1 /srv/data/ xfs defaults 0 0\n", "aa", "/srv/data")


def test_a_guest_that_does_not_exist_yet_gets_everything() -> None:
    actions = decide({}, "/dev/disk/by-id/x", "/srv/data")
    assert (actions.format, actions.mount, actions.grow) == (True, True, False)
    assert actions.fstab is not None

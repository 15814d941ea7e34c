# SPDX-License-Identifier: MIT
"""Which package sources the lab's image is built from."""

from __future__ import annotations

import pytest

from inventory import GpulabError
from rehearsal.image import Source, sources

DEB822 = """\
Types: deb deb-src
# http://snapshot.example/archive
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates bookworm-backports
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main

Enabled: no
Types: deb
URIs: http://off.example/debian
Suites: bookworm
Components: main
"""


@pytest.fixture
def apt(tmp_path):
    (tmp_path / "sources.list.d").mkdir()
    return tmp_path


def test_deb822_sources_are_taken_with_the_suite_renamed(apt):
    (apt / "sources.list.d/debian.sources").write_text(DEB822)
    assert sources("trixie", apt, "bookworm") == [
        Source("http://mirror.example/debian", ("trixie", "trixie-updates")),
        Source("http://mirror.example/debian-security", ("trixie-security",)),
    ]


def test_image_of_this_machines_own_release_has_its_sources(apt):
    (apt / "sources.list.d/debian.sources").write_text(DEB822)
    assert sources("bookworm", apt, "bookworm")[0].suites == ("bookworm", "bookworm-updates")


def test_one_line_sources_are_taken(apt):
    (apt / "sources.list").write_text(
        "# deb http://comment.example bookworm main\n"
        "deb [arch=amd64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]"
        " http://mirror.example/debian bookworm main\n"
        "deb-src http://mirror.example/debian bookworm main\n"
    )
    assert sources("trixie", apt, "bookworm") == [Source("http://mirror.example/debian", ("trixie",))]


def test_third_party_sources_are_left_out(apt):
    (apt / "sources.list.d/debian.sources").write_text(DEB822)
    (apt / "sources.list.d/docker.list").write_text(
        "deb [signed-by=/etc/apt/keyrings/docker.asc] https://docker.example/linux/debian bookworm stable\n"
    )
    (apt / "sources.list.d/node.sources").write_text(
        "Types: deb\nURIs: https://node.example\nSuites: nodistro\nComponents: main\nSigned-By: /x.gpg\n"
    )
    (apt / "sources.list.d/old.list.save").write_text("deb http://saved.example/debian bookworm main\n")
    assert {source.uri for source in sources("trixie", apt, "bookworm")} == {
        "http://mirror.example/debian",
        "http://mirror.example/debian-security",
    }


def test_machine_of_the_same_release_keeps_its_suites(apt):
    (apt / "sources.list").write_text("deb http://mirror.example/debian trixie main contrib\n")
    assert sources("trixie", apt, "trixie") == [Source("http://mirror.example/debian", ("trixie",))]


def test_no_source_is_an_error_that_names_where_it_looked(apt):
    with pytest.raises(GpulabError) as caught:
        sources("trixie", apt, "bookworm")
    assert str(caught.value) == (
        "No apt source of Debian bookworm on this machine\n"
        f"Looked in {apt}/sources.list and {apt}/sources.list.d.\n"
        "hint: the image of the lab's hosts is built from the same mirror, with bookworm replaced by trixie"
    )

# SPDX-License-Identifier: MIT
"""Versions, pins, headers and keys: what decides which driver a guest gets."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import pytest

from inventory import GpulabError
from operations import apt
from operations.files import File
from operations.nvidia.driver import decide, decide_loading, header_packages, unfit
from operations.nvidia.repository import SOURCES, pin, sources
from operations.nvidia.toolkit import outdated
from operations.repositories import Source, stale_keys

PACKAGES = ["nvidia-driver-cuda", "nvidia-kernel-open-dkms"]


@pytest.mark.parametrize(
    ("version", "expected"),
    [("580.95.05-1", "580.95.05"), ("1:580.95.05-1~bpo13+1", "580.95.05"), ("580.95.05", "580.95.05")],
)
def test_upstream_version(version: str, expected: str) -> None:
    assert apt.upstream(version) == expected


@pytest.mark.parametrize(
    ("version", "branch", "exact", "fits"),
    [
        ("580.95.05-1", "580", None, True),
        ("580.95.05-1", "580", "580.95.05", True),
        ("580.105.08-1", "580", "580.95.05", False),
        ("590.44.01-1", "580", None, False),
        # 58 is no prefix of 580.
        ("580.95.05-1", "58", None, False),
        (None, "580", None, False),
    ],
)
def test_in_branch(version: str | None, branch: str, exact: str | None, fits: bool) -> None:
    assert apt.in_branch(version, branch, exact) is fits


@pytest.mark.parametrize(
    ("kernel", "following"),
    [
        ("6.12.48+deb13-amd64", "linux-headers-amd64"),
        ("6.12.48+deb13-cloud-amd64", "linux-headers-cloud-amd64"),
        ("6.12.48+deb13.1-amd64", "linux-headers-amd64"),
        ("6.1.0-40-cloud-amd64", "linux-headers-cloud-amd64"),
        ("6.18.44-custom", "linux-headers-fallback"),
    ],
)
def test_headers_follow_the_running_kernels_flavour(kernel: str, following: str) -> None:
    assert header_packages(kernel, "linux-headers-fallback") == [f"linux-headers-{kernel}", following]


def test_one_package_of_another_version_makes_the_driver_unfit() -> None:
    found = {"packages": {PACKAGES[0]: "580.95.05-1", PACKAGES[1]: "580.105.08-1"}}
    assert unfit(found, PACKAGES, "580", None) == []
    assert unfit(found, PACKAGES, "580", "580.105.08") == [PACKAGES[0]]


def test_the_pin_names_the_branch_or_the_version() -> None:
    assert "Pin: version 580.*\nPin-Priority: 1001\n" in pin("580", None, ["a"], "1.20.0-1")
    assert "Pin: version 580.95.05-*\n" in pin("580", "580.95.05", ["a"], "1.20.0-1")
    assert pin("580", None, ["a", "b"], "1.20.0-1").endswith(
        "Package: a b\nPin: version 1.20.0-1\nPin-Priority: 1001\n"
    )


def test_the_name_of_apts_index_file() -> None:
    """As apt 3.0 names it (seen)."""
    driver, toolkit = sources("debian13/x86_64", "http://10.67.7.1:8099/cuda", None, "https://n.example/lib", None)
    assert driver.lists == "/var/lib/apt/lists/10.67.7.1:8099_cuda_debian13_x86%5f64_InRelease"
    assert toolkit.lists == "/var/lib/apt/lists/n.example_lib_stable_deb_amd64_InRelease"


def entry(content: bytes) -> dict[str, Any]:
    return {"content": base64.b64encode(content).decode(), "mode": 0o644, "mtime": 0.0}


def test_a_key_is_fetched_again_when_it_is_not_the_pinned_one() -> None:
    source = Source("u", "k", hashlib.sha256(b"right").hexdigest(), SOURCES, "/key")
    assert stale_keys({"/key": entry(b"right")}, [source], {}) == []
    assert stale_keys({"/key": entry(b"wrong")}, [source], {}) == [source]
    assert stale_keys({}, [source], {}) == [source]


def test_a_key_without_digest_is_fetched_again_when_its_repository_moves() -> None:
    source = Source("u", "k", None, SOURCES, "/key")
    there = {"/key": entry(b"any"), SOURCES: entry(b"URIs: elsewhere")}
    assert stale_keys(there, [source], {}) == []
    assert stale_keys(there, [source], {SOURCES: File("URIs: u")}) == [source]


def test_a_guest_that_does_not_exist_yet_gets_the_driver_and_its_module() -> None:
    actions = decide({}, PACKAGES, "linux-headers-amd64", "580", None)
    assert actions.install == tuple(PACKAGES)
    assert actions.hold
    assert decide_loading({}, PACKAGES, "580", None).load


def test_a_driver_about_to_change_is_planned_to_be_reloaded() -> None:
    """In the plan the new packages are not there yet; the reload must be in it all the same."""
    found = {
        "packages": dict.fromkeys(PACKAGES, "580.95.05-1"),
        "loaded": "580.95.05",
        "on_disk": "580.95.05",
        "smi": {"status": 0, "output": ""},
        "nouveau": False,
        "users": [],
    }
    assert not decide_loading(found, PACKAGES, "580", None).any()
    assert decide_loading(found, PACKAGES, "580", "580.105.08").reload
    assert decide_loading({**found, "users": ["ollama (7)"]}, PACKAGES, "580", "580.105.08").reboot


def test_nouveau_on_the_card_needs_a_reboot() -> None:
    found = {
        "packages": dict.fromkeys(PACKAGES, "580.95.05-1"),
        "loaded": None,
        "on_disk": "580.95.05",
        "nouveau": True,
        "users": [],
    }
    assert decide_loading(found, PACKAGES, "580", None).reboot == "nouveau has the card"


def test_secure_boot_does_not_matter_once_the_module_is_loaded() -> None:
    found = {
        "packages": {},
        "secure_boot": True,
        "loaded": "580.65.06",
        "dkms_built": False,
        "headers": True,
        "headers_exist": True,
        "kernel": "6.12.48+deb13-amd64",
        "family": [],
        "held": [],
        "blacklist": None,
    }
    assert decide(found, PACKAGES, "linux-headers-amd64", "580", None).install
    with pytest.raises(GpulabError, match="Secure Boot"):
        decide({**found, "loaded": None}, PACKAGES, "linux-headers-amd64", "580", None)


def test_the_specification_must_fit_the_loaded_driver() -> None:
    good = {
        "specification": True,
        "specification_versions": ["580.95.05"],
        "specification_missing": [],
        "loaded": "580.95.05",
    }
    assert outdated(good) == ""
    assert outdated({}) == "there is none"
    assert outdated({**good, "loaded": "590.44.01"}) == "it describes 580.95.05; loaded is 590.44.01"
    assert outdated({**good, "specification_missing": ["/usr/lib/x"]}) == "it names /usr/lib/x, which is not there"

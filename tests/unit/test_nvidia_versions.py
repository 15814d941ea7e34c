# SPDX-License-Identifier: MIT
"""Versions, pins, headers and keys: what decides which driver a guest gets."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from inventory import GpulabError
from operations import apt
from operations.files import File
from operations.nvidia import versions
from operations.nvidia.driver import (
    decide,
    decide_loading,
    fallen,
    header_packages,
    leftovers,
    unbuilt,
    unfit,
    unloadable,
)
from operations.nvidia.remote import driver
from operations.nvidia.repository import SOURCES, pin, sources
from operations.nvidia.toolkit import outdated
from operations.repositories import Source, no_key, stale_keys

PACKAGES = ["nvidia-driver-cuda", "nvidia-kernel-open-dkms"]
HOSTS = Path(__file__).parent.parent / "hosts"


def ready(**over: Any) -> dict[str, Any]:
    """A guest with the driver installed, built, loaded and answering, but for `over`."""
    found: dict[str, Any] = yaml.safe_load((HOSTS / "gpu01-driver.yaml").read_text())
    assert not over.keys() - found.keys()
    return {**found, **over}


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


def test_packages_of_two_versions_are_all_unfit_though_both_are_of_the_branch() -> None:
    found = {"packages": {PACKAGES[0]: "580.95.05-1", PACKAGES[1]: "580.105.08-1"}}
    assert unfit(found, PACKAGES, "580", None) == PACKAGES
    assert unfit(found, PACKAGES, "580", "580.105.08") == [PACKAGES[0]]
    assert unfit({"packages": dict.fromkeys(PACKAGES, "580.95.05-1")}, PACKAGES, "580", None) == []


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


@pytest.mark.parametrize(
    ("output", "brief", "details"),
    [
        (
            "curl: (7) Failed to connect to m.example port 443 after 2 ms: Could not connect to server\n",
            "The key https://m.example/key can't be had",
            "curl says: curl: (7) Failed to connect to m.example port 443",
        ),
        (
            "https://m.example/key: expected SHA-256 aa, got bb\n",
            "https://m.example/key is not the key that the inventory pins",
            "expected SHA-256 aa, got bb",
        ),
    ],
)
def test_why_a_key_could_not_be_had(output: str, brief: str, details: str) -> None:
    error = no_key(Source("u", "https://m.example/key", "aa", SOURCES, "/key"), output)
    assert error.brief == brief
    assert details in error.details


def test_a_guest_that_does_not_exist_yet_gets_the_driver_and_its_module() -> None:
    actions = decide({}, PACKAGES, "linux-headers-amd64", "580", None)
    assert actions.install == tuple(PACKAGES)
    assert actions.hold
    assert decide_loading({}, PACKAGES, "580", None).load


def test_a_driver_about_to_change_is_planned_to_be_reloaded() -> None:
    """In the plan the new packages are not there yet; the reload must be in it all the same."""
    found = ready()
    assert not decide_loading(found, PACKAGES, "580", None).any()
    assert decide_loading(found, PACKAGES, "580", "580.105.08").reload
    assert decide_loading(ready(users=["ollama (7)"]), PACKAGES, "580", "580.105.08").reboot


def test_user_space_that_goes_back_to_the_loaded_module_needs_no_reload() -> None:
    """Somebody upgraded by hand, and the inventory names the version that still runs."""
    found = ready(packages=dict.fromkeys(PACKAGES, "580.105.08-1"), on_disk="580.105.08")
    assert decide_loading(found, PACKAGES, "580", None).reload
    assert not decide_loading(found, PACKAGES, "580", "580.95.05").any()


def test_nouveau_on_the_card_needs_a_reboot() -> None:
    gpu = ready()["gpus"][0]
    found = ready(loaded=None, gpus=[{**gpu, "driver": "nouveau"}])
    assert decide_loading(found, PACKAGES, "580", None).reboot == "nouveau has the card"
    assert decide_loading(ready(loaded=None, gpus=[{**gpu, "driver": None}]), PACKAGES, "580", None).load


def test_secure_boot_does_not_matter_once_a_module_is_loaded_or_its_key_is_known() -> None:
    found = ready(packages=dict.fromkeys(PACKAGES), secure_boot=True)
    assert decide(found, PACKAGES, "linux-headers-amd64", "580", None).install
    assert decide({**found, "loaded": None, "mok_enrolled": True}, PACKAGES, "x", "580", None).install
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


@pytest.mark.parametrize(
    ("over", "cause"),
    [
        ({}, ""),
        # Nothing is installed: no mismatch, a fresh guest.
        ({"packages": dict.fromkeys(PACKAGES)}, ""),
        # A module that is not loaded is no mismatch either.
        ({"loaded": None}, ""),
        (
            {"loaded": "580.65.06", "changed_by": "/usr/bin/unattended-upgrade"},
            "the packages were changed to 580.95.05 under the loaded module 580.65.06 by unattended-upgrades",
        ),
        (
            {"loaded": "580.65.06", "changed_by": "apt-get install -y nvidia-driver-cuda"},
            "the packages were changed to 580.95.05 under the loaded module 580.65.06 by "
            "`apt-get install -y nvidia-driver-cuda`",
        ),
        (
            {"loaded": "580.65.06"},
            "the packages were changed to 580.95.05 under the loaded module 580.65.06",
        ),
        (
            {"on_disk": None, "dkms_built": False, "dkms": []},
            "the module is not built for the running kernel 6.12.48+deb13-cloud-amd64",
        ),
        (
            {"on_disk": "580.65.06", "loaded": "580.65.06", "dkms_built": False},
            "the module on disk for kernel 6.12.48+deb13-cloud-amd64 is 580.65.06, the packages are 580.95.05",
        ),
        (
            {"damaged": {"GSP firmware": ["firmware-nvidia-gsp"]}},
            "missing on the disk: GSP firmware of 580.95.05",
        ),
        (
            {"packages": dict.fromkeys(PACKAGES, "590.44.01-1"), "loaded": "590.44.01"},
            "driver 590.44.01 is installed, declared is branch 580",
        ),
        (
            {"packages": {PACKAGES[0]: "580.105.08-1", PACKAGES[1]: "580.95.05-1"}},
            "half-upgraded packages: nvidia-driver-cuda 580.105.08-1, nvidia-kernel-open-dkms 580.95.05-1",
        ),
        (
            {"packages": {PACKAGES[0]: "580.95.05-1", PACKAGES[1]: None}},
            "half-upgraded packages: nvidia-driver-cuda 580.95.05-1, nvidia-kernel-open-dkms absent",
        ),
        (
            {"broken": {"nvidia-kernel-open-dkms": "half-configured"}, "packages": {PACKAGES[0]: None}},
            "an earlier installation was interrupted: nvidia-kernel-open-dkms half-configured",
        ),
        ({"interrupted": True}, "an earlier installation was interrupted: dpkg has not finished"),
    ],
)
def test_a_mismatch_is_named_by_its_cause(over: dict[str, Any], cause: str) -> None:
    assert versions.cause(ready(**over), PACKAGES, "580", None) == cause


def test_the_five_versions_in_one_line() -> None:
    found = ready(loaded="580.65.06", library={"libcuda.so.1": "580.95.05", "libnvidia-ml.so.1": None}, firmware=[])
    assert versions.told(found, "580", None) == (
        "Versions: loaded module 580.65.06, module on disk 580.95.05, user-space library 580.95.05 and absent, "
        "GSP firmware absent, declared branch 580"
    )


FAILURE = {
    "file": "nv-pci.c",
    "line": 237,
    "error": "too few arguments to function 'pci_resize_resource'",
    "more": 1,
    "log": "/var/lib/dkms/nvidia/580.95.05/build/make.log",
    "kernel": "6.12.48+deb13-cloud-amd64",
}


def test_log_of_another_kernel_is_read_when_this_one_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "make.log"
    log.write_text(
        "DKMS (dkms-3.2.2) make.log for nvidia/580.95.05 for kernel 6.1.0-1-amd64 (x86_64)\na.c:1:2: error: x\n"
    )
    monkeypatch.setattr(driver.glob, "glob", lambda pattern: [str(log)])

    found = driver.newest_failure("6.12.48+deb13-cloud-amd64")

    assert found is not None
    assert (found["kernel"], found["error"], found["log"]) == ("6.1.0-1-amd64", "x", str(log))


def test_a_failed_build_is_told_in_one_block() -> None:
    found = ready(dkms_built=False, build_failure=FAILURE, on_disk=None, loaded=None)
    assert str(unbuilt(found)).splitlines() == [
        "DKMS has not built the NVIDIA module for the running kernel 6.12.48+deb13-cloud-amd64",
        "  kernel  6.12.48+deb13-cloud-amd64, which runs",
        "  file    nv-pci.c, line 237",
        "  error   too few arguments to function 'pci_resize_resource' (and 1 more)",
        "  log     /var/lib/dkms/nvidia/580.95.05/build/make.log",
        "The guest was not rebooted; it runs without NVIDIA's driver.",
        "hint: a kernel that is newer than the driver needs a newer driver: see nvidia.version and nvidia.branch",
    ]


def test_a_failed_build_that_left_user_space_ahead_says_so_and_how_to_go_back() -> None:
    library = {"libcuda.so.1": "580.105.08", "libnvidia-ml.so.1": "580.105.08"}
    error = unbuilt(ready(dkms_built=False, build_failure=FAILURE, library=library))
    assert error.details.splitlines()[-1] == (
        "The guest was not rebooted; it still runs driver 580.95.05, which programs started from now on can't use: "
        "user space is 580.105.08."
    )
    assert error.resolution.endswith("or declare the version that runs, 580.95.05, again")


@pytest.mark.parametrize(
    ("over", "line", "hint"),
    [
        ({"headers": False, "headers_exist": False}, "headers linux-headers-6.12.48+deb13-cloud-amd64", "upgrade the"),
        ({"build_failure": {**FAILURE, "error": "No space left on device"}}, "error   No space left", "df -h"),
        (
            {"build_failure": {**FAILURE, "file": "", "error": "gcc-14: not found"}},
            "error   gcc-14: not",
            "build-essential",
        ),
        # Headers that are missing from an #include are no missing tool.
        ({"build_failure": {**FAILURE, "error": "x.h: No such file or directory"}}, "error   x.h", "newer driver"),
        # DKMS builds for every kernel that has headers, and stops at the first that fails.
        (
            {"build_failure": {**FAILURE, "kernel": "6.1.0-1-amd64"}},
            "failed  for kernel 6.1.0-1",
            "linux-headers-6.1.0-1",
        ),
        ({"dkms": ["nvidia/580.95.05: added"]}, "dkms    nvidia/580.95.05: added", "newer driver"),
    ],
)
def test_other_reasons_of_a_failed_build(over: dict[str, Any], line: str, hint: str) -> None:
    error = unbuilt(ready(dkms_built=False, **over))
    assert f"\n  {line}" in f"\n{error.details}"
    assert hint in error.resolution
    assert "it still runs driver 580.95.05" in error.details


@pytest.mark.parametrize(
    ("output", "brief", "hint"),
    [
        ("modprobe: ERROR: could not insert 'nvidia': Key was rejected by service", "Secure Boot is on", "the first"),
        ("modprobe: ERROR: could not insert 'nvidia': Required key not available", "Secure Boot is on", "the first"),
        (
            "modprobe: FATAL: Module nvidia not found in directory /lib/modules/6.12.48",
            "The NVIDIA module could not be loaded",
            "the next deploy builds it",
        ),
        ("modprobe: ERROR: could not insert 'nvidia': Exec format error", "The NVIDIA module", "another kernel"),
        ("modprobe: ERROR: could not insert 'nvidia': No such device", "The NVIDIA module", "no card that it knows"),
        ("rmmod: ERROR: Module nvidia_uvm is in use", "The NVIDIA module", "lsmod"),
        ("something else", "The NVIDIA module", "dmesg"),
    ],
)
def test_why_a_module_does_not_load(output: str, brief: str, hint: str) -> None:
    error = unloadable(output)
    assert error.brief.startswith(brief)
    assert hint in error.resolution
    assert output in error.details


@pytest.mark.parametrize(
    ("log", "smi", "reason"),
    [
        (["NVRM: Xid (PCI:0000:01:00): 79, GPU has fallen off the bus."], 15, "the kernel log says so (Xid 79)"),
        # It has come back, by a restart of its VM: the log of an earlier boot is not this one's, but smi decides.
        (["NVRM: Xid (PCI:0000:01:00): 79, GPU has fallen off the bus."], 0, ""),
        (["NVRM: Xid (PCI:0000:01:00): 13, Graphics SM Warp Exception"], 15, ""),
        # 79 is no prefix of 795.
        (["NVRM: Xid (PCI:0000:01:00): 795, an unknown one"], 15, ""),
    ],
)
def test_a_card_that_fell_off_the_bus(log: list[str], smi: int, reason: str) -> None:
    assert fallen(ready(kernel_log=log, smi={"status": smi, "output": ""})) == reason


def test_packages_that_carry_their_branch_go_with_it() -> None:
    found = {
        "related": {
            "nvidia-utils-580": "580.95.05-0ubuntu1",
            "libnvidia-cfg1-580": "580.95.05-0ubuntu1",
            "linux-modules-nvidia-580-server-open": "6.8.0-50.51",
            "nvidia-driver-pinning-580": "580-1",
            "nvidia-container-toolkit": "1.20.0-1",
            "libcuda1": "580.95.05-1",
        }
    }
    unnumbered = ["nvidia-utils", "nvidia-dkms-open"]
    assert leftovers(found, unnumbered, "590") == [
        "nvidia-utils-580",
        "libnvidia-cfg1-580",
        "nvidia-driver-pinning-580",
    ]
    assert leftovers(found, ["nvidia-utils-580"], "580") == []


def test_packages_without_a_branch_go_when_it_comes_back_into_the_names() -> None:
    found = {"related": {"nvidia-utils": "590.44.01-1", "nvidia-dkms-open": "590.44.01-1", "libcuda1": "590.44.01-1"}}
    assert leftovers(found, ["nvidia-utils-580", "nvidia-dkms-580-open"], "580") == ["nvidia-utils", "nvidia-dkms-open"]
    # Debian's names never carry it: apt replaces them itself.
    assert leftovers(found, PACKAGES, "580") == []


def test_half_an_upgrade_is_finished_with_every_package_of_the_driver() -> None:
    """apt 3.0 (seen): what is unpacked in its new version is "already the newest", and its dependencies stay behind."""
    found = ready(
        packages={PACKAGES[0]: None, PACKAGES[1]: "580.95.05-1"},
        related={
            "libnvidia-ml1": "580.95.05-1",
            "nvidia-kernel-open-dkms": "580.95.05-1",
            "nvidia-container-toolkit": "1",
        },
        broken={"nvidia-driver-cuda": "unpacked", "libcuda1": "half-installed", "vim": "half-configured"},
    )
    actions = decide(found, PACKAGES, "linux-headers-amd64", "580", None)
    assert actions.install == (*PACKAGES, "libcuda1", "libnvidia-ml1")
    assert actions.hold

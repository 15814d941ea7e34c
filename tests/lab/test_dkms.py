# SPDX-License-Identifier: MIT
"""The driver's module, built by the real DKMS against Debian's kernel headers; the module itself is a tiny one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rehearsal import host, running_kernel
from rehearsal.nvidia.packages import BROKEN_DRIVER
from tests.lab.debian_host import NAME, DebianHost, debian_host

pytestmark = pytest.mark.lab
GOOD = "580.105.08"
BROKEN = BROKEN_DRIVER[0]


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DebianHost]:
    with debian_host(tmp_path_factory.mktemp("dkms")) as made:
        yield made


def test_driver_is_built_for_the_running_kernel_and_a_second_deploy_changes_nothing(debian: DebianHost) -> None:
    assert debian.sh("uname -r").strip() == debian.kernel
    done = debian.driver()
    assert done.status == 0, done.output[-4000:]
    assert debian.status() == [f"nvidia/{GOOD}, {debian.kernel}, x86_64: installed"]
    assert debian.module() == GOOD
    # A real one: the kernel's build signed it, and depmod found it.
    assert f"{debian.kernel} SMP" in debian.sh("modinfo -F vermagic nvidia")
    assert "updates/dkms/nvidia.ko" in debian.sh(f"cat /lib/modules/{debian.kernel}/modules.dep")
    assert debian.driver().status == 0
    assert not any(debian.changed().values())


def test_module_is_built_for_a_kernel_whose_headers_come_later(debian: DebianHost) -> None:
    """As after an upgrade of the kernel: the package of the headers has DKMS build for it."""
    assert debian.driver().status == 0
    names = debian.sh("apt-cache pkgnames linux-headers-6.").split()
    others = sorted(
        name.removeprefix("linux-headers-")
        for name in names
        if name.endswith("+deb13-amd64") and debian.kernel not in name
    )
    if not others:
        pytest.skip("the mirror has the headers of one kernel only")
    other = others[-1]
    debian.sh(f"apt-get -qq -y install linux-headers-{other}")
    try:
        assert f"nvidia/{GOOD}, {other}, x86_64: installed" in debian.status()
        assert debian.module(other) == GOOD
    finally:
        # Debian's dkms builds for all kernels with headers, and ends with the first failure.
        debian.sh(f"dkms remove nvidia/{GOOD} -k {other}; apt-get -qq -y purge linux-headers-{other}")


def test_source_that_does_not_build_is_told_with_file_and_line_and_the_way_back_is_a_version(
    debian: DebianHost,
) -> None:
    boot = host.boot_id(NAME)
    done = debian.driver(BROKEN, broken=True)
    assert done.status == 1
    assert f"DKMS has not built the NVIDIA module for the running kernel {debian.kernel}" in done.output
    assert "nvidia.c" in done.output
    assert "too few arguments to function 'pci_resize_resource'" in done.output
    assert debian.status() == [f"nvidia/{BROKEN}: added"]
    assert debian.module() == ""
    assert host.boot_id(NAME) == boot
    # Unchanged, the next deploy fails in the same words.
    assert "too few arguments to function 'pci_resize_resource'" in debian.driver(BROKEN, broken=True).output
    done = debian.driver(GOOD)
    assert done.status == 0, done.output[-4000:]
    assert debian.module() == GOOD
    assert debian.sh("dpkg --audit") == ""


def test_kernel_without_headers_is_told(debian: DebianHost) -> None:
    """One that has left the repository, as on a guest that was never rebooted since."""
    old = "6.12.1+deb13-amd64"
    debian.sh(f"mkdir -p /lib/modules/{old}; touch /boot/vmlinuz-{old} /boot/config-{old}")
    running_kernel.run_as(NAME, old)
    try:
        done = debian.driver(GOOD)
        assert done.status == 1
        assert f"DKMS has not built the NVIDIA module for the running kernel {old}" in done.output
        assert "headers" in done.output
    finally:
        running_kernel.run_as(NAME, debian.kernel)
        debian.sh(f"rm -r /lib/modules/{old} /boot/vmlinuz-{old} /boot/config-{old}")

# SPDX-License-Identifier: MIT
"""The simulated boot of a node: from its configuration files to the drivers that its devices get."""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import pytest

from rehearsal import node
from rehearsal.node import grub, hardware, initramfs
from rehearsal.node.hardware import boot, lay_out, module_config, read_boot

GPU, AUDIO, NIC, IGPU = "0000:01:00.0", "0000:01:00.1", "0000:02:00.0", "0000:00:02.0"
MACHINE = hardware.read_machine(node.MACHINE.read_text())
QUIET = "BOOT_IMAGE=/boot/vmlinuz-6.14.8-2-pve root=/dev/mapper/pve-root ro quiet"
IDS = "options vfio-pci ids=10de:24b0,10de:228b\n"
SOFTDEPS = "softdep nouveau pre: vfio-pci\nsoftdep snd_hda_intel pre: vfio-pci\n"


def booted(modprobe: str = "", load: str = "", cmdline: str = QUIET, machine: hardware.Machine = MACHINE):
    files = {"etc/modprobe.d/gpulab.conf": modprobe, "etc/modules-load.d/gpulab.conf": load}
    return boot(machine, cmdline, module_config(files, cmdline))


def test_without_configuration_the_host_drivers_take_the_card():
    drivers = booted().drivers
    assert (drivers[GPU], drivers[AUDIO], drivers[NIC]) == ("nouveau", "snd_hda_intel", "igc")


def test_softdeps_hand_both_functions_to_vfio():
    drivers = booted(IDS + SOFTDEPS).drivers
    assert (drivers[GPU], drivers[AUDIO]) == ("vfio-pci", "vfio-pci")
    assert drivers[IGPU] == "i915"


def test_loading_vfio_late_is_too_late_without_softdep():
    assert booted(IDS, "vfio_pci\n").drivers[GPU] == "nouveau"


def test_blacklist_alone_leaves_the_card_without_driver():
    assert GPU not in booted("blacklist nouveau\nblacklist nvidiafb\n").drivers


def test_blacklist_does_not_keep_the_audio_driver_from_function_1():
    """What fidpa's guide warns of: `blacklist nouveau` with a late vfio-pci frees the GPU, not its audio."""
    drivers = booted(IDS + "blacklist nouveau\nblacklist nvidiafb\n", "vfio-pci\n").drivers
    assert (drivers[GPU], drivers[AUDIO]) == ("vfio-pci", "snd_hda_intel")


def test_softdep_loads_a_blacklisted_module():
    """A blacklist holds for aliases only."""
    drivers = booted("blacklist vfio-pci\n" + IDS + SOFTDEPS).drivers
    assert drivers[GPU] == "vfio-pci"


def test_install_false_keeps_a_module_out():
    assert "nouveau" not in booted("install nouveau /bin/false\n").modules


def test_ids_on_the_command_line_count_too():
    drivers = booted(SOFTDEPS, cmdline=f"{QUIET} vfio-pci.ids=10de:24b0 modprobe.blacklist=snd_hda_intel").drivers
    assert drivers[GPU] == "vfio-pci"
    assert AUDIO not in drivers


def test_vfio_refuses_a_device_without_iommu():
    without = booted(IDS + SOFTDEPS, cmdline=f"{QUIET} intel_iommu=off")
    assert not without.iommu
    assert without.drivers[GPU] == "nouveau"
    assert without.vfio_groups == []


@pytest.mark.parametrize(
    ("kernel", "iommu", "words", "expected"),
    [
        ("6.14.8-2-pve", "intel", "", True),
        ("6.5.13-1-pve", "intel", "", False),
        ("6.5.13-1-pve", "intel", "intel_iommu=on", True),
        ("6.5.13-1-pve", "intel", "intel_iommu=on,sm_on", True),
        ("6.5.13-1-pve", "amd", "", True),
        ("6.14.8-2-pve", "amd", "amd_iommu=off", False),
        ("6.14.8-2-pve", "intel", "iommu=off", False),
        ("6.14.8-2-pve", "absent", "intel_iommu=on", False),
    ],
)
def test_iommu_is_on_as_the_kernel_decides(kernel, iommu, words, expected):
    machine = replace(MACHINE, kernel=kernel, iommu=iommu)
    assert hardware.iommu_in_use(machine, f"{QUIET} {words}") is expected


def test_passthrough_domain_follows_the_command_line():
    assert hardware.domain_type(QUIET) == "DMA-FQ"
    assert hardware.domain_type(f"{QUIET} iommu=pt") == "identity"


def test_file_in_etc_hides_one_of_the_same_name_in_usr():
    files = {"usr/lib/modprobe.d/a.conf": "blacklist igc\n", "etc/modprobe.d/a.conf": "blacklist i915\n"}
    assert module_config(files, "").blacklist == {"i915"}


def test_continued_line_and_comment_are_read_as_modprobe_does():
    config = module_config({"etc/modprobe.d/a.conf": "# options x a=1\noptions vfio-pci \\\n ids=1:2\n"}, "")
    assert config.options == {"vfio_pci": ["ids=1:2"]}


def test_two_cards_of_one_kind_are_both_caught_by_ids():
    twin = [
        replace(device, address=device.address.replace("01:00", "03:00"), group=20) for device in MACHINE.devices[4:6]
    ]
    two = replace(MACHINE, devices=(*MACHINE.devices, *twin))
    outcome = booted(IDS + SOFTDEPS, machine=two)
    assert outcome.drivers["0000:03:00.0"] == "vfio-pci"
    assert outcome.vfio_groups == [14, 20]


def test_layout_has_what_lspci_and_the_deploy_read(tmp_path):
    lay_out(tmp_path, booted(IDS + SOFTDEPS, cmdline=f"{QUIET} iommu=pt"))
    gpu = tmp_path / "sys/bus/pci/devices" / GPU
    assert (gpu / "vendor").read_text() == "0x10de\n"
    assert (gpu / "class").read_text() == "0x030000\n"
    assert (gpu / "boot_vga").read_text() == "0\n"
    assert (gpu / "config").read_bytes()[:4] == bytes.fromhex("de10b024")
    assert (gpu / "driver").resolve() == tmp_path / "sys/bus/pci/drivers/vfio-pci"
    group = (gpu / "iommu_group").resolve()
    assert group == tmp_path / "sys/kernel/iommu_groups/14"
    assert (group / "type").read_text() == "identity\n"
    assert sorted(os.listdir(group / "devices")) == ["0000:00:01.0", GPU, AUDIO]
    assert (tmp_path / "sys/bus/pci/devices/0000:00:01.0/pci_bus/0000:01").is_dir()
    assert (tmp_path / "sys/class/iommu/dmar0").is_dir()
    assert "vfio_pci 16384 0 - Live" in (tmp_path / "proc/modules").read_text()


def test_layout_without_iommu_has_no_groups(tmp_path):
    lay_out(tmp_path, booted(cmdline=f"{QUIET} iommu=off"))
    assert not (tmp_path / "sys/bus/pci/devices" / GPU / "iommu_group").is_symlink()
    assert list((tmp_path / "sys/class/iommu").iterdir()) == []


def test_next_layout_replaces_the_previous_one(tmp_path):
    lay_out(tmp_path, booted(IDS + SOFTDEPS))
    lay_out(tmp_path, booted())
    assert (tmp_path / "sys/bus/pci/devices" / GPU / "driver").readlink().name == "nouveau"


def test_grub_without_an_entry_is_an_error():
    with pytest.raises(ValueError, match="no `linux` line"):
        grub.default_entry("set timeout=5\n")


def test_initrd_is_read_as_it_was_written():
    files = {"etc/modprobe.d/a.conf": "blacklist x\n", "etc/empty": "", "conf/modules": "ä\n"}
    assert initramfs.unpack(initramfs.pack(files)) == files


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A node's file system, as far as its boot reads it."""
    folder = tmp_path_factory.mktemp("node")
    for path, (text, mode) in node.files("192.0.2.1:18006").items():
        target = folder / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        target.chmod(mode)
    update(folder, "update-initramfs", "-c", "-k", "all")
    update(folder, "grub-mkconfig", "-o", "/boot/grub/grub.cfg")
    return folder


@pytest.fixture
def root(installed: Path, tmp_path: Path) -> Path:
    """A node of the test's own."""
    return shutil.copytree(installed, tmp_path / "root")


def update(root: Path, command: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run one of the node's stand-ins on a root file system."""
    environment = {**os.environ, "LAB_ROOT": str(root)}
    return subprocess.run(
        [root / "usr/sbin" / command, *words], env=environment, capture_output=True, text=True, check=False
    )


def test_edited_files_change_nothing_until_they_are_brought_into_the_boot(root):
    (root / "etc/modprobe.d/gpulab.conf").write_text(IDS + SOFTDEPS)
    (root / "etc/default/grub.d/gpulab.cfg").write_text(
        'GRUB_CMDLINE_LINUX_DEFAULT="$GRUB_CMDLINE_LINUX_DEFAULT iommu=pt"\n'
    )
    before = read_boot(root)
    assert (before.cmdline, before.drivers[GPU]) == (QUIET, "nouveau")

    done = update(root, "update-initramfs", "-u", "-k", "all")
    assert "simulated" in done.stdout
    assert read_boot(root).drivers[GPU] == "vfio-pci"
    assert read_boot(root).domain == "DMA-FQ"

    done = update(root, "grub-mkconfig", "-o", "/boot/grub/grub.cfg")
    assert "simulated" in done.stderr
    assert read_boot(root).cmdline == f"{QUIET} iommu=pt"


def test_broken_grub_snippet_keeps_the_old_grub_cfg(root):
    (root / "etc/default/grub.d/broken.cfg").write_text('GRUB_CMDLINE_LINUX_DEFAULT="quiet\n')
    assert update(root, "grub-mkconfig", "-o", "/boot/grub/grub.cfg").returncode != 0
    assert read_boot(root).cmdline == QUIET


def test_failing_hook_keeps_the_old_initramfs(root):
    hook = root / "etc/initramfs-tools/hooks/broken"
    hook.parent.mkdir(parents=True)
    hook.write_text("#!/bin/sh\nexit 3\n")
    hook.chmod(0o755)
    (root / "etc/modprobe.d/gpulab.conf").write_text(IDS + SOFTDEPS)
    done = update(root, "update-initramfs", "-u", "-k", "all")
    assert done.returncode == 1
    assert done.stderr.endswith("hooks/broken failed with return 3.\n")
    assert read_boot(root).drivers[GPU] == "nouveau"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-k", "all"], "you must specify at least one of -c, -u, or -d."),
        (["-u", "-k", "5.4.0"], "there is no kernel 5.4.0 in /boot"),
    ],
)
def test_update_initramfs_refuses(root, words, message):
    done = update(root, "update-initramfs", *words)
    assert done.returncode == 1
    assert message in done.stderr


def test_every_stand_in_says_simulated():
    for folder in ("usr/sbin", "usr/bin"):
        for path in (node.ROOT / folder).iterdir():
            if path.name not in ("update-grub", "lsinitramfs"):
                assert "simulated" in path.read_text(), path.name


def test_default_machine_says_simulated():
    assert json.loads(node.MACHINE.read_text())["simulated"] is True


TEMPLATES = Path(__file__).parents[2] / "templates/hypervisor/initramfs-tools"
BIND_SCRIPT = "etc/initramfs-tools/scripts/init-top/gpulab-vfio"
CARD = {
    "name": "gpu0",
    "address": "0000:01:00",
    "allow_shared_group": False,
    "functions": [{"address": GPU, "id": "10de:24b0"}, {"address": AUDIO, "id": "10de:228b"}],
}
TWIN_GPU, TWIN_AUDIO = "0000:03:00.0", "0000:03:00.1"


def install(root: Path, path: str, text: str) -> None:
    """An executable file on the node."""
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)
    (root / path).chmod(0o755)


def rendered(name: str, **context: object) -> str:
    """One of the project's own templates."""
    return (
        jinja2.Environment(undefined=jinja2.StrictUndefined).from_string((TEMPLATES / name).read_text()).render(context)
    )


def started(root: Path) -> hardware.Booted:
    """Bring all files into the boot of the newest kernel, and boot."""
    for words in (["update-initramfs", "-u"], ["grub-mkconfig", "-o", "/boot/grub/grub.cfg"]):
        done = update(root, *words)
        assert done.returncode == 0, done.stderr
    if refusal := refused():
        pytest.skip(f"the scripts of an initramfs need mount namespaces and FUSE: {refusal}")
    return read_boot(root)


@functools.cache
def refused() -> str:
    """Why this machine cannot run the scripts of an initramfs; empty when it can."""
    try:
        initramfs.in_namespace("rehearsal.node.written", {})
    except initramfs.NotRun as error:
        return str(error).splitlines()[-1]
    return ""


@pytest.fixture
def bound(root: Path) -> Callable[..., hardware.Booted]:
    """Boots the node with the project's own hook and script for these devices."""

    def boot_with(*devices: dict[str, object]) -> hardware.Booted:
        install(root, "etc/initramfs-tools/hooks/gpulab-vfio", rendered("hooks/gpulab-vfio.j2"))
        install(root, BIND_SCRIPT, rendered("scripts/init-top/gpulab-vfio.j2", devices=devices))
        return started(root)

    return boot_with


def change_machine(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = root / hardware.HARDWARE.lstrip("/")
    described = json.loads(path.read_text())
    change(described)
    path.write_text(json.dumps(described))


def add_twin(described: dict[str, Any]) -> None:
    """A second A4000 behind a root port of its own."""
    for device in [device for device in described["devices"] if device["address"].startswith("0000:01:00")]:
        described["devices"].append(device | {"address": device["address"].replace("01:00", "03:00"), "group": 20})


def share_group(described: dict[str, Any]) -> None:
    """The network card gets into the GPU's IOMMU group."""
    next(device for device in described["devices"] if device["address"] == NIC)["group"] = 14


def test_declared_card_is_bound_and_its_twin_stays_with_the_host(root, bound):
    change_machine(root, add_twin)
    outcome = bound(CARD)
    assert (outcome.drivers[GPU], outcome.drivers[AUDIO]) == ("vfio-pci", "vfio-pci")
    assert (outcome.drivers[TWIN_GPU], outcome.drivers[TWIN_AUDIO]) == ("nouveau", "snd_hda_intel")
    assert outcome.overrides == {GPU: "vfio-pci", AUDIO: "vfio-pci"}
    assert outcome.vfio_groups == [14]
    assert f"gpulab: {GPU} is given to vfio-pci" in outcome.messages
    assert f"gpulab: {AUDIO} is given to vfio-pci" in outcome.messages


def test_both_twins_are_bound_when_both_are_declared(root, bound):
    """The second card finds vfio-pci loaded already: only a write to drivers_probe offers it."""
    change_machine(root, add_twin)
    functions = [{"address": TWIN_GPU, "id": "10de:24b0"}, {"address": TWIN_AUDIO, "id": "10de:228b"}]
    outcome = bound(CARD, CARD | {"name": "gpu1", "address": "0000:03:00", "functions": functions})
    assert outcome.vfio_groups == [14, 20]
    assert outcome.drivers[TWIN_AUDIO] == "vfio-pci"


def test_other_card_at_the_address_is_left_to_the_host(bound):
    functions = [{"address": GPU, "id": "10de:2684"}, {"address": AUDIO, "id": "10de:22ba"}]
    outcome = bound(CARD | {"functions": functions})
    assert (outcome.drivers[GPU], outcome.overrides) == ("nouveau", {})
    assert outcome.messages == [f"gpulab: {GPU} is left to the host: 10de:24b0, declared is 10de:2684"]


def test_card_that_is_not_there_stops_nothing(bound):
    elsewhere = {"address": "0000:05:00", "functions": [{"address": "0000:05:00.0", "id": "10de:24b0"}]}
    outcome = bound(CARD | elsewhere, CARD)
    assert outcome.messages[0] == "gpulab: 0000:05:00.0 is not there"
    assert outcome.drivers[GPU] == "vfio-pci"


def test_shared_group_is_left_to_the_host(root, bound):
    change_machine(root, share_group)
    outcome = bound(CARD)
    assert (outcome.drivers[GPU], outcome.overrides) == ("nouveau", {})
    assert f"its IOMMU group also holds {NIC} (class 0x020000)" in outcome.messages[0]


def test_shared_group_that_is_allowed_is_bound(root, bound):
    change_machine(root, share_group)
    outcome = bound(CARD | {"allow_shared_group": True})
    assert (outcome.drivers[GPU], outcome.drivers[NIC]) == ("vfio-pci", "igc")


def test_word_on_the_command_line_leaves_all_to_the_host(root, bound):
    (root / "etc/default/grub.d/off.cfg").write_text(
        'GRUB_CMDLINE_LINUX_DEFAULT="$GRUB_CMDLINE_LINUX_DEFAULT gpulab_vfio=off"\n'
    )
    outcome = bound(CARD)
    assert (outcome.drivers[GPU], outcome.overrides) == ("nouveau", {})
    assert outcome.messages == ["gpulab: no device is given to vfio-pci: gpulab_vfio=off"]


def test_without_iommu_the_card_stays_with_the_host(root, bound):
    change_machine(root, lambda described: described.update(iommu="absent"))
    assert bound(CARD).drivers[GPU] == "nouveau"


def test_script_without_its_hook_leaves_the_card_to_the_host(root):
    """vfio-pci is not in the archive: nobody else is kept away for nothing."""
    install(root, BIND_SCRIPT, rendered("scripts/init-top/gpulab-vfio.j2", devices=[CARD]))
    outcome = started(root)
    assert outcome.drivers[GPU] == "nouveau"
    assert f"gpulab: {GPU} is left to the host: this initramfs has no vfio-pci" in outcome.messages


def test_hook_alone_puts_modules_into_the_archive_and_loads_none(root):
    install(root, "etc/initramfs-tools/hooks/gpulab-vfio", rendered("hooks/gpulab-vfio.j2"))
    outcome = started(root)
    files = initramfs.unpack((root / "boot/initrd.img-6.14.8-2-pve").read_bytes())
    assert initramfs.modules(files) == {"vfio_pci", "vfio_pci_core", "vfio_iommu_type1", "vfio"}
    assert "vfio_pci" not in outcome.modules


SCRIPT = """#!/bin/sh
[ "$1" = prereqs ] && exit 0
{}
"""


def with_script(root: Path, *lines: str, name: str = "own") -> hardware.Booted:
    """Boot with a script of the user's own in init-top, and vfio-pci in the archive."""
    install(root, "etc/initramfs-tools/hooks/gpulab-vfio", rendered("hooks/gpulab-vfio.j2"))
    install(root, f"etc/initramfs-tools/scripts/init-top/{name}", SCRIPT.format("\n".join(lines)))
    return started(root)


OVERRIDE = f"echo vfio-pci > /sys/bus/pci/devices/{GPU}/driver_override"
PROBE = f"echo {GPU} > /sys/bus/pci/drivers_probe"


@pytest.mark.parametrize(
    ("lines", "driver"),
    [
        ([OVERRIDE, "modprobe vfio-pci"], "vfio-pci"),
        (["modprobe vfio_pci", OVERRIDE, PROBE], "vfio-pci"),
        # Nobody offers the device to vfio-pci again, and the override refuses nouveau.
        (["modprobe vfio-pci", OVERRIDE], None),
        (["modprobe vfio-pci", PROBE, OVERRIDE], None),
        ([OVERRIDE, PROBE], None),
        ([OVERRIDE, f"echo > /sys/bus/pci/devices/{GPU}/driver_override", "modprobe vfio-pci"], "nouveau"),
        (["modprobe vfio-pci ids=10de:24b0"], "vfio-pci"),
    ],
)
def test_order_of_override_module_and_probe_decides_as_in_the_kernel(root, lines, driver):
    assert with_script(root, *lines).drivers.get(GPU) == driver


def test_script_sees_at_once_what_its_write_has_done(root):
    look = f"readlink /sys/bus/pci/devices/{GPU}/driver > /dev/kmsg"
    cat = f"cat /sys/bus/pci/devices/{GPU}/driver_override"
    outcome = with_script(root, cat, OVERRIDE, cat, "modprobe vfio-pci", look)
    # What it says on the console comes when it has ended.
    assert outcome.messages == [
        "../../drivers/vfio-pci",
        "scripts/init-top/own: (null)",
        "scripts/init-top/own: vfio-pci",
    ]


def test_module_outside_of_the_archive_is_not_found(root):
    outcome = with_script(root, "modprobe -q i915; echo $?", "modprobe i915")
    assert outcome.messages == [
        "scripts/init-top/own: 1",
        "scripts/init-top/own: modprobe: FATAL: Module i915 not found in the initramfs (simulated)",
    ]


def test_probe_of_a_device_that_is_not_there_is_an_error(root):
    (message,) = with_script(root, "echo 0000:09:00.0 > /sys/bus/pci/drivers_probe").messages
    assert message.endswith("I/O error") or "No such device" in message


def test_script_cannot_reach_this_machine(root, tmp_path):
    mark = tmp_path / "reached"
    outcome = with_script(root, f"mkdir -p {tmp_path}; echo > {mark}; echo > /etc/gpulab-was-here; ls /sys")
    assert not mark.exists()
    assert not Path("/etc/gpulab-was-here").exists()
    assert "scripts/init-top/own: bus" in outcome.messages


def test_script_that_is_not_executable_does_not_run(root):
    with_script(root, "echo ran")
    (root / "etc/initramfs-tools/scripts/init-top/own").chmod(0o644)
    assert started(root).messages == []


def test_scripts_run_in_the_order_of_their_prereqs(root):
    with_script(root, "echo second", name="a")
    text = SCRIPT.format("echo first")
    install(root, "etc/initramfs-tools/scripts/init-top/b", text)
    install(
        root, "etc/initramfs-tools/scripts/init-top/a", '#!/bin/sh\n[ "$1" = prereqs ] && echo b && exit\necho second\n'
    )
    assert started(root).messages == ["scripts/init-top/b: first", "scripts/init-top/a: second"]


def test_hook_with_a_prereq_runs_after_it(root):
    """Without it their names decide."""
    hooks = "etc/initramfs-tools/hooks"
    install(root, f"{hooks}/a", '#!/bin/sh\n[ "$1" = prereqs ] && echo b && exit\necho a >> $DESTDIR/conf/said\n')
    install(root, f"{hooks}/b", '#!/bin/sh\n[ "$1" = prereqs ] && exit\necho b >> $DESTDIR/conf/said\n')
    started(root)
    assert initramfs.unpack((root / "boot/initrd.img-6.14.8-2-pve").read_bytes())["conf/said"] == "b\na\n"


def test_modules_of_the_list_are_in_the_archive_and_loaded_early(root):
    (root / "etc/initramfs-tools/modules").write_text("# a comment\nvfio-pci\n")
    (root / "etc/modprobe.d/own.conf").write_text(IDS)
    outcome = started(root)
    assert outcome.drivers[GPU] == "vfio-pci"
    files = initramfs.unpack((root / "boot/initrd.img-6.14.8-2-pve").read_bytes())
    assert "vfio_pci" in initramfs.modules(files)


def test_override_for_another_driver_refuses_vfio():
    config = module_config({"etc/modprobe.d/own.conf": IDS + SOFTDEPS}, QUIET)
    outcome = boot(MACHINE, QUIET, config, hardware.InitTop(overrides={GPU: "nouveau"}))
    assert (outcome.drivers[GPU], outcome.drivers[AUDIO]) == ("nouveau", "vfio-pci")


def laid_out(folder: Path, name: str) -> str:
    return (folder / "sys" / name).read_text().strip()


def test_layout_shows_bars_reset_methods_and_links(tmp_path):
    lay_out(tmp_path, booted())
    gpu = f"bus/pci/devices/{GPU}"
    lines = [[int(word, 16) for word in line.split()] for line in laid_out(tmp_path, f"{gpu}/resource").splitlines()]
    assert len(lines) == 13
    sizes = [end - start + 1 if end else 0 for start, end, _ in lines]
    assert sizes == [16 << 20, 256 << 20, 0, 32 << 20, 0, 128, *[0] * 7]
    assert [lines[0][2], lines[1][2], lines[5][2]] == [0x40200, 0x14220C, 0x40101]
    assert laid_out(tmp_path, f"{gpu}/reset_method") == "flr bus"
    assert laid_out(tmp_path, f"{gpu}/current_link_speed") == "16.0 GT/s PCIe"
    assert laid_out(tmp_path, f"{gpu}/max_link_width") == "16"
    assert laid_out(tmp_path, f"{gpu}/driver_override") == "(null)"
    assert not (tmp_path / f"sys/bus/pci/devices/{AUDIO}/reset_method").exists()
    assert not (tmp_path / "sys/bus/pci/devices/0000:00:00.0/current_link_speed").exists()


def test_no_two_bars_of_a_machine_overlap(tmp_path):
    cards = [
        replace(MACHINE.devices[4], address=f"0000:0{bus}:00.0", bars=(16 << 20, 32 << 30, 32 << 20)) for bus in "345"
    ]
    lay_out(tmp_path, booted(machine=replace(MACHINE, devices=(*MACHINE.devices, *cards))))
    ranges = []
    for path in (tmp_path / "sys/bus/pci/devices").glob("*/resource"):
        for line in path.read_text().splitlines():
            start, end, flags = (int(word, 16) for word in line.split())
            if end:
                # Ports are counted apart from memory.
                ranges.append((flags & 0x100, start, end))
    ranges.sort()
    assert len(ranges) == 19
    for (kind, _, end), (next_kind, start, _) in itertools.pairwise(ranges):
        assert kind != next_kind or end < start


def test_more_than_six_bars_are_an_error():
    crowded = replace(MACHINE.devices[4], bars=(64 << 20,) * 4)
    with pytest.raises(ValueError, match=r"^0000:01:00\.0: more than six base address registers"):
        hardware._resources([crowded])


@pytest.mark.parametrize(("iommu", "tables"), [("intel", ["DMAR"]), ("amd", ["IVRS"]), ("absent", [])])
def test_firmware_table_is_there_unless_the_firmware_hides_the_iommu(tmp_path, iommu, tables):
    """Also where the command line switches the IOMMU off: the table says what the firmware offers."""
    lay_out(tmp_path, booted(machine=replace(MACHINE, iommu=iommu), cmdline=f"{QUIET} iommu=off"))
    assert os.listdir(tmp_path / "sys/firmware/acpi/tables") == tables


@pytest.mark.parametrize(
    ("words", "memory_mib", "small", "large"),
    [
        ("", None, 0, 0),
        ("hugepagesz=1G hugepages=16", None, 0, 16),
        ("hugepagesz=2M hugepages=512", None, 512, 0),
        ("hugepages=512", None, 512, 0),
        ("default_hugepagesz=1G hugepages=4", None, 0, 4),
        ("hugepagesz=1G hugepages=2 hugepagesz=2M hugepages=3", None, 3, 2),
        ("hugepagesz=1G quiet hugepages=2", None, 0, 2),
        ("hugepagesz=16K hugepages=2", None, 0, 0),
        ("hugepagesz=1G hugepages=2 hugepages=3", None, 0, 2),
        ("hugepagesz=1G hugepages=64", 32768, 0, 32),
    ],
)
def test_huge_pages_follow_the_command_line(tmp_path, words, memory_mib, small, large):
    machine = replace(MACHINE, memory_mib=memory_mib)
    lay_out(tmp_path, booted(cmdline=f"{QUIET} {words}", machine=machine))
    pages = "kernel/mm/hugepages/hugepages-{}kB/nr_hugepages"
    assert laid_out(tmp_path, pages.format(2048)) == str(small)
    assert laid_out(tmp_path, pages.format(1048576)) == str(large)


def test_parameters_of_loaded_modules_are_shown_as_the_kernel_shows_them(tmp_path):
    text = "options vfio-pci disable_idle_d3=1\noptions vfio_iommu_type1 allow_unsafe_interrupts=on\n"
    lay_out(tmp_path, booted(text, "vfio-pci\n"))
    assert laid_out(tmp_path, "module/vfio_pci/parameters/disable_idle_d3") == "Y"
    assert laid_out(tmp_path, "module/vfio_pci/parameters/nointxmask") == "N"
    assert laid_out(tmp_path, "module/vfio_iommu_type1/parameters/allow_unsafe_interrupts") == "Y"


def test_parameters_have_the_kernels_own_values_by_default(tmp_path):
    lay_out(tmp_path, booted("", "vfio-pci\n"))
    assert laid_out(tmp_path, "module/vfio_pci/parameters/disable_idle_d3") == "N"
    assert laid_out(tmp_path, "module/vfio_iommu_type1/parameters/allow_unsafe_interrupts") == "N"


def test_parameters_of_a_module_loaded_in_the_initramfs_come_from_there(root, bound):
    (root / "etc/modprobe.d/gpulab-vfio.conf").write_text("options vfio-pci disable_idle_d3=1\n")
    lay_out(root / "laid-out", bound(CARD))
    assert laid_out(root / "laid-out", "module/vfio_pci/parameters/disable_idle_d3") == "Y"


def test_options_that_a_script_gives_to_modprobe_count(root):
    lay_out(root / "laid-out", with_script(root, "modprobe vfio-pci disable_idle_d3"))
    assert laid_out(root / "laid-out", "module/vfio_pci/parameters/disable_idle_d3") == "Y"


@pytest.mark.parametrize("value", ["downstream,multifunction", "downstream", "multifunction"])
def test_acs_override_gives_each_device_a_group_of_its_own(value):
    groups = {
        device.address: device.group for device in booted(cmdline=f"{QUIET} pcie_acs_override={value}").machine.devices
    }
    assert groups["0000:00:01.0"] == 14
    assert groups[GPU] == groups[AUDIO] == 17
    assert groups[NIC] == 16
    assert len(set(groups.values())) == 6


def test_acs_override_for_named_ids_does_nothing():
    assert booted(cmdline=f"{QUIET} pcie_acs_override=id:10de:24b0").machine.devices == MACHINE.devices


def test_acs_override_frees_a_shared_card_for_the_script(root, bound):
    change_machine(root, share_group)
    (root / "etc/default/grub.d/acs.cfg").write_text(
        'GRUB_CMDLINE_LINUX_DEFAULT="$GRUB_CMDLINE_LINUX_DEFAULT pcie_acs_override=downstream,multifunction"\n'
    )
    assert bound(CARD).drivers[GPU] == "vfio-pci"


def test_cpu_and_memory_are_the_machines_own(tmp_path):
    lay_out(tmp_path, booted(machine=replace(MACHINE, cpu="amd", memory_mib=65536)))
    assert "AuthenticAMD" in (tmp_path / "proc/cpuinfo").read_text()
    assert (tmp_path / "proc/meminfo").read_text().split("\n")[0].split()[1:] == ["67108864", "kB"]


@pytest.mark.parametrize(
    ("described", "cpu"),
    [
        ({"iommu": "intel"}, "intel"),
        ({"iommu": "amd"}, "amd"),
        ({"iommu": "absent"}, "intel"),
        ({"iommu": "absent", "cpu": "amd"}, "amd"),
    ],
)
def test_maker_of_the_cpu_follows_the_iommu_unless_it_is_named(described, cpu):
    machine = hardware.read_machine(json.dumps({"kernel": "6.14.8-2-pve", "devices": [], **described}))
    assert machine.cpu == cpu
    assert machine.kernels == ("6.14.8-2-pve",)


OLD_KERNEL = "6.8.12-15-pve"


def test_each_kernel_of_the_machine_is_installed_with_vfio(root):
    for version in ("6.14.8-2-pve", OLD_KERNEL):
        assert (root / f"boot/vmlinuz-{version}").exists()
        assert (root / f"boot/initrd.img-{version}").exists()
        assert "kernel/drivers/vfio/pci/vfio-pci.ko:" in (root / f"usr/lib/modules/{version}/modules.dep").read_text()


def test_newest_kernel_boots_without_a_pin(root):
    assert read_boot(root).machine.kernel == "6.14.8-2-pve"


def test_pinned_kernel_boots_until_it_is_unpinned(root):
    done = update(root, "proxmox-boot-tool", "kernel", "pin", OLD_KERNEL)
    assert (done.returncode, "simulated" in done.stdout) == (0, True)
    assert (root / "etc/kernel/proxmox-boot-pin").read_text() == f"{OLD_KERNEL}\n"
    outcome = read_boot(root)
    assert outcome.machine.kernel == OLD_KERNEL
    assert outcome.cmdline == QUIET.replace("6.14.8-2-pve", OLD_KERNEL)
    assert f"Pinned kernel:\n{OLD_KERNEL}\n" in update(root, "proxmox-boot-tool", "kernel", "list").stdout

    assert update(root, "proxmox-boot-tool", "kernel", "unpin").returncode == 0
    assert not (root / "etc/kernel/proxmox-boot-pin").exists()
    assert not (root / "etc/default/grub.d/proxmox-kernel-pin.cfg").exists()
    assert read_boot(root).machine.kernel == "6.14.8-2-pve"


def test_pin_in_a_file_alone_changes_nothing(root):
    """As on a real node that boots by GRUB: the file is read by the ESP sync and by proxmox-boot-tool, not by GRUB."""
    (root / "etc/kernel").mkdir(exist_ok=True)
    (root / "etc/kernel/proxmox-boot-pin").write_text(f"{OLD_KERNEL}\n")
    update(root, "grub-mkconfig", "-o", "/boot/grub/grub.cfg")
    assert read_boot(root).machine.kernel == "6.14.8-2-pve"


def test_pin_of_an_unknown_kernel_is_refused(root):
    done = update(root, "proxmox-boot-tool", "kernel", "pin", "5.15.1-1-pve")
    assert done.returncode == 1
    assert "E: no kernel image found in /boot for '5.15.1-1-pve', not setting default.\n" in done.stderr
    assert not (root / "etc/kernel/proxmox-boot-pin").exists()


def test_pin_is_replaced_by_another(root):
    update(root, "proxmox-boot-tool", "kernel", "pin", OLD_KERNEL)
    done = update(root, "proxmox-boot-tool", "kernel", "pin", "6.14.8-2-pve")
    assert f"Overriding previously pinned version '{OLD_KERNEL}' with '6.14.8-2-pve'\n" in done.stdout
    assert read_boot(root).machine.kernel == "6.14.8-2-pve"


def test_boot_tool_without_esps_says_so(root):
    done = update(root, "proxmox-boot-tool", "status")
    assert (done.returncode, done.stderr) == (2, "E: /etc/kernel/proxmox-boot-uuids does not exist.\n")
    assert "skipping ESP sync" in update(root, "proxmox-boot-tool", "refresh").stdout
    assert update(root, "proxmox-boot-tool", "format", "/dev/sda2").returncode == 1


@pytest.mark.parametrize(
    ("default", "kernel"),
    [
        ("0", "6.14"),
        ("1>2", "6.8"),
        ("1>gnulinux-6.8-advanced-x", "6.8"),
        ("gnulinux-advanced-x>gnulinux-6.8-advanced-x", "6.8"),
        ("Advanced options>PVE, with Linux 6.8", "6.8"),
        ("1", "6.14"),
        ("7", "6.14"),
        ("saved", "6.14"),
    ],
)
def test_default_entry_is_found_as_grub_finds_it(default, kernel):
    entries = "".join(
        f"\tmenuentry 'PVE, with Linux {version}' --class os $menuentry_id_option 'gnulinux-{version}-{kind}-x' {{\n"
        f"\t\tlinux   /boot/vmlinuz-{version} ro\n\t}}\n"
        for version in ("6.14", "6.8")
        for kind in ("advanced", "recovery")
    )
    config = (
        f"set default=\"{default}\"\nmenuentry 'PVE' {{\n\tlinux /boot/vmlinuz-6.14 ro\n}}\n"
        f"submenu 'Advanced options' $menuentry_id_option 'gnulinux-advanced-x' {{\n{entries}}}\n"
    )
    assert grub.default_entry(config).kernel == kernel

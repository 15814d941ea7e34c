# SPDX-License-Identifier: MIT
"""What the guest's side of the simulation says: the PCI device, the module's tools and the container toolkit."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from rehearsal.nvidia import guest, packages
from rehearsal.pve.containers import gpu_file
from rehearsal.pve.power import PciDevice
from verify.nvidia import remote

CARD = {"address": "0000:01:00.0", "class": "0x030000", "id": "10de:24b0", "subsystem": "10de:14ad"}
AUDIO = {"address": "0000:01:00.1", "class": "0x040300", "id": "10de:228b", "subsystem": "10de:14ad"}


def program(name: str) -> ModuleType:
    """A program of the guest, as a module: it is no part of our package there."""
    spec = importlib.util.spec_from_file_location(name, packages.SOURCE / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module's tools, with all their files below the test's folder and a card in the guest."""
    tools = program("module")
    places = {
        "HARDWARE": "hardware", "STATE": "run", "LOADED": "run/modules", "BUILT": "modules/updates/dkms",
        "TREE": "dkms", "SOURCES": "src", "FIRMWARE": "firmware", "PCI": "pci",
    }  # fmt: skip
    for name, place in places.items():
        monkeypatch.setattr(tools, name, tmp_path / place)
    monkeypatch.setattr(tools, "KERNEL", "6.12.57+deb13-amd64")
    (tmp_path / "run").mkdir()
    (tmp_path / "hardware").mkdir()
    (tmp_path / "hardware/gpu.json").write_text(json.dumps({"simulated": True, "devices": [CARD, AUDIO]}))
    # Mounts and device nodes are for a container; the loading itself is what is looked at here.
    monkeypatch.setattr(tools, "show_modules", lambda: None)
    monkeypatch.setattr(tools, "make_nodes", lambda nodes: None)
    monkeypatch.setattr(tools, "hide_driver", lambda: None)
    monkeypatch.setattr(tools, "show_driver", lambda version: (tmp_path / "run/clients").touch())
    return tools


def test_build_installs_the_module_and_status_tells(module: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    module.dkms(["build", "580.95.05"])
    module.dkms(["status"])
    module.modinfo(["-F", "version", "nvidia"])
    assert capsys.readouterr().out == "nvidia/580.95.05, 6.12.57+deb13-amd64, x86_64: installed\n580.95.05\n"


def test_failed_build_leaves_it_added(module: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    (module.HARDWARE / "nvml.conf").write_text("dkms=fail\n")
    with pytest.raises(module.Refused, match="Bad return status for module build on kernel") as caught:
        module.dkms(["build", "580.95.05"])
    assert caught.value.status == 10
    module.dkms(["status", "nvidia"])
    assert capsys.readouterr().out == "nvidia/580.95.05: added\n"
    with pytest.raises(module.Refused, match=r"FATAL: Module nvidia not found in directory /lib/modules/6\.12\.57"):
        module.modprobe(["nvidia"])


def test_module_is_built_for_a_kernel_that_does_not_run(module: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    other = "6.12.63+deb13-amd64"
    source = module.SOURCES / "nvidia-580.95.05"
    source.mkdir(parents=True)
    module.dkms(["autoinstall", "-k", other])
    module.dkms(["status"])
    module.modinfo(["-k", other, "-F", "version", "nvidia"])
    with pytest.raises(module.Refused):
        module.modinfo(["-F", "version", "nvidia"])
    module.dkms(["install", "--force", "nvidia/580.95.05", "-k", module.KERNEL])
    module.modinfo(["-F", "version", "nvidia"])
    assert capsys.readouterr().out == f"nvidia/580.95.05, {other}, x86_64: installed\n580.95.05\n580.95.05\n"
    module.dkms(["remove", "580.95.05"])
    module.dkms(["status"])
    for words in ([], ["-k", other]):
        with pytest.raises(module.Refused):
            module.modinfo([*words, "nvidia"])
    assert capsys.readouterr().out == ""


def test_source_of_the_broken_driver_fails_as_the_compiler_would(module: ModuleType) -> None:
    version = packages.BROKEN_DRIVER[0]
    for path, file in packages.module_source(version, builds=False).items():
        target = module.SOURCES.parent / path.removeprefix("/usr/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.content)
    with pytest.raises(module.Refused):
        module.dkms(["build", version])
    assert "error: too few arguments to function" in (module.TREE / version / "build/make.log").read_text()
    line = int(re.search(r"nvidia\.c:(\d+):", (module.TREE / version / "build/make.log").read_text()).group(1))
    source = (module.SOURCES / f"nvidia-{version}/nvidia.c").read_text().splitlines()
    assert "pci_resize_resource" in source[line - 1]


def test_module_brings_what_it_needs(module: ModuleType) -> None:
    module.dkms(["build", "580.95.05"])
    module.modprobe(["nvidia-uvm"])
    assert module.loaded() == ["nvidia_uvm", "nvidia"]
    assert module.users("nvidia") == ["nvidia_uvm"]


def test_lines_are_those_of_proc_modules(module: ModuleType) -> None:
    module.dkms(["build", "580.95.05"])
    module.modprobe(["-a", "nvidia", "nvidia_uvm"])
    assert module.module_lines() == (
        "nvidia_uvm 2166784 0 - Live 0x0000000000000000 (OE)\n"
        "nvidia 14381056 1 nvidia_uvm, Live 0x0000000000000000 (OE)\n"
    )


def test_guest_without_card_cannot_load(module: ModuleType) -> None:
    module.dkms(["build", "580.95.05"])
    (module.HARDWARE / "gpu.json").unlink()
    with pytest.raises(module.Refused, match="could not insert 'nvidia': No such device"):
        module.modprobe(["nvidia"])


def test_audio_function_is_no_card(module: ModuleType) -> None:
    assert [device["address"] for device in module.devices()] == ["0000:01:00.0"]


def test_module_in_use_stays(module: ModuleType) -> None:
    module.dkms(["build", "580.95.05"])
    module.modprobe(["nvidia_uvm"])
    with pytest.raises(module.Refused, match="Module nvidia is in use by: nvidia_uvm"):
        module.rmmod(["nvidia"])
    holder = "import fcntl, sys; f = open(sys.argv[1]); fcntl.lockf(f, fcntl.LOCK_SH, 5); print(flush=True); input()"
    argv = [sys.executable, "-c", holder, str(module.STATE / "clients")]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(module.Refused, match=r"Module nvidia_uvm is in use\n.*nvidia is in use by"):
            module.rmmod(["nvidia_uvm", "nvidia"])
        process.communicate(b"\n")
    module.rmmod(["nvidia_uvm", "nvidia"])
    assert module.loaded() == []


def test_uuid_follows_the_address_unless_declared(module: ModuleType) -> None:
    assert module.uuid_of(CARD) == "GPU-51a7ed00-0000-4000-8000-000000001000"
    assert module.uuid_of({**CARD, "uuid": "GPU-1"}) == "GPU-1"


def test_driver_says_that_it_is_simulated(module: ModuleType) -> None:
    assert module.version_text("580.95.05").splitlines()[0] == (
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (simulated)"
    )


@pytest.fixture
def kernel(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the journal has from the kernel."""
    said: list[str] = []
    monkeypatch.setattr(module, "kernel_says", lambda *lines: said.extend(lines))
    return said


def test_xid_is_what_the_health_check_looks_for(module: ModuleType, kernel: list[str]) -> None:
    module.xid(["79"])
    module.xid(["31", "0000:01:00.0"])
    module.xid(["7"])
    assert kernel[0] == ("NVRM: Xid (PCI:0000:01:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.")
    assert kernel[2] == "NVRM: Xid (PCI:0000:01:00): 7, pid='<unknown>', name=<unknown>"
    assert remote.xids("\n".join(kernel)) == [7, 31, 79]


@pytest.mark.parametrize("words", [[], ["many"], ["79", "0000:02:00.0"]])
def test_xid_of_nothing_is_refused(module: ModuleType, kernel: list[str], words: list[str]) -> None:
    with pytest.raises(module.Refused):
        module.xid(words)
    assert kernel == []


def test_xid_of_the_fault_file_is_told_when_the_driver_is_loaded(module: ModuleType, kernel: list[str]) -> None:
    module.dkms(["build", "580.95.05"])
    (module.HARDWARE / "nvml.conf").write_text("xid=48\n")
    module.modprobe(["nvidia"])
    assert remote.xids("\n".join(kernel)) == [48]


def test_card_that_fell_off_the_bus_reads_all_ones_and_takes_no_driver(module: ModuleType, kernel: list[str]) -> None:
    for device in (CARD, AUDIO, {**CARD, "address": "0000:02:00.0"}):
        guest.lay_out(device, module.PCI)
    module.fall_off([])
    assert (module.PCI / "0000:01:00.0/config").read_bytes() == (module.PCI / "0000:01:00.1/config").read_bytes()
    assert set((module.PCI / "0000:01:00.0/config").read_bytes()) == {0xFF}
    assert (module.PCI / "0000:02:00.0/config").read_bytes()[:2] == b"\xde\x10"
    assert remote.xids("\n".join(kernel)) == [79]
    module.dkms(["build", "580.95.05"])
    with pytest.raises(module.Refused, match="No such device"):
        module.modprobe(["nvidia"])


def test_driver_without_its_own_firmware_starts_no_card(module: ModuleType, kernel: list[str]) -> None:
    """The module loads, and NVML finds no device."""
    other = module.FIRMWARE / "580.105.08/gsp_ga10x.bin"
    other.parent.mkdir(parents=True)
    other.touch()
    assert module.usable([CARD], "580.95.05") == []
    assert kernel[0].endswith("Direct firmware load for nvidia/580.95.05/gsp_ga10x.bin failed with error -2")
    assert kernel[2].startswith("NVRM: GPU 0000:01:00.0: RmInitAdapter failed!")
    kernel.clear()
    assert module.usable([CARD], "580.105.08") == [CARD]
    assert kernel == []


def test_ecc_mode_of_the_card_outlives_the_driver(module: ModuleType) -> None:
    assert module.settings(1) == bytes(4096)
    (module.HARDWARE / "inforom").write_text("0.ecc=1\n3.ecc=1\n")
    assert module.settings(1)[:16] == b"\1\0\0\0".ljust(16, b"\0")
    assert module.settings(4)[12:16] == b"\1\0\0\0"


@pytest.fixture
def ctk() -> ModuleType:
    return program("ctk")


def test_cdi_yaml_is_the_specification(ctk: ModuleType) -> None:
    spec = ctk.specification(["GPU-a", "GPU-b"], ["nvidia-uvm", "nvidiactl"])
    assert yaml.safe_load(ctk.yaml(spec)) == spec
    assert spec["cdiVersion"] == "0.7.0"
    assert [device["name"] for device in spec["devices"]] == ["0", "1", "GPU-a", "GPU-b", "all"]
    nodes = [node["path"] for node in spec["devices"][-1]["containerEdits"]["deviceNodes"]]
    assert nodes == ["/dev/nvidia0", "/dev/nvidia1"]


def test_cdi_list_reads_yaml_and_json(ctk: ModuleType) -> None:
    spec = ctk.specification(["GPU-a"], ["nvidiactl"])
    wanted = ["nvidia.com/gpu=0", "nvidia.com/gpu=GPU-a", "nvidia.com/gpu=all"]
    assert ctk.devices_in(ctk.yaml(spec)) == wanted
    assert ctk.devices_in(json.dumps(spec, indent=2)) == wanted


def test_configure_keeps_what_docker_was_told_before(ctk: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "daemon.json"
    path.write_text('{"log-driver": "journald", "features": {"containerd-snapshotter": false}}')
    assert ctk.main(["runtime", "configure", "--runtime=docker", f"--config={path}", "--cdi.enabled"]) == 0
    assert json.loads(path.read_text()) == {
        "log-driver": "journald",
        "features": {"containerd-snapshotter": False, "cdi": True},
        "runtimes": {"nvidia": {"args": [], "path": "nvidia-container-runtime"}},
    }


def test_generate_without_driver_fails(ctk: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """There is no libnvidia-ml.so.1 on the control machine."""
    assert ctk.main(["cdi", "generate", f"--output={tmp_path}/nvidia.yaml"]) == 1
    assert "failed to" in capsys.readouterr().err
    assert not (tmp_path / "nvidia.yaml").exists()


def test_toolkit_says_that_it_is_simulated(ctk: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert ctk.main(["--version"]) == 0
    assert "simulated" in capsys.readouterr().out


def test_guest_shows_the_card_to_lspci(tmp_path: Path) -> None:
    for device in (CARD, AUDIO):
        guest.lay_out(device, tmp_path)
    folder = tmp_path / "0000:01:00.0"
    assert (folder / "vendor").read_text() == "0x10de\n"
    assert (folder / "class").read_text() == "0x030000\n"
    config = (folder / "config").read_bytes()
    assert (config[0:4], config[0x0A:0x0C], config[0x2C:0x30]) == (
        bytes.fromhex("de10b024"), bytes.fromhex("0003"), bytes.fromhex("de10ad14"),
    )  # fmt: skip
    assert (tmp_path / "0000:01:00.1/class").read_text() == "0x040300\n"


def test_lab_writes_what_the_guest_reads(module: ModuleType) -> None:
    """The API's side of the lab describes the card, ours shows it."""
    device = PciDevice(
        address="0000:41:00.0", pci_class="0x030000", vendor="10de", device="24b0", subsystem_vendor="10de",
        subsystem_device="14ad", name="GA104GL [RTX A4000]",
    )  # fmt: skip
    (module.HARDWARE / "gpu.json").write_text(gpu_file("pve1", [device]))
    (card,) = module.devices()
    assert card["address"] == "0000:01:00.0"
    assert module.ids(card) == "10de:24b0 14ad10de"
    assert module.uuid_of(card).startswith("GPU-")


def test_guest_program_needs_the_standard_library_alone(tmp_path: Path) -> None:
    text, _ = guest.files()[guest.PROGRAM]
    script = tmp_path / "guest.py"
    script.write_text(text.replace('if __name__ == "__main__":\n    main()', ""))
    subprocess.run([sys.executable, "-IS", str(script)], check=True)

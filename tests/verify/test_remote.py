# SPDX-License-Identifier: MIT
"""What the scripts that run on the hosts make of what they find there."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from verify.containers import remote as containers
from verify.hypervisor import remote as hypervisor
from verify.nvidia import remote as nvidia
from verify.system import remote as system

VFIO = "options vfio-pci ids=10de:24b0,10DE:228b\nblacklist nouveau\n"


def put(root: Path, name: str, text: str) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# The node.


def node_tree(root: Path) -> None:
    put(root, "proc/cmdline", "BOOT_IMAGE=/boot/vmlinuz-6.14.8-2-pve root=/dev/sda1 iommu=pt\n")
    (root / "sys/class/iommu/dmar0").mkdir(parents=True)
    for function, device, driver in (("0", "0x24b0", "vfio-pci"), ("1", "0x228b", "snd_hda_intel")):
        folder = root / f"sys/bus/pci/devices/0000:01:00.{function}"
        put(folder, "vendor", "0x10de\n")
        put(folder, "device", f"{device}\n")
        put(folder, "class", "0x030000\n")
        for link, target in (("driver", f"drivers/{driver}"), ("iommu_group", "groups/14")):
            (root / target).mkdir(parents=True, exist_ok=True)
            (folder / link).symlink_to(root / target)
    (root / "sys/kernel/iommu_groups/14").mkdir(parents=True)
    put(root, "etc/modprobe.d/gpulab.conf", VFIO)


def test_node_is_read(tmp_path: Path) -> None:
    node_tree(tmp_path)

    found = hypervisor.observe(tmp_path)

    assert found["kernel"] == "6.14.8-2-pve"
    assert found["iommus"] == ["dmar0"] and found["groups"] == ["14"]
    assert found["devices"]["0000:01:00.0"] == {
        "id": "10de:24b0",
        "driver": "vfio-pci",
        "group": "14",
        "bridge": False,
    }
    assert found["devices"]["0000:01:00.1"]["driver"] == "snd_hda_intel"
    assert found["modprobe"] == {"vfio_ids": ["10de:24b0", "10de:228b"], "blacklist": ["nouveau"]}
    assert "No such file" in found["initramfs"]["error"]


@pytest.mark.parametrize(
    ("cmdline", "kernel"),
    [
        ("BOOT_IMAGE=/vmlinuz-6.8.12-1-pve root=ZFS=rpool/ROOT/pve-1", "6.8.12-1-pve"),
        (r"initrd=\EFI\proxmox\6.14.8-2-pve\initrd.img-6.14.8-2-pve root=ZFS=rpool", "6.14.8-2-pve"),
    ],
)
def test_booted_kernel_of_both_boot_loaders(cmdline: str, kernel: str) -> None:
    assert hypervisor.booted_kernel(cmdline) == kernel


def test_modprobe_files_hide_those_of_weaker_folders(tmp_path: Path) -> None:
    put(tmp_path, "usr/lib/modprobe.d/vfio.conf", "options vfio-pci ids=1:2\n")
    put(tmp_path, "etc/modprobe.d/vfio.conf", "options vfio-pci ids=3:4\n")
    put(tmp_path, "etc/modprobe.d/vfio.conf.bak", "options vfio-pci ids=5:6\n")

    assert hypervisor.effective(hypervisor.modprobe_files(tmp_path))["vfio_ids"] == ["3:4"]


@pytest.mark.parametrize(
    ("files", "ids"),
    [
        ({"a.conf": "options vfio_pci ids=1:2 disable_vga=1"}, ["1:2"]),
        ({"a.conf": "options vfio-pci \\\n  ids=1:2"}, ["1:2"]),
        ({"a.conf": "# options vfio-pci ids=1:2"}, []),
        # The kernel takes the last value of a parameter: a later file wins.
        ({"a.conf": "options vfio-pci ids=1:2", "z.conf": "options vfio-pci ids=3:4"}, ["3:4"]),
        ({"a.conf": "options vfio ids=1:2"}, []),
    ],
)
def test_effective_options(files: dict[str, str], ids: list[str]) -> None:
    assert hypervisor.effective(files)["vfio_ids"] == ids


def cpio(files: dict[str, str]) -> bytes:
    """An archive of the kind `newc`."""
    out = io.BytesIO()
    for name, text in {**files, "TRAILER!!!": ""}.items():
        data, raw = text.encode(), name.encode() + b"\0"
        fields = [0, 0o100644, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(raw), 0]
        for block in (b"070701" + b"".join(b"%08X" % field for field in fields) + raw, data):
            out.write(block + b"\0" * (-len(block) % 4))
    return out.getvalue()


def tar(files: dict[str, str]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return out.getvalue()


MAIN = {"init": "#!/bin/sh", "lib/modules/big.ko": "x" * 3_000_001, "etc/modprobe.d/gpulab.conf": VFIO, "z": "end"}
EARLY = cpio({"kernel/x86/microcode/GenuineIntel.bin": "y" * 1001}) + b"\0" * 700


@pytest.mark.parametrize(
    "image",
    [
        cpio(MAIN),
        gzip.compress(cpio({f"./{name}": text for name, text in MAIN.items()})),
        EARLY + gzip.compress(cpio(MAIN)),
        EARLY + EARLY + gzip.compress(cpio(MAIN)),
        EARLY + cpio(MAIN),
        tar(MAIN),
        gzip.compress(tar({f"./{name}": text for name, text in MAIN.items()})),
    ],
    ids=["plain", "packed", "microcode", "two early", "early and plain", "tar", "packed tar"],
)
def test_modprobe_files_of_an_initramfs(tmp_path: Path, image: bytes) -> None:
    path = tmp_path / "initrd.img"
    path.write_bytes(image)

    found = hypervisor.initramfs(path)

    assert found == {"path": str(path), "vfio_ids": ["10de:24b0", "10de:228b"], "blacklist": ["nouveau"]}


@pytest.mark.parametrize("image", [b"", b"words", EARLY + gzip.compress(cpio(MAIN))[:-2000], cpio(MAIN)[:500]])
def test_damaged_initramfs_is_told(tmp_path: Path, image: bytes) -> None:
    path = tmp_path / "initrd.img"
    path.write_bytes(image)

    found = hypervisor.initramfs(path)

    assert found.get("error") or found["vfio_ids"] == []


def test_stronger_folder_of_an_initramfs_wins(tmp_path: Path) -> None:
    path = tmp_path / "initrd.img"
    path.write_bytes(cpio({"etc/modprobe.d/a.conf": VFIO, "usr/lib/modprobe.d/a.conf": "options vfio-pci ids=9:9"}))

    assert hypervisor.initramfs(path)["vfio_ids"] == ["10de:24b0", "10de:228b"]


# The guest.

MOUNTINFO = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
40 22 8:16 / /srv/data rw,relatime shared:20 - ext4 /dev/sdb rw
41 22 0:50 / /srv/with\\040space rw - tmpfs tmpfs rw
"""


def test_mounts_by_their_points() -> None:
    assert system.mounted(MOUNTINFO) == {
        "/": ("8:1", "ext4", "/dev/sda1"),
        "/srv/data": ("8:16", "ext4", "/dev/sdb"),
        "/srv/with space": ("0:50", "tmpfs", "tmpfs"),
    }


def test_partition_of_the_system_disk_is_not_separate(tmp_path: Path) -> None:
    put(tmp_path, "proc/self/mountinfo", MOUNTINFO.replace("8:16", "8:2").replace("/dev/sdb", "/dev/sda2"))
    put(tmp_path, "etc/fstab", "UUID=1 / ext4 defaults 0 1\nUUID=2 /srv/data/ ext4 defaults 0 2\n")
    for number, partition in (("8:1", "sda1"), ("8:2", "sda2")):
        put(tmp_path, f"sys/devices/sda/{partition}/partition", "1")
        (tmp_path / "sys/dev/block").mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys/dev/block" / number).symlink_to(tmp_path / "sys/devices/sda" / partition)

    found = system.data_disk(tmp_path, "/srv/data")

    assert found["separate"] is False
    assert found["fstab"] == "UUID=2"


def test_nothing_mounted(tmp_path: Path) -> None:
    put(tmp_path, "proc/self/mountinfo", MOUNTINFO)
    put(tmp_path, "etc/fstab", "# UUID=2 /srv/other ext4 defaults 0 2\n")

    assert system.data_disk(tmp_path, "/srv/other") == {"fstab": None, "source": None}


# Driver and GPU.

POLICY = """\
nvidia-driver-cuda:
  Installed: 580.95.05-1
  Candidate: 580.105.08-1
  Version table:
     590.44.01-1 500
        500 https://repo.example/debian13/x86_64  Packages
     580.105.08-1 1000
        500 https://repo.example/debian13/x86_64  Packages
 *** 580.95.05-1 1000
        500 https://repo.example/debian13/x86_64  Packages
        100 /var/lib/dpkg/status
"""


def test_policy_of_apt() -> None:
    assert nvidia.policy(POLICY, "nvidia-driver-cuda") == {
        "installed": "580.95.05-1",
        "candidate": "580.105.08-1",
        "priorities": {"590.44.01-1": 500, "580.105.08-1": 1000, "580.95.05-1": 1000},
    }
    assert nvidia.policy(POLICY + POLICY.replace("nvidia-driver-cuda", "other"), "other")["installed"] == "580.95.05-1"
    assert nvidia.policy("", "nvidia-driver-cuda")["candidate"] is None
    assert nvidia.policy(POLICY.replace("580.95.05-1\n", "(none)\n", 1), "nvidia-driver-cuda")["installed"] is None


@pytest.mark.parametrize(
    ("name", "text", "signed", "trusted"),
    [
        ("a.list", "deb [signed-by=/usr/share/keyrings/k.gpg] https://repo.example/x /\n", True, False),
        ("a.list", "deb https://repo.example/x /\n", False, False),
        ("a.list", "deb [trusted=yes arch=amd64] https://repo.example/x /\n", False, True),
        ("a.sources", "Types: deb\nURIs: https://repo.example/x\nSuites: /\nSigned-By: /k.gpg\n", True, False),
        ("a.sources", "Types: deb\nURIs: https://repo.example/x\nSigned-By:\n -----BEGIN PGP\n .\n abc\n", True, False),
        ("a.sources", "Types: deb\nURIs: https://repo.example/x\nTrusted: yes\n", False, True),
    ],
)
def test_sources_of_apt(tmp_path: Path, name: str, text: str, signed: bool, trusted: bool) -> None:
    put(tmp_path, f"sources.list.d/{name}", text)
    put(tmp_path, "sources.list", "# deb https://repo.example/x /\ndeb https://other.example trixie main\n")

    assert nvidia.sources(tmp_path, "https://repo.example") == [{"file": name, "signed_by": signed, "trusted": trusted}]


@pytest.mark.parametrize("text", ["# deb https://repo.example/x /", "Enabled: no\nURIs: https://repo.example/x\n"])
def test_switched_off_sources_do_not_count(tmp_path: Path, text: str) -> None:
    put(tmp_path, "sources.list.d/a.list" if text.startswith("#") else "sources.list.d/a.sources", text)

    assert nvidia.sources(tmp_path, "https://repo.example") == []


def test_xids_of_the_kernel_log() -> None:
    journal = (
        "NVRM: Xid (PCI:0000:01:00): 79, pid=1, GPU has fallen off the bus.\n"
        "NVRM: Xid (PCI:0000:01:00): 31, pid=7, name=python\nNVRM: Xid (PCI:0000:01:00): 79, again\nother\n"
    )
    assert nvidia.xids(journal) == [31, 79]


#: A module that answers as pynvml does. The class of its error is what the script catches.
PYNVML = """
class NVMLError(Exception): pass
NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC = 1, 0
class Struct:
    def __init__(self, **values): vars(self).update(values)
def nvmlInit():
    if ERROR: raise NVMLError(ERROR)
def nvmlShutdown(): pass
def nvmlDeviceGetCount(): return 1
def nvmlSystemGetDriverVersion(): return b"580.95.05"
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetPciInfo(handle): return Struct(pciDeviceId=0x24b010de, busId=b"00000000:01:00.0")
def nvmlDeviceGetName(handle): return "NVIDIA RTX A4000"
def nvmlDeviceGetMemoryInfo(handle): return Struct(total=16376 * 2**20)
def nvmlDeviceGetEccMode(handle): return (0, 0)
def nvmlDeviceGetRemappedRows(handle): return (4, 0, 0, 0)
def nvmlDeviceGetTotalEccErrors(handle, kind, counter): raise AssertionError("not asked while ECC is off")
def nvmlDeviceGetCurrPcieLinkWidth(handle): return 16
def nvmlDeviceGetCurrPcieLinkGeneration(handle): return 1
def nvmlDeviceGetPersistenceMode(handle): raise NVMLError("Not Supported")
"""


def nvml(folder: Path, error: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("sys.path", list(os.sys.path))  # type: ignore[attr-defined]
    monkeypatch.delitem(os.sys.modules, "pynvml", raising=False)  # type: ignore[attr-defined]
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    put(folder, "pynvml.py", f"ERROR = {error!r}\n{PYNVML}")
    try:
        return nvidia.read_nvml(str(folder))
    finally:
        os.sys.modules.pop("pynvml", None)  # type: ignore[attr-defined]


def test_gpu_as_nvml_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "sent"

    found = nvml(folder, "", monkeypatch)

    assert found["gpus"] == [
        {
            "name": "NVIDIA RTX A4000",
            "id": "10de:24b0",
            "bus": "00000000:01:00.0",
            "memory_mib": 16376,
            "link_width": 16,
            "link_generation": 1,
            "persistence": None,
            "ecc": 0,
            "ecc_uncorrected": None,
            "remapped": [0, 0, 0],
        }
    ]
    assert not folder.exists()


def test_nvml_that_cannot_be_used_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert nvml(tmp_path / "sent", "Driver Not Loaded", monkeypatch) == {"error": "Driver Not Loaded", "gpus": []}


# Containers.

SPEC = """\
---
cdiVersion: 0.7.0
containerEdits:
  env:
  - NVIDIA_VISIBLE_DEVICES=void
  hooks:
  - args: [nvidia-ctk, hook, update-ldcache]
    hookName: createContainer
    path: /usr/bin/nvidia-ctk
devices:
- containerEdits:
    deviceNodes:
    - path: /dev/nvidia0
  name: "0"
- containerEdits:
    deviceNodes:
    - path: /dev/nvidia0
  name: all
kind: nvidia.com/gpu
"""


def test_devices_of_cdi_specifications(tmp_path: Path) -> None:
    put(tmp_path, "run/nvidia.yaml", SPEC)
    put(tmp_path, "etc/other.json", '{"cdiVersion":"0.5.0","kind":"vendor.example/net","devices":[{"name":"eth"}]}')

    assert containers.cdi_devices([tmp_path / "etc", tmp_path / "run", tmp_path / "absent"]) == [
        "nvidia.com/gpu=0",
        "nvidia.com/gpu=all",
        "vendor.example/net=eth",
    ]


def test_listening_addresses(tmp_path: Path) -> None:
    head = "  sl  local_address rem_address   st\n"
    rows = ["0100007F:2CAA 00000000:0000 0A", "00000000:2CAA 00000000:0000 0A", "0100007F:2CAA 0100007F:9999 01"]
    put(tmp_path, "proc/net/tcp", head + "".join(f"   {number}: {row}\n" for number, row in enumerate(rows)))
    put(tmp_path, "proc/net/tcp6", head + "   0: 00000000000000000000000001000000:2CAA 0:0 0A\n")

    assert containers.listening(tmp_path, 11434) == [
        "0.0.0.0",
        "0000:0000:0000:0000:0000:0000:0000:0001",
        "127.0.0.1",
    ]
    assert containers.listening(tmp_path, 80) == []


def test_models_folder_is_the_nearest_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, other = tmp_path / "data", tmp_path / "volume"
    (data / "ollama").mkdir(parents=True)
    other.mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: path == str(data))
    mounts = [
        {"Destination": "/root", "Source": str(other)},
        {"Destination": "/root/.ollama", "Source": str(data / "ollama")},
    ]

    assert containers.models_folder({}, mounts, str(data)) == {
        "inside": "/root/.ollama/models",
        "outside": str(data / "ollama"),
        "on_data_disk": True,
    }
    assert containers.models_folder({"OLLAMA_MODELS": "/models"}, mounts, str(data))["outside"] is None
    monkeypatch.setattr("os.path.ismount", lambda path: False)
    assert containers.models_folder({}, mounts, str(data))["on_data_disk"] is False


def test_service_that_does_not_answer_is_told() -> None:
    assert "refused" in containers.ask(9, "/api/version", limit_s=2)["error"]


#: A `docker` that answers for one container, as Docker 26 does.
DOCKER = """\
#!/bin/sh
case "$*" in
"info "*) echo '{"ServerVersion": "26.1.5", "CDISpecDirs": []}';;
"inspect --type container ollama") cat <<'END'
[{"Image": "sha256:1", "Config": {"Env": ["HOME=/root", "OLLAMA_HOST=0.0.0.0:11434"]},
  "State": {"Running": true, "Status": "running"}, "Mounts": [{"Destination": "/root/.ollama", "Source": "/srv/o"}]}]
END
;;
"image inspect sha256:1")
    echo '[{"RepoDigests": ["lab/ollama@sha256:2"], "Config": {"Labels": {"org.gpulab.stand-in": "simulated"}}}]';;
"exec ollama nvidia-smi -L") echo "GPU 0: NVIDIA RTX A4000 (UUID: GPU-1)";;
*) echo "Error: No such object" >&2; echo "[]"; exit 1;;
esac
"""


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "bin/docker", DOCKER).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=os.pathsep)


def test_service_is_read(tmp_path: Path, docker: None) -> None:
    found = containers.observe({"container": "ollama", "port": 9, "mount": "/srv"}, tmp_path)

    assert found["engine"]["version"] == "26.1.5"
    service = found["service"]
    assert (service["running"], service["health"], service["digests"]) == (True, None, ["lab/ollama@sha256:2"])
    assert service["gpus"] == ["GPU 0: NVIDIA RTX A4000 (UUID: GPU-1)"]
    assert service["models_folder"]["outside"] == "/srv/o"
    assert "refused" in service["version"]["error"]
    assert found["simulated"] == ["the image of ollama"]


def test_absent_service_is_seen_as_absent(tmp_path: Path, docker: None) -> None:
    found = containers.observe({"container": "milvus", "port": 9, "mount": "/srv"}, tmp_path)

    assert found["service"] == {"exists": False, "running": False, "listens": []}

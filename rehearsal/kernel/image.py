# SPDX-License-Identifier: MIT
"""The disk that every kernel machine boots from: Debian 13 with its own kernel and GRUB on a GPT disk, built once.

Two things are cached below `folder()`: the root file system as Debian's packages leave it, and the disk made from it.
Neither needs a loop device or a boot of the machine: file system and GRUB are written into a file at their offsets.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import lzma
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from inventory import GpulabError
from rehearsal import image, paths
from rehearsal.nvidia import deb

PACKAGES = (
    "linux-image-amd64", "systemd-sysv", "udev", "openssh-server", "python3", "initramfs-tools", "zstd", "lz4",
    "busybox", "grub2-common", "grub-pc-bin", "pciutils", "iproute2", "kmod", "procps", "netbase",
)  # fmt: skip
#: What no test reads; a smaller root file system is copied and written faster.
EXCLUDED = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*")
#: Files that make an emulated boot short and let SSH in; see each file's head.
FILES = Path(__file__).parent / "image_files"
#: Modules that stay, with what they need. The rest of Debian's 4000 is removed: udev would load dozens of them for
#: the emulated chipset, which costs half a minute of an emulated boot.
MODULES = (
    "ext4", "crc32c_generic", "crc32c_intel", "virtio_blk", "virtio_net", "virtio_rng", "e1000", "overlay", "loop",
    "vfio", "vfio_pci", "vfio_iommu_type1", "nouveau", "snd_hda_intel", "snd_hda_codec_hdmi",
)  # fmt: skip
#: What an initramfs of this disk does not need; leaving it out makes it half as large, and a third faster to make.
DROPPED = (
    "usr/share/initramfs-tools/hooks/dmsetup", "usr/share/initramfs-tools/hooks/fsck",
    "usr/share/initramfs-tools/hooks/thermal", "usr/lib/udev/hwdb.bin",
)  # fmt: skip
#: Units that do nothing for a test and take their time at each boot.
MASKED = (
    "apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "e2scrub_reap.service",
    "fstrim.timer", "systemd-tmpfiles-clean.timer", "getty.target", "grub-common.service",
    "grub-initrd-fallback.service", "dev-hugepages.mount", "dev-mqueue.mount", "proc-sys-fs-binfmt_misc.automount",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-config.mount", "sys-kernel-debug.mount", "sys-kernel-tracing.mount", "systemd-binfmt.service",
    "ldconfig.service", "systemd-ask-password-console.path", "systemd-ask-password-wall.path", "systemd-creds.socket",
    "systemd-firstboot.service", "systemd-hostnamed.socket", "systemd-hwdb-update.service", "systemd-logind.service",
    "systemd-journal-catalog-update.service", "systemd-journal-flush.service", "systemd-machine-id-commit.service",
    "systemd-networkd.service", "systemd-networkd.socket", "systemd-pcrmachine.service", "systemd-pcrphase.service",
    "systemd-pcrphase-sysinit.service", "systemd-pstore.service", "systemd-sysext.socket", "systemd-timesyncd.service",
    "systemd-tpm2-setup.service", "systemd-tpm2-setup-early.service", "systemd-update-done.service",
    "systemd-user-sessions.service", "modprobe@configfs.service", "modprobe@dm_mod.service", "modprobe@drm.service",
    "modprobe@efi_pstore.service", "modprobe@fuse.service", "modprobe@loop.service",
)  # fmt: skip
PVE_VERSION = "9.1.2+simulated"
#: So that operations take the machine for a Proxmox VE node.
PVE_MANAGER = deb.Package(
    "pve-manager",
    PVE_VERSION,
    "Name of Proxmox VE for machines that only play it",
    files={
        "/usr/bin/pveversion": deb.text(
            "#!/bin/sh\n# simulated: Debian's kernel, nothing of Proxmox VE\n"
            f'echo "pve-manager/{PVE_VERSION}/0123456789abcdef (running kernel: $(uname -r))"\n',
            0o755,
        )
    },
    relations={"Section": "admin"},
)

SECTOR = 512
DISK_BYTES = 2 << 30
BLOCK = 4096
#: First sectors of the two partitions: GRUB's own, and the root file system.
GRUB_LBA, ROOT_LBA = 2048, 4096
ROOT_UUID = "6770756c-6162-4b72-8e65-6c7469657221"
#: GPT keeps a copy of itself in the last sectors of the disk.
GPT_TAIL = 34

Report = Callable[[str], None]


def folder() -> Path:
    """Cache: root file system, disk and SSH keys of the kernel machines."""
    return paths.cache() / "kernel"


def ssh_key() -> Path:
    """Private key that lets root in."""
    return folder() / "ssh" / "id_ed25519"


def host_key() -> str:
    """The machines' public host key: type and base64 text, as in a known_hosts file."""
    return " ".join(_host_key().with_suffix(".pub").read_text().split()[:2])


def ensure(report: Report = print) -> Path:
    """Build the disk unless the cached one was made from the same things; returns the raw disk image, to read only.

    Raises:
        GpulabError: not root, no Debian source on this machine, or a step failed.
    """
    folder().mkdir(parents=True, exist_ok=True)
    with _locked(folder() / "lock"):
        for key in (ssh_key(), _host_key()):
            _keygen(key)
        disk = folder() / f"disk-{_digest(_disk_key())}.raw"
        if not disk.exists():
            if os.geteuid() != 0:
                raise GpulabError("The disk of the kernel machines is built by root", f"{disk} does not exist yet.")
            root = _ensure_root(report)
            report("building the disk of the kernel machines")
            _remove(folder().glob("disk-*"))
            _build_disk(root, disk)
        return disk


def _root_key() -> dict[str, object]:
    return {
        "suite": image.SUITE,
        "packages": PACKAGES,
        "excluded": EXCLUDED,
        "sources": [source.stanza() for source in image.sources()],
        "apt": image.apt_settings(),
    }


def _disk_key() -> dict[str, object]:
    return {
        "root": _root_key(),
        "files": {str(path.relative_to(FILES)): path.read_text() for path in _files()},
        # How the disk is made decides what it is as much as what goes in.
        "program": Path(__file__).read_text(),
        "keys": [key.with_suffix(".pub").read_text() for key in (ssh_key(), _host_key())],
    }


def _ensure_root(report: Report) -> Path:
    root = folder() / f"root-{_digest(_root_key())}"
    if not root.is_dir():
        report(f"building the root file system of the kernel machines ({len(PACKAGES)} packages and what they need)")
        _remove(folder().glob("root-*"))
        new = folder() / "root.new"
        _remove([new])
        _debootstrap(new)
        new.rename(root)
    return root


def _debootstrap(target: Path) -> None:
    """Debian as its packages leave it; what was downloaded before, here or for the lab's image, is not again."""
    log = folder() / "build.log"
    debs, archives = paths.debs(), "var/cache/apt/archives"
    debs.mkdir(parents=True, exist_ok=True)
    # Copies, not links: the two folders may lie on different file systems.
    take = f'mkdir -p "$1/{archives}" && find "{debs}" -name "*.deb" -exec cp -t "$1/{archives}" {{}} +'
    keep = (
        f'find "$1/{archives}" -name "*.deb" -exec cp -nt "{debs}" {{}} +; find "$1/{archives}" -name "*.deb" -delete'
    )
    command = [
        "mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory", f"--include={','.join(PACKAGES)}",
        "--skip=essential/unlink,download/empty,cleanup/apt/cache",
        *(f"--aptopt={setting.rstrip(';')}" for setting in image.apt_settings()),
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in EXCLUDED),
        f"--setup-hook={take}", f"--customize-hook={keep}",
        image.SUITE, str(target), "-",
    ]  # fmt: skip
    sources = "\n".join(source.stanza() for source in image.sources())
    # An initramfs of every module would be made by the kernel's package and thrown away by us.
    environment = {**os.environ, "TMPDIR": str(folder()), "DEBIAN_FRONTEND": "noninteractive", "INITRD": "No"}
    with open(log, "wb") as sink:
        done = subprocess.run(
            command, input=sources.encode(), stdout=sink, stderr=subprocess.STDOUT, env=environment, check=False
        )
    if done.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise GpulabError(f"Building the kernel machines' root ended with {done.returncode}", tail, f"log: {log}")


def _build_disk(pristine: Path, disk: Path) -> None:
    root, new = folder() / "root.work", disk.with_suffix(".new")
    _remove([root, new])
    _run("cp", "--archive", "--reflink=auto", str(pristine), str(root))
    version = _kernel_version(root)
    _prune_modules(root, version)
    _settle(root)
    _initramfs(root, version)
    core = _grub_files(root, version)
    _file_system(root, new)
    _grub_boot(new, (root / "usr/lib/grub/i386-pc/boot.img").read_bytes(), core)
    _remove([root])
    new.rename(disk)


def _kernel_version(root: Path) -> str:
    return next((root / "usr/lib/modules").iterdir()).name


def _prune_modules(root: Path, version: str) -> None:
    """Keep `MODULES` and what they need, unpacked: each would be unpacked at every boot and for every initramfs."""
    folder = root / "usr/lib/modules" / version
    lines = (folder / "modules.dep").read_text().splitlines()
    kept = set(needed_modules(lines, MODULES))
    for path in sorted((folder / "kernel").rglob("*.ko*")):
        if str(path.relative_to(folder)) not in kept:
            path.unlink()
        elif path.suffix == ".xz":
            path.with_suffix("").write_bytes(lzma.decompress(path.read_bytes()))
            path.unlink()
    _chroot(root, "depmod", version)


def needed_modules(modules_dep: list[str], names: tuple[str, ...]) -> list[str]:
    """Paths of the named modules and all that they need, from the lines of `modules.dep`.

    Raises:
        GpulabError: there is no module of that name.
    """
    needs = {path: words.split() for path, _, words in (line.partition(":") for line in modules_dep)}
    by_name = {Path(path).name.partition(".")[0].replace("-", "_"): path for path in needs}
    if missing := [name for name in names if name not in by_name]:
        raise GpulabError(f"The kernel has no module {', '.join(missing)}", "It may be built into it by now.")
    found: list[str] = []
    for name in names:
        # modules.dep lists all that a module needs, not only its neighbours.
        found += [path for path in [by_name[name], *needs[by_name[name]]] if path not in found]
    return found


def _settle(root: Path) -> None:
    """Our files, keys, masked units and the package that says Proxmox VE."""
    for path in _files():
        target = root / path.relative_to(FILES)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
        target.chmod(0o755 if path.read_bytes().startswith(b"#!") else 0o644)
    _write(root / "etc/fstab", f"UUID={ROOT_UUID} / ext4 noatime 0 0\n")
    _write(root / "root/.ssh/authorized_keys", ssh_key().with_suffix(".pub").read_text(), 0o600)
    (root / "root/.ssh").chmod(0o700)
    _remove((root / "etc/ssh").glob("ssh_host_*"))
    _write(root / "etc/ssh/ssh_host_ed25519_key", _host_key().read_text(), 0o600)
    # A machine id of its own would be made at the first boot, which then counts as the first: presets and all.
    _write(root / "etc/machine-id", f"{hashlib.md5(ROOT_UUID.encode()).hexdigest()}\n", 0o444)
    (root / "var/lib/vz/snippets").mkdir(parents=True)
    package = root / "tmp" / PVE_MANAGER.filename
    package.write_bytes(deb.pack(PVE_MANAGER))
    _chroot(root, "dpkg", "--install", f"/tmp/{package.name}")
    package.unlink()
    for unit in MASKED:
        link = root / "etc/systemd/system" / unit
        link.unlink(missing_ok=True)
        link.symlink_to("/dev/null")
    _chroot(root, "systemctl", "--quiet", "enable", "lab-network.service", "ssh.service")
    _remove(root / path for path in DROPPED)
    _remove([root / "etc/resolv.conf", *(root / "var/lib/apt/lists").iterdir()])


def _initramfs(root: Path, version: str) -> None:
    # The mount lives in a name space that ends with the command: a killed build leaves no /proc below our folder.
    script = 'mount -t proc proc "$1/proc" && exec chroot "$1" update-initramfs -c -k "$2"'
    _run("unshare", "--mount", "sh", "-c", script, "sh", str(root), version)


def _grub_files(root: Path, version: str) -> bytes:
    """GRUB's files below /boot and the first grub.cfg, as `update-grub` would write it; returns GRUB's core image."""
    target = root / "boot/grub/i386-pc"
    target.mkdir(parents=True)
    for pattern in ("*.mod", "*.lst"):
        for path in (root / "usr/lib/grub/i386-pc").glob(pattern):
            shutil.copy(path, target / path.name)
    # grub-probe, and so update-grub, finds no disk below a folder.
    settings = shell_assignments((root / "etc/default/grub").read_text())
    words = f"{settings['GRUB_CMDLINE_LINUX']} {settings['GRUB_CMDLINE_LINUX_DEFAULT']}"
    _write(
        root / "boot/grub/grub.cfg",
        "serial --unit=0 --speed=115200\nterminal_output serial\nset timeout=0\n"
        "menuentry 'Proxmox VE' {\n"
        f"\tlinux /boot/vmlinuz-{version} root=UUID={ROOT_UUID} ro {words}\n"
        f"\tinitrd /boot/initrd.img-{version}\n}}\n",
    )
    core = "/boot/grub/i386-pc/core.img"
    prefix = "(hd0,gpt2)/boot/grub"
    _chroot(root, "grub-mkimage", "-O", "i386-pc", "-o", core, "-p", prefix, "biosdisk", "part_gpt", "ext2", "normal")
    return (root / core.lstrip("/")).read_bytes()


def _file_system(root: Path, disk: Path) -> None:
    with open(disk, "wb") as file:
        file.truncate(DISK_BYTES)
    blocks = (DISK_BYTES // SECTOR - ROOT_LBA - GPT_TAIL) * SECTOR // BLOCK
    extended = f"offset={ROOT_LBA * SECTOR},lazy_itable_init=1,nodiscard"
    # GRUB of Debian 13 reads no file system with this feature (metadata_csum_seed).
    _run(
        "mke2fs", "-q", "-F", "-t", "ext4", "-U", ROOT_UUID, "-O", "^metadata_csum_seed", "-m", "0", "-b", str(BLOCK),
        "-E", extended, "-d", str(root), str(disk), str(blocks),
    )  # fmt: skip
    # Only now: mke2fs would leave no partition table, and no error.
    partitions = ["-n", f"1:{GRUB_LBA}:{ROOT_LBA - 1}", "-t", "1:ef02", "-n", f"2:{ROOT_LBA}:0", "-t", "2:8300"]
    _run("sgdisk", *partitions, str(disk))


def _grub_boot(disk: Path, boot: bytes, core: bytes) -> None:
    """Do what `grub-bios-setup` does, which wants a block device: boot.img leads to core.img, and that to its rest."""
    if len(core) > (ROOT_LBA - GRUB_LBA) * SECTOR:
        raise GpulabError("GRUB's core image is larger than its partition", f"{len(core)} bytes")
    with open(disk, "r+b") as file:
        table = file.read(SECTOR)
        file.seek(0)
        file.write(boot_sector(boot, table))
        file.seek(GRUB_LBA * SECTOR)
        file.write(core_image(core))


def boot_sector(boot: bytes, table: bytes) -> bytes:
    """boot.img for this disk: it loads `GRUB_LBA`; the partition table at the end of sector 0 stays."""
    sector = bytearray(boot[:SECTOR])
    struct.pack_into("<Q", sector, 0x5C, GRUB_LBA)
    # Two nops over a jump: the BIOS's drive number is believed, as grub-bios-setup has it on a hard disk.
    sector[0x66:0x68] = b"\x90\x90"
    sector[440:] = table[440:]
    return bytes(sector)


def core_image(core: bytes) -> bytes:
    """core.img whose first sector knows where the rest of it lies: right behind."""
    first = bytearray(core)
    struct.pack_into("<Q", first, 0x1F4, GRUB_LBA + 1)
    return bytes(first)


def shell_assignments(text: str) -> dict[str, str]:
    """Names and values of a shell file of plain assignments, such as /etc/default/grub."""
    pairs = [line.partition("=") for line in text.splitlines() if "=" in line and not line.startswith("#")]
    return {name: value.strip('"') for name, _, value in pairs}


def _host_key() -> Path:
    return ssh_key().with_name("host_ed25519")


def _keygen(path: Path) -> None:
    if not path.exists():
        path.parent.mkdir(mode=0o700, exist_ok=True)
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "gpulab kernel machine", "-f", str(path))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Two test runs may want the disk at the same time: the second waits and finds it made."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _files() -> list[Path]:
    return sorted(path for path in FILES.rglob("*") if path.is_file())


def _digest(key: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _write(path: Path, text: str, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_text(text)
    path.chmod(mode)


def _remove(found: Iterable[Path]) -> None:
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _chroot(root: Path, *argv: str) -> None:
    _run("chroot", str(root), "/usr/bin/env", "DEBIAN_FRONTEND=noninteractive", *argv)


def _run(*argv: str) -> None:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise GpulabError(f"`{' '.join(argv)}` ended with {done.returncode}", done.stderr.strip())

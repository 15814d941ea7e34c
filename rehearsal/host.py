# SPDX-License-Identifier: MIT
"""One host of the lab: a clone of the image in a systemd-nspawn container, kept by a small supervisor process.

`start` launches `python -m rehearsal.host NAME`, which mounts the clone, runs the container, starts it again when it
reboots and cleans up when it ends. The host so outlives the shell that started it. `run` and `leader` reach into the
container without SSH: the trusted path.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Literal

from inventory import GpulabError
from rehearsal import network, paths, processes
from rehearsal.processes import Process

#: nspawn's exit status when the container asked for a reboot (with --keep-unit).
REBOOTED = 133
#: What systemd as PID 1 of a container does on these signals (systemd(1), "Signals"); SIGRTMIN is 34 in glibc.
POWEROFF, REBOOT = signal.SIGRTMIN + 4, signal.SIGRTMIN + 5
START_S = 30.0
KILL_S = 10.0
POLL_S = 0.05
SEED = "/var/lib/cloud/seed/nocloud"
ARCHIVES = "/var/cache/apt/archives"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

Device = tuple[str, Literal["b", "c"], int, int]


@dataclass(frozen=True)
class HostSpec:
    """What a host is made of."""

    name: str
    #: IPv4 address on the lab's bridge, without prefix.
    address: str
    gateway: str
    #: Root of the image; read-only.
    lower: Path
    #: Folder for the clone's own data; `up/` and `work/` are made in it.
    upper: Path
    #: `--bind=` values of systemd-nspawn, `SOURCE:TARGET`; a source folder must exist.
    binds: list[str] = field(default_factory=list)
    #: Files of cloud-init's NoCloud seed by name; None: cloud-init is switched off and the network is set by us.
    seed: dict[str, str] | None = None
    #: Path in the host -> (text, mode); written at each `start`, not at a reboot.
    files: dict[str, tuple[str, int]] = field(default_factory=dict)
    #: Device nodes made at each boot: (path, "b" or "c", major, minor).
    devices: list[Device] = field(default_factory=list)
    #: False: its interface is there and its cable is not.
    link_up: bool = True

    @property
    def machine(self) -> str:
        """The container's name on the control machine, where two labs may run beside each other."""
        return f"{self.name}-{network.current().bridge}"


def start(spec: HostSpec) -> None:
    """Start the host and return when its init runs; it boots on from there (see `wait_ssh`).

    Raises:
        GpulabError: it runs already, or the container ended at once (with the end of its log).
    """
    if running(spec.name):
        raise GpulabError(f"{spec.name} runs already")
    folder = paths.host(spec.name)
    # What a killed supervisor has left, its container included.
    stop(spec.name, timeout=0)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "spec.json", json.dumps(_plain(spec)), 0o600)
    processes.start(
        _process(spec.name), [sys.executable, "-m", "rehearsal.host", spec.name], log=folder / "console.log"
    )
    deadline = time.monotonic() + START_S
    while leader(spec.name) is None:
        if not running(spec.name) or time.monotonic() > deadline:
            stop(spec.name, timeout=0)
            raise GpulabError(f"{spec.name} did not start", _tail(folder / "console.log"))
        time.sleep(POLL_S)


def stop(name: str, timeout: float = 20) -> None:
    """Power the host off cleanly, by force after `timeout` seconds, and unmount it. One that is down stays down."""
    supervisor = processes.recorded(_process(name))
    if paths.host(name).is_dir():
        # The supervisor reads this: a reboot under way must not bring the host back.
        (paths.host(name) / "stopping").touch()
    for number, deadline in ((POWEROFF, timeout), (signal.SIGKILL, KILL_S)):
        # Without its supervisor an init goes on: it is not a child of ours, and nobody else ends it.
        init = leader(name)
        found = processes.look_up(init) if init is not None else None
        if found is not None and deadline > 0:
            found.send(number)
            processes.wait_gone([process for process in (found, supervisor) if process is not None], deadline)
    if supervisor is not None:
        processes.wait_gone([supervisor], KILL_S)
    processes.stop(_process(name), timeout=0)
    cleanup(name)


def running(name: str) -> bool:
    """Is the host up, booting or rebooting?"""
    return processes.running(_process(name))


def leader(name: str) -> int | None:
    """The pid, on the control machine, of the host's init; None when there is none (down, or between two boots)."""
    return next((process.pid for owner, process in inits() if owner == name), None)


def inits() -> list[tuple[str, Process]]:
    """(host, init) of every container of this lab, whether anybody still looks after it or not.

    Told by what it runs on: its root is an overlay that carries the name of the host and the folder of the lab.
    """
    found = []
    for pid in processes.all_pids():
        process = processes.look_up(pid)
        if process is None or _own_pid(pid) != "1":
            continue
        try:
            lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError, OSError):
            continue
        for line in lines:
            mountpoint, source = line.split()[4], line.rpartition(" - ")[2].split()[1]
            prefix, _, owner = source.partition(":")
            if mountpoint == "/" and prefix == _mount_source("")[:-1]:
                found.append((owner, process))
    return found


def root(name: str) -> Path:
    """Where the host's file system is mounted on the control machine while it runs."""
    return paths.host(name) / "root"


def inside(base: Path, path: str) -> Path:
    """`path` of a host, as a path below `base`. Symbolic links are followed as the host would, so never out of it."""
    resolved = base
    todo = list(PurePosixPath(path).parts)
    hops = 0
    while todo:
        part = todo.pop(0)
        if part == "/":
            resolved = base
        elif part == "..":
            resolved = resolved.parent if resolved != base else base
        elif (resolved / part).is_symlink():
            hops += 1
            if hops > 40:
                raise GpulabError(f"{path}: too many symbolic links")
            todo = list(PurePosixPath(os.readlink(resolved / part)).parts) + todo
        else:
            resolved /= part
    return resolved


def run(
    name: str, argv: Sequence[str], input: str | None = None, timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in the host as root, without SSH.

    Raises:
        GpulabError: the host is not up.
        subprocess.TimeoutExpired: after `timeout` seconds.
    """
    return subprocess.run(
        [*enter(name), *argv], input=input, capture_output=True, text=True, timeout=timeout, check=False
    )


def enter(name: str) -> list[str]:
    """The words that put a command into the host.

    Raises:
        GpulabError: the host is not up.
    """
    pid = leader(name)
    if pid is None:
        raise GpulabError(f"{name} is not up", resolution="`python -m rehearsal status` lists the hosts of the lab")
    term = os.environ.get("TERM", "dumb")
    return [
        "nsenter", f"--target={pid}", "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--root", "--wd",
        "env", "-i", f"PATH={PATH}", "HOME=/root", "USER=root", "LANG=C.UTF-8", f"TERM={term}",
    ]  # fmt: skip


def request_reboot(name: str) -> None:
    """Ask the host's init for a clean reboot, and return at once.

    Raises:
        GpulabError: the host is not up.
    """
    pid = leader(name)
    if pid is None:
        raise GpulabError(f"{name} is not up")
    _signal(pid, REBOOT)


def wait_ssh(address: str, timeout: float = 60, port: int = 22) -> None:
    """Wait until an SSH server answers.

    Raises:
        GpulabError: none does within `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            with socket.create_connection((address, port), timeout=1) as connection:
                if connection.recv(4) == b"SSH-":
                    return
                seen = "something else than SSH"
        except OSError as error:
            seen = str(error)
        if time.monotonic() > deadline:
            raise GpulabError(f"No SSH on {address}:{port} after {timeout:.0f} s", f"Last answer: {seen}")
        time.sleep(POLL_S)


def boot_id(name: str) -> str | None:
    """The id of the host's present boot; None while it is down."""
    with contextlib.suppress(GpulabError):
        done = run(name, ["cat", "/proc/sys/kernel/random/boot_id"])
        if done.returncode == 0:
            return done.stdout.strip()
    return None


def cleanup(name: str) -> list[str]:
    """Remove what a host leaves on the control machine when it, or its supervisor, was killed; names what it found."""
    found = []
    folder = paths.host(name)
    mountpoint = folder / "root"
    while os.path.ismount(mountpoint):
        # Lazy: a process that still looks in there must not keep the lab from coming up again.
        _checked("umount", "--lazy", str(mountpoint))
        found.append(f"mount {mountpoint}")
    machine = f"{name}-{network.current().bridge}"
    for kind in ("propagate", "unix-export"):
        leftover = Path("/run/systemd/nspawn", kind, machine)
        if os.path.ismount(leftover):
            _checked("umount", "--lazy", str(leftover))
        if leftover.exists():
            shutil.rmtree(leftover)
    found += remove_cgroups(machine)
    keep_debs(folder / "apt")
    (folder / "stopping").unlink(missing_ok=True)
    return found


def share_debs(folder: Path) -> None:
    """Give a host its package cache: hard links to the shared one.

    Each host has a folder of its own, so apt's lock in it is that host's alone and its partial downloads are too; and
    apt never writes into a file it has: it replaces it. So nothing is copied and the shared files stay whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths.debs().mkdir(parents=True, exist_ok=True)
    for package in paths.debs().glob("*.deb"):
        with contextlib.suppress(FileExistsError):
            os.link(package, folder / package.name)


def keep_debs(folder: Path) -> None:
    """Take a host's downloads into the shared cache; a file of the same name is replaced in one step."""
    if not folder.is_dir():
        return
    paths.debs().mkdir(parents=True, exist_ok=True)
    for package in folder.glob("*.deb"):
        target = paths.debs() / package.name
        if target.exists() and target.samefile(package):
            continue
        # Hosts are stopped at the same time, in threads of one process.
        temporary = target.with_name(f".{package.name}.{os.getpid()}.{threading.get_ident()}")
        temporary.unlink(missing_ok=True)
        os.link(package, temporary)
        temporary.rename(target)


def supervise(name: str) -> int:
    """Run the host until it powers off; the body of the supervisor process. Returns nspawn's last status."""
    folder = paths.host(name)
    spec = _from_plain(json.loads((folder / "spec.json").read_text()))
    # `down` and a crash test end us by SIGTERM; nspawn gets one of its own and shuts the container down.
    # A handler, because nspawn would inherit an ignored signal.
    signal.signal(signal.SIGTERM, lambda *_: None)
    mountpoint = folder / "root"
    try:
        _mount(spec, mountpoint)
        _fill(spec, mountpoint)
        share_debs(folder / "apt")
        _own_cgroups(spec.machine)
        boot, status = 0, REBOOTED
        while status == REBOOTED and not (folder / "stopping").exists():
            boot += 1
            status = subprocess.run(command(spec, mountpoint, boot), stdin=subprocess.DEVNULL, check=False).returncode
            keep_debs(folder / "apt")
            print(f"supervisor: the container ended with {status}", flush=True)
        return status
    finally:
        _leave_cgroups(spec.machine)
        cleanup(name)


def command(spec: HostSpec, mountpoint: Path, boot: int = 1) -> list[str]:
    """The command line that runs the container for the `boot`-th time under this supervisor."""
    # A veth of the container's own has an end here that nobody switches on: no carrier inside.
    wire = f"--network-bridge={network.current().bridge}" if spec.link_up else "--network-veth"
    words = [
        # Without its supervisor a container would be nobody's: it dies with it.
        "setpriv", "--pdeathsig", "KILL", "--",
        "systemd-nspawn", f"--directory={mountpoint}", "--boot", "--register=no", "--keep-unit", "--quiet",
        f"--machine={spec.machine}", f"--hostname={spec.name}", wire,
        "--capability=all", "--system-call-filter=@keyring bpf", "--console=pipe", "--resolv-conf=off",
        "--timezone=off", "--link-journal=no",
        f"--bind={paths.host(spec.name) / 'apt'}:{ARCHIVES}",
        *(f"--bind={bind}" for bind in spec.binds),
    ]  # fmt: skip
    if _systemd_is_init():
        # A name of its own for each boot: systemd may still be putting the last one's scope away.
        unit = f"{spec.machine}-{os.getpid()}-{boot}"
        scope = ["systemd-run", "--scope", "--quiet", "--collect", "--property=Delegate=yes", f"--unit={unit}"]
        words = [*scope, "--", *words]
    if not Path("/sys/fs/cgroup/cgroup.controllers").exists():
        # An argument for the container's init: systemd 257 refuses cgroup v1 without it.
        words.append("SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1")
    return words


def _mount(spec: HostSpec, mountpoint: Path) -> None:
    up, work = spec.upper / "up", spec.upper / "work"
    for folder in (up, work, mountpoint):
        folder.mkdir(parents=True, exist_ok=True)
    options = f"lowerdir={spec.lower},upperdir={up},workdir={work}"
    _checked("mount", "-t", "overlay", _mount_source(spec.name), "-o", options, str(mountpoint))


def _mount_source(name: str) -> str:
    """The name that a host's root file system is mounted under: it says which lab and which host it belongs to."""
    return f"gpulab-{_escaped(str(paths.cache()))}:{name}"


def _escaped(path: str) -> str:
    return path.replace(" ", "_").replace(":", "_")


def _fill(spec: HostSpec, base: Path) -> None:
    """Write what the spec asks for into the mounted clone."""
    files = dict(spec.files)
    if spec.seed is None:
        files["/etc/cloud/cloud-init.disabled"] = ("", 0o644)
        files["/etc/hostname"] = (f"{spec.name}\n", 0o644)
        files["/etc/hosts"] = (hosts_file(spec), 0o644)
        files["/etc/systemd/network/10-lab.network"] = (network_file(spec), 0o644)
    else:
        for name, text in spec.seed.items():
            files[f"{SEED}/{name}"] = (text, 0o600)
    files["/etc/tmpfiles.d/lab-devices.conf"] = (devices_file(spec), 0o644)
    for path, (text, mode) in files.items():
        # A link at the end is replaced, not followed: /usr/sbin/modprobe is one to kmod.
        parent, _, last = path.rpartition("/")
        target = inside(base, parent or "/") / last
        target.parent.mkdir(parents=True, exist_ok=True)
        _write(target, text, mode)


def hosts_file(spec: HostSpec) -> str:
    """/etc/hosts of a host without cloud-init; a PVE node must know its own name by its real address."""
    return f"127.0.0.1 localhost\n{spec.address} {spec.name}.lab {spec.name}\n::1 localhost ip6-localhost\n"


def network_file(spec: HostSpec) -> str:
    """systemd-networkd's file for a host without cloud-init."""
    servers = "".join(f"DNS={address}\n" for address in network.resolvers())
    return (
        "[Match]\nName=host0\n\n[Network]\n"
        f"Address={spec.address}/24\nGateway={spec.gateway}\n{servers}LinkLocalAddressing=no\nIPv6AcceptRA=no\n"
    )


def devices_file(spec: HostSpec) -> str:
    """tmpfiles.d lines that make the device nodes at each boot, before local file systems are mounted."""
    devices: list[Device] = [("/dev/fuse", "c", 10, 229), *spec.devices]
    lines = []
    for path, kind, major, minor in devices:
        owner = "root disk" if kind == "b" else "root root"
        mode = "0660" if kind == "b" else "0666"
        lines.append(f"{kind}! {path} {mode} {owner} - {major}:{minor}\n")
    return "".join(lines)


def _own_cgroups(machine: str) -> None:
    """Without systemd as init, give the container a cgroup of its own in each hierarchy, below the one we are in.

    Containers would otherwise share ours, and what Docker makes in them would lie in the machine's own folders.
    """
    if _systemd_is_init():
        return
    for group in [folder / machine for folder in _current_cgroups()]:
        group.mkdir(exist_ok=True)
        for setting in ("cpuset.cpus", "cpuset.mems"):
            if (group / setting).exists():
                # Version 1 starts a cpuset empty, and nothing can run in an empty one.
                (group / setting).write_text((group.parent / setting).read_text())
        (group / "cgroup.procs").write_text(str(os.getpid()))


def _leave_cgroups(machine: str) -> None:
    for group in _cgroups(machine):
        (group.parent / "cgroup.procs").write_text(str(os.getpid()))


def _current_cgroups() -> list[Path]:
    """The folder of this process's cgroup in every mounted hierarchy."""
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    found = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for words in mounts:
            kind = words[words.index("-") + 1]
            options = words[-1].split(",")
            fits = kind == "cgroup" and all(word in options for word in controllers.split(",") if word)
            if (kind == "cgroup2" and not controllers) or (fits and controllers):
                found.append(Path(words[4] + path.rstrip("/")))
                break
    return found


def remove_cgroups(machine: str) -> list[str]:
    """Remove the cgroups of a container (or of all that a pattern names) with what Docker or Slurm left in them."""
    removed = []
    for top in _cgroups(machine):
        for folder, _, _ in sorted(os.walk(top), key=lambda entry: -len(entry[0])):
            # One with a process in it is refused by the kernel, and stays for the next cleanup.
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        if not top.exists():
            removed.append(str(top))
    return [f"{len(removed)} cgroups {machine}"] if removed else []


def _cgroups(machine: str) -> list[Path]:
    """The container's folder in each hierarchy; under systemd it is a scope."""
    names = (machine, f"{machine}-*.scope")
    # os.walk bears cgroups that end while it looks, as those of a host that is just shutting down.
    return [
        Path(folder, name)
        for folder, below, _ in os.walk("/sys/fs/cgroup")
        for name in below
        if any(fnmatch.fnmatch(name, pattern) for pattern in names)
    ]


def _systemd_is_init() -> bool:
    return Path("/run/systemd/system").is_dir()


def _process(name: str) -> str:
    return f"host-{name}"


def _plain(spec: HostSpec) -> dict[str, object]:
    return {**asdict(spec), "lower": str(spec.lower), "upper": str(spec.upper)}


def _from_plain(plain: dict[str, object]) -> HostSpec:
    spec = HostSpec(**plain)  # type: ignore[arg-type]
    return replace(
        spec,
        lower=Path(spec.lower),
        upper=Path(spec.upper),
        files={path: (text, mode) for path, (text, mode) in spec.files.items()},
        devices=[(path, kind, major, minor) for path, kind, major, minor in spec.devices],
    )


def _signal(pid: int, number: int) -> None:
    found = processes.look_up(pid)
    if found is not None:
        Process(pid, found.started).send(number)


def _own_pid(pid: int) -> str:
    """The pid that a process has in its innermost pid namespace; empty for one of ours."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    words = next((line.split()[1:] for line in lines if line.startswith("NSpid:")), [])
    return words[-1] if len(words) > 1 else ""


def _write(path: Path, text: str, mode: int) -> None:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        # The umask may have taken bits away.
        os.fchmod(file.fileno(), mode)


def _tail(path: Path, lines: int = 15) -> str:
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return f"{path} does not exist"


def _checked(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise GpulabError(f"`{' '.join(argv)}` ended with {done.returncode}", done.stderr.strip())


if __name__ == "__main__":
    sys.exit(supervise(sys.argv[1]))

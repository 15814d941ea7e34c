# SPDX-License-Identifier: MIT
"""The Debian root file systems that the hosts of the lab are clones of; each built once, then taken from the cache.

Package sources, resolver, proxies and extra certificate authorities are the control machine's own: what it can reach,
the lab's hosts can reach, and nothing here names a mirror.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from inventory import GpulabError
from rehearsal import paths

#: Of the nodes, and of the guests that declare nothing else.
SUITE = "trixie"
#: Guest distributions that the lab has an image of, by their names in an inventory.
SUITES = {"debian12": "bookworm", "debian13": SUITE}
COMPONENTS = ("main", "contrib", "non-free", "non-free-firmware")
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
PACKAGES = (
    "systemd-sysv", "systemd-resolved", "systemd-timesyncd", "dbus", "udev", "openssh-server", "cloud-init",
    "python3", "sudo", "ca-certificates", "curl", "gnupg", "nftables", "iproute2", "iputils-ping", "procps",
    "netbase", "kmod", "pciutils", "cpio", "e2fsprogs", "fdisk", "less", "zstd",
)  # fmt: skip
#: Files of the image that make Debian run in a container; see each file's head.
FILES = Path(__file__).parent / "image_files"
#: The same for one suite alone, in a folder of its name.
SUITE_FILES = Path(__file__).parent / "suite_files"
#: apt settings of the control machine that decide what it can reach.
APT_SETTINGS = ("Acquire::http::", "Acquire::https::", "Acquire::Check-", "Acquire::Retries")
LOCAL_CERTIFICATES = Path("/usr/local/share/ca-certificates")

Report = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """One place of Debian packages, in deb822's words."""

    uri: str
    suites: tuple[str, ...]

    def stanza(self) -> str:
        return (
            f"Types: deb\nURIs: {self.uri}\nSuites: {' '.join(self.suites)}\n"
            f"Components: {' '.join(COMPONENTS)}\nSigned-By: {KEYRING}\n"
        )


def root(suite: str = SUITE) -> Path:
    """The unpacked image: the lower layer of each host's overlay. Never written to."""
    return paths.image(suite) / "root"


def ensure(report: Report = print, suite: str = SUITE) -> Path:
    """Build the image unless the cached one was made from the same things; returns its `root()`.

    Raises:
        GpulabError: no Debian source on this machine, or the build failed (its log is named).
    """
    folder, target = paths.image(suite), root(suite)
    wanted = key(suite)
    key_file = folder / "key.json"
    if key_file.exists() and json.loads(key_file.read_text()) == wanted and target.is_dir():
        return target
    # Without its key a half-made image is never taken for a whole one.
    key_file.unlink(missing_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    report(f"building the image of Debian {suite} ({len(PACKAGES)} packages and what they need)")
    _build(folder, suite)
    (folder / "root.new").rename(target)
    key_file.write_text(json.dumps(wanted, indent=2) + "\n")
    return target


def download(names: Sequence[str], suite: str = SUITE) -> list[Path]:
    """Debian's packages of these names as files, each the version that apt would install; downloaded once.

    Raises:
        GpulabError: apt cannot.
    """
    folder = paths.image(suite) / "packages"
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if not list(folder.glob(f"{name}_*.deb"))]
    # The image's own package lists do, unless there is no image yet or the mirror has moved on since.
    listed = root(suite) / "var/lib/apt/lists"
    if missing and not (listed.is_dir() and _apt(folder, suite, listed, "download", *missing).returncode == 0):
        fresh = folder / "apt/lists"
        for words in (("update",), ("download", *missing)):
            done = _apt(folder, suite, fresh, *words)
            if done.returncode != 0:
                brief = f"`apt-get {' '.join(words)}` for {suite} ended with {done.returncode}"
                raise GpulabError(brief, done.stderr.strip())
    return [max(folder.glob(f"{name}_*.deb"), key=lambda path: path.stat().st_mtime) for name in names]


def _apt(folder: Path, suite: str, lists: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """apt-get with the image's sources and `lists`, in `folder`; nothing of this machine's packages is looked at."""
    state = folder / "apt"
    for part in ("etc", "cache/archives/partial", "lists/partial"):
        (state / part).mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    (state / "etc/lab.sources").write_text("\n".join(source.stanza() for source in sources(suite)))
    options = {
        "Dir::Etc": state / "etc", "Dir::Etc::sourceparts": state / "etc", "Dir::Etc::sourcelist": "/dev/null",
        "Dir::State": state, "Dir::State::lists": lists, "Dir::State::status": state / "status",
        "Dir::Cache": state / "cache", "APT::Architecture": "amd64", "APT::Sandbox::User": "root",
        "Acquire::Languages": "none", "Debug::NoLocking": "1",
    }  # fmt: skip
    argv = ["apt-get", "-qq", *(f"-o{key}={value}" for key, value in options.items()), *words]
    return subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=False)


def key(suite: str = SUITE) -> dict[str, object]:
    """All that decides what the image is: when any of it changes, the image is made anew."""
    return {
        "suite": suite,
        "packages": list(PACKAGES),
        "sources": [source.stanza() for source in sources(suite)],
        "apt": apt_settings(),
        "files": {
            str(path.relative_to(folder)): _digest(path)
            for folder in (FILES, SUITE_FILES / suite)
            for path in _files(folder)
        },
        "certificates": {path.name: _digest(path) for path in _certificates()},
    }


def sources(suite: str = SUITE, etc_apt: Path = Path("/etc/apt"), codename: str | None = None) -> list[Source]:
    """The control machine's Debian sources, with the suite renamed to the image's.

    Third-party sources are left out: theirs is another key, or a suite of another name.

    Raises:
        GpulabError: there is none.
    """
    own = codename or os_release()["VERSION_CODENAME"]
    names = {f"{own}{part}": f"{suite}{part}" for part in ("", "-updates", "-security")}
    found: list[Source] = []
    for path in [etc_apt / "sources.list", *sorted((etc_apt / "sources.list.d").glob("*"))]:
        if not path.is_file() or path.suffix not in (".list", ".sources"):
            continue
        parse = _deb822 if path.suffix == ".sources" else _one_line
        for uri, suites, components, signed_by in parse(path.read_text()):
            suites = [names[suite] for suite in suites if suite in names]
            foreign = signed_by and "debian-archive" not in signed_by
            if suites and "main" in components and not foreign:
                source = Source(uri, tuple(suites))
                if source not in found:
                    found.append(source)
    if not found:
        raise GpulabError(
            f"No apt source of Debian {own} on this machine",
            f"Looked in {etc_apt}/sources.list and {etc_apt}/sources.list.d.",
            f"the image of the lab's hosts is built from the same mirror, with {own} replaced by {suite}",
        )
    return found


def _deb822(text: str) -> list[tuple[str, list[str], list[str], str]]:
    """(URI, suites, components, Signed-By) of each enabled `deb` stanza."""
    found = []
    for stanza in text.replace("\n#", "\n #").split("\n\n"):
        fields: dict[str, str] = {}
        last = ""
        for line in stanza.splitlines():
            if line.lstrip().startswith("#") or not line.strip():
                continue
            if line[0].isspace():
                fields[last] = f"{fields.get(last, '')} {line.strip()}"
            else:
                name, _, value = line.partition(":")
                last = name.strip().lower()
                fields[last] = value.strip()
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() == "no":
            continue
        for uri in fields.get("uris", "").split():
            words = fields.get("suites", "").split(), fields.get("components", "").split()
            found.append((uri, *words, fields.get("signed-by", "")))
    return found


def _one_line(text: str) -> list[tuple[str, list[str], list[str], str]]:
    """The same of each `deb [options] URI suite components` line."""
    found = []
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if not words or words[0] != "deb":
            continue
        options = ""
        if len(words) > 1 and words[1].startswith("["):
            end = next((number for number, word in enumerate(words) if word.endswith("]")), 0)
            options, words = " ".join(words[1 : end + 1]), [words[0], *words[end + 1 :]]
        if len(words) > 3:
            signed_by = next((word for word in options.strip("[]").split() if word.startswith("signed-by=")), "")
            found.append((words[1], [words[2]], words[3:], signed_by))
    return found


def apt_settings() -> list[str]:
    """The control machine's proxies and checks, as lines of apt.conf."""
    lines = _checked("apt-config", "dump", "--no-empty").splitlines()
    return [line for line in lines if line.startswith(APT_SETTINGS)]


def os_release(path: Path = Path("/etc/os-release")) -> dict[str, str]:
    """The fields of os-release(5)."""
    pairs = [line.partition("=") for line in path.read_text().splitlines() if "=" in line]
    return {name: value.strip('"') for name, _, value in pairs}


def _build(folder: Path, suite: str) -> None:
    """Run mmdebstrap into `root.new`; what it downloads goes through the shared cache."""
    seed = folder / "seed"
    shutil.rmtree(seed, ignore_errors=True)
    overlay = seed / "files"
    shutil.copytree(FILES, overlay)
    if (SUITE_FILES / suite).is_dir():
        shutil.copytree(SUITE_FILES / suite, overlay, dirs_exist_ok=True)
    for path in _files(overlay):
        path.chmod(0o755 if path.read_bytes().startswith(b"#!") else 0o644)
    (overlay / "etc/apt/apt.conf.d").mkdir(parents=True, exist_ok=True)
    (overlay / "etc/apt/apt.conf.d/90control-machine").write_text("\n".join([*apt_settings(), ""]))
    certificates = overlay / "usr/local/share/ca-certificates"
    certificates.mkdir(parents=True, exist_ok=True)
    for certificate in _certificates():
        shutil.copy(certificate, certificates / certificate.name)
    customize = seed / "customize"
    customize.write_text(CUSTOMIZE.format(files=overlay, debs=paths.debs()))
    customize.chmod(0o755)
    paths.debs().mkdir(parents=True, exist_ok=True)
    archives = "var/cache/apt/archives"
    # Hard links: apt replaces or removes files here, it never writes into one, so the cache stays whole.
    take = f'mkdir -p "$1/{archives}" && find "{paths.debs()}" -name "*.deb" -exec cp -lt "$1/{archives}" {{}} +'
    target = folder / "root.new"
    shutil.rmtree(target, ignore_errors=True)
    log = folder / "build.log"
    command = [
        "mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory", f"--include={','.join(PACKAGES)}",
        # The package lists stay in the image: a host's first `apt-get update` then transfers next to nothing.
        "--skip=cleanup/apt/lists,essential/unlink,download/empty",
        *(f"--aptopt={setting.rstrip(';')}" for setting in apt_settings()),
        f"--setup-hook={take}", f'--customize-hook={customize} "$1"',
        suite, str(target), "-",
    ]  # fmt: skip
    with open(log, "wb") as sink:
        text = "\n".join(source.stanza() for source in sources(suite)).encode()
        # The temporary root is made below our cache: /tmp may be small, and hard links need one file system.
        environment = {**os.environ, "TMPDIR": str(folder), "DEBIAN_FRONTEND": "noninteractive"}
        done = subprocess.run(command, input=text, stdout=sink, stderr=subprocess.STDOUT, env=environment, check=False)
    if done.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise GpulabError(f"Building the lab's image ended with {done.returncode}", tail, f"the whole log: {log}")
    shutil.rmtree(seed)


#: Run by mmdebstrap with the new root as $1. The machine id and the SSH host keys are each clone's own.
CUSTOMIZE = """\
#!/bin/sh
set -e
for package in "$1"/var/cache/apt/archives/*.deb; do
    name=${{package##*/}}
    [ -e "{debs}/$name" ] || ln "$package" "{debs}/$name"
    rm "$package"
done
cp -a --no-preserve=ownership {files}/. "$1/"
chroot "$1" update-ca-certificates
chroot "$1" systemctl enable systemd-networkd.service systemd-resolved.service lab-cgroups.service \
    lab-disks.service lab-disks.path
# A container has no console to log in at, and package upgrades of its own would make a rehearsal different each day.
chroot "$1" systemctl mask console-getty.service getty.target apt-daily.timer apt-daily-upgrade.timer \
    e2scrub_reap.service
rm -f "$1"/etc/ssh/ssh_host_* "$1/etc/machine-id" "$1/var/lib/dbus/machine-id"
echo uninitialized > "$1/etc/machine-id"
rm -f "$1/etc/hostname" "$1/etc/resolv.conf"
ln -s /run/systemd/resolve/stub-resolv.conf "$1/etc/resolv.conf"
"""


def _certificates() -> list[Path]:
    if not LOCAL_CERTIFICATES.is_dir():
        return []
    return sorted(LOCAL_CERTIFICATES.rglob("*.crt"))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _checked(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise GpulabError(f"`{' '.join(argv)}` ended with {done.returncode}", done.stderr.strip())
    return done.stdout

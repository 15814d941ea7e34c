# SPDX-License-Identifier: MIT
"""apt on a guest: how versions are compared, how packages are installed, and what its failures mean."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from pyinfra.api import QuoteString, StringCommand

from inventory import GpulabError
from operations.told import Told

#: Seconds to wait for another apt or dpkg (unattended-upgrades after a boot) to end.
LOCK_S = 300

# A run that was killed inside dpkg leaves its journal behind, and apt then refuses everything. What can't be configured
# now (half of a driver, a module that does not build) apt replaces, or says again: its failure is the one to be told.
# A package that was half unpacked is unpacked first: apt finds no way past it to other versions of what belongs to it.
_INSTALL = """
set -e
export DEBIAN_FRONTEND=noninteractive LC_ALL=C
[ -z "$(ls -A /var/lib/dpkg/updates)" ] || dpkg --configure -a > /dev/null 2>&1 || true
apt-get -q -o DPkg::Lock::Timeout={lock} update
half=$(dpkg-query -W -f '${{db:Status-Eflag}} ${{Package}}\\n' | sed -n 's/^reinstreq //p')
if [ -n "$half" ]; then
    place=$(mktemp -d)
    (cd "$place" && apt-get -q download $half && dpkg --unpack --force-depends ./*.deb)
    rm -r "$place"
fi
apt-get -q -y -o DPkg::Lock::Timeout={lock} -o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold \
--no-install-recommends{flags} install "$@"
"""


#: `apt-mark "$@"`: it has dpkg write the marks, and dpkg does not wait for its lock.
MARK = f"""
export LC_ALL=C
deadline=$(($(date +%s) + {LOCK_S}))
until said=$(apt-mark "$@" 2>&1); do
    case $said in *"lock was locked"*) ;; *) deadline=0 ;; esac
    if [ "$(date +%s)" -ge "$deadline" ]; then echo "$said" >&2; exit 1; fi
    sleep 2
done
"""


class Failure(NamedTuple):
    """What made apt fail. `details`: its own words, or what they are about."""

    brief: str
    hint: str
    details: str = ""


#: The repository that a line of apt's is about, whoever checks signatures: gpgv (Debian 12) or sqv (Debian 13).
_SIGNED = r"(?:GPG error|OpenPGP signature verification failed): (?P<url>\S+)[^\n]*?"
_NEWER_KEY = (
    "the publisher has a newer key: give its digest as `key_sha256` (`toolkit_key_sha256`), or remove the old key file "
    "from /usr/share/keyrings in the guest, and deploy again: it is fetched anew"
)
_WAIT = "wait for its end and deploy again"
_SHOW = "`apt-cache policy {name}` in the guest shows what its repositories have"

#: Pattern, what is wrong, what helps, further details. The first that fits counts: a cause stands before its effects.
_KNOWN: tuple[tuple[str, str, str, str], ...] = (
    (
        r"You don't have enough free space in (?P<place>\S+?)\.?$",
        "No space left in {place} on the guest",
        "`df -h` and `apt-get clean` in the guest; `system_disk_gib` grows its system disk",
        "",
    ),
    (
        r"No space left on device",
        "No space left on the guest's disk",
        "`df -h` and `apt-get clean` in the guest; `system_disk_gib` grows its system disk",
        "",
    ),
    (
        r"^(?:E|Error): Could not get lock (?P<file>\S+?)\. It is held by process (?P<pid>\d+) \((?P<holder>.*?)\)",
        "apt's lock {file} is held by {holder} (process {pid})",
        "`ps -fp {pid}` in the guest shows what it does; " + _WAIT,
        f"Waited {LOCK_S} s for it.",
    ),
    (
        r"dpkg: error: (?P<file>dpkg \w+ lock) was locked by (?P<holder>.+?)(?: process)? with pid (?P<pid>\d+)",
        "apt's lock is held by {holder} (process {pid})",
        "`ps -fp {pid}` in the guest shows what it does; " + _WAIT,
        f"Waited {LOCK_S} s for the {{file}}.",
    ),
    (
        r"^(?:E|Error): (?:Could not get lock|Unable to acquire|Unable to lock)[^\n]*?(?P<file>/[\w./-]+)",
        "apt's lock {file} is held by another process",
        "`ps -ef | grep -e apt -e dpkg` in the guest shows which one; " + _WAIT,
        f"Waited {LOCK_S} s for it.",
    ),
    # dpkg's own failures before what a repository only warned of.
    (
        r"trying to overwrite '(?P<file>[^']+)', which is also in package (?P<name>\S+)",
        "{file} belongs to another package already: {name}",
        "`apt-get remove {name}` in the guest, and deploy again",
        "",
    ),
    (
        r"dpkg: error processing (?:package|archive) (?P<name>\S+) \(--(?P<step>\w+)\):",
        "dpkg could not {step} {name}",
        "`dpkg --configure -a` in the guest says why; the next deploy takes up where this one ended",
        "",
    ),
    (
        _SIGNED + r"(?:EXPKEYSIG|Expired on) (?P<what>[^\n]+)",
        "The key that signs {url} has expired",
        _NEWER_KEY,
        "apt says: expired {what}",
    ),
    (
        _SIGNED + r"(?:NO_PUBKEY|Missing key) (?P<key>[0-9A-F]+)",
        "{url} is signed by another key than the one that it is trusted by",
        "a publisher's new key is given as `key_sha256` (`toolkit_key_sha256`); nobody else may sign the repository",
        "It is signed by {key}.",
    ),
    (
        _SIGNED + r": (?P<why>[^\n]+)",
        "The signature of {url} is not valid",
        "a mirror in the middle of an update heals by itself; one that alters files, or signs with SHA-1, does not",
        "apt says: {why}",
    ),
    (
        r"Release file for (?P<url>\S+) is (?P<how>expired|not valid yet)",
        "The index of {url} is {how}",
        "the mirror is stale, or the guest's clock is wrong: `timedatectl` in the guest",
        "",
    ),
    (
        r"(?P<what>Hash Sum mismatch|File has unexpected size)",
        "The files of a repository do not fit its index: {what}",
        "a mirror or proxy in the middle of an update: deploy again in some minutes",
        "",
    ),
    (
        r"The repository '(?P<url>\S+)[^']*' (?P<how>does not have a Release file|is not signed)",
        "{url} is no repository that apt can trust: it {how}",
        "look at the address in the inventory; a signed repository has a file InRelease",
        "",
    ),
    (
        r"^(?:E|Error|W|Warning): Failed to fetch (?P<url>\S+)\s+(?P<why>[^\n]+)",
        "{url} can't be had: {why}",
        "look at the guest's network and name server, and at the address in the inventory",
        "",
    ),
    (
        r"Unable to locate package (?P<name>\S+)",
        "No repository of the guest has a package {name}",
        _SHOW,
        "",
    ),
    (
        r"Package '(?P<name>[^']+)' has no installation candidate",
        "No repository of the guest has a version of {name} that its pins allow",
        _SHOW,
        "",
    ),
    (
        r"Version '(?P<version>[^']+)' for '(?P<name>[^']+)' was not found",
        "No repository of the guest has {name} {version}",
        _SHOW,
        "",
    ),
    (
        r"dpkg was interrupted, you must manually run",
        "An earlier run of dpkg was interrupted, and its packages can't be configured",
        "`dpkg --configure -a` in the guest says which, and why",
        "",
    ),
    (
        r"The following packages have unmet dependencies:\n(?P<lines>(?: [^\n]*(?:\n|$))+)",
        "Packages do not go together",
        "a pin, a hold or a foreign repository stands between them: `apt-cache policy` of those named shows which",
        "{lines}",
    ),
    (
        r"Held packages were changed and -y was used",
        "apt would have to change packages that are held",
        "`apt-mark showhold` in the guest lists them",
        "",
    ),
)


def explain(output: str) -> Failure:
    """What made apt or dpkg fail, by what they printed (in English); with their own last words where it is unknown."""
    for pattern, brief, hint, details in _KNOWN:
        if found := re.search(pattern, output, re.MULTILINE):
            words = {name: " ".join(value.split()) for name, value in found.groupdict().items() if name != "lines"}
            if "lines" in found.groupdict():
                words["lines"] = "\n".join(f"  {' '.join(line.split())}" for line in found["lines"].splitlines()[:6])
            return Failure(brief.format(**words), hint.format(**words), details.format(**words))
    errors = [line.partition(": ")[2] for line in output.splitlines() if re.match(r"(?:E|Error): ", line)]
    if errors:
        return Failure(f"apt failed: {errors[0].strip()}", "", "\n".join(errors[1:]))
    lines = [line.strip() for line in output.splitlines() if line.strip() and not line.startswith("(Reading database")]
    *before, last = lines[-5:] or ["it printed nothing"]
    return Failure(f"apt failed: {last}", "", "\n".join(before))


def error_of(output: str) -> GpulabError:
    """The error to show for a failed command of apt."""
    failure = explain(output)
    return GpulabError(failure.brief, failure.details, failure.hint)


def upstream(version: str) -> str:
    """A Debian version without its epoch and revision: `1:580.95.05-1` is `580.95.05`."""
    return version.rpartition(":")[2].rpartition("-")[0] or version.rpartition(":")[2]


def in_branch(version: str | None, branch: str, exact: str | None = None) -> bool:
    """Is a package version of driver branch `branch` and, when one is given, of exactly this upstream version?"""
    if version is None:
        return False
    found = upstream(version)
    return found == exact if exact else found.partition(".")[0] == branch


def missing(found: Mapping[str, str | None], wanted: Iterable[str]) -> list[str]:
    """Those packages that are not installed."""
    return [name for name in wanted if found.get(name) is None]


def update() -> StringCommand:
    """Refresh the package lists. An index that can't be had is an error: apt itself would only warn."""
    options = ("-q", "-o", f"DPkg::Lock::Timeout={LOCK_S}", "-o", "APT::Update::Error-Mode=any")
    return Told("apt-get", *options, "update", explain=error_of)


def install(
    packages: Iterable[str],
    repin: bool = False,
    reinstall: bool = False,
    explain: Callable[[str], GpulabError] = error_of,
) -> StringCommand:
    """Refresh the package lists and install `packages` (`name`, `name=version`; `name-` removes it), without
    recommended ones.

    + repin: held packages may change, and versions may go down
    + reinstall: also those that are installed: files of theirs are missing
    + explain: who knows better than apt why it failed
    """
    flags = " --allow-downgrades --allow-change-held-packages" if repin else ""
    flags += " --reinstall" if reinstall else ""
    script = _INSTALL.format(lock=LOCK_S, flags=flags).strip()
    words = [QuoteString(word) for word in packages]
    return Told("sh", "-c", QuoteString(script), "install", *words, explain=explain)


def mark(how: str, packages: Iterable[str]) -> StringCommand:
    """Have apt `hold` or `unhold` packages."""
    return Told("sh", "-c", QuoteString(MARK.strip()), "mark", how, *map(QuoteString, packages), explain=error_of)

# SPDX-License-Identifier: MIT
"""What apt's failures mean. The outputs were captured from apt 2.6 (gpgv) and apt 3.0 (sqv)."""

from __future__ import annotations

from typing import Any, cast

import pytest
from pyinfra.connectors.util import CommandOutput, OutputLine

from inventory import GpulabError
from operations import apt, step

LISTS = "Reading package lists...\nBuilding dependency tree...\nReading state information...\n"
HELD = """\
Waiting for cache lock: Could not get lock /var/lib/dpkg/lock-frontend. It is held by process 1342 (unattended-upgr)...
E: Could not get lock /var/lib/dpkg/lock-frontend. It is held by process 1342 (unattended-upgr)
N: Be aware that removing the lock file is not a solution and may break your system.
E: Unable to acquire the dpkg frontend lock (/var/lib/dpkg/lock-frontend), is another process using it?
"""
EXPIRED_GPGV = """\
Err:1 http://127.0.0.1:18777 ./ InRelease
  The following signatures were invalid: EXPKEYSIG 57699DF0690DA5C5 old <o@x>
W: GPG error: http://127.0.0.1:18777 ./ InRelease: The following signatures were invalid: EXPKEYSIG 57699DF0690DA5C5 old
E: The repository 'http://127.0.0.1:18777 ./ InRelease' is not signed.
"""
_BAD = (
    "Signing key on 044EFFACB450BBB0FE5F01A641AFDBDF7BAC0C8C is bad:            The primary key is not live   because:"
)
EXPIRED_SQV = f"""\
W: An error occurred during the signature verification. The repository is not updated and the previous index files \
will be used. OpenPGP signature verification failed: http://127.0.0.1:18777 ./ InRelease: Sub-process /usr/bin/sqv \
returned an error code (1), error message is: {_BAD} Expired on 2024-02-01T00:00:00Z
E: Failed to fetch http://127.0.0.1:18777/./InRelease  Sub-process /usr/bin/sqv returned an error code (1), error \
message is: {_BAD} Expired on 2024-02-01T00:00:00Z
E: Some index files failed to download. They have been ignored, or old ones used instead.
"""
OTHER_KEY_GPGV = """\
W: GPG error: http://m.example ./ InRelease: The following signatures couldn't be verified because the public key is \
not available: NO_PUBKEY 57699DF0690DA5C5
E: The repository 'http://m.example ./ InRelease' is not signed.
"""
OTHER_KEY_SQV = """\
W: OpenPGP signature verification failed: http://m.example ./ InRelease: Sub-process /usr/bin/sqv returned an error \
code (1), error message is: Missing key 06964323D4650938736F02ED0CE3D01A9999C059, which is needed to verify signature.
E: The repository 'http://m.example ./ InRelease' is not signed.
"""
ALTERED_SQV = """\
W: OpenPGP signature verification failed: http://m.example ./ InRelease: Sub-process /usr/bin/sqv returned an error \
code (1), error message is: Verifying signature:            Message has been manipulated
E: The repository 'http://m.example ./ InRelease' is not signed.
"""
NODATA = """\
E: GPG error: http://m.example ./ InRelease: Signed file isn't valid, got 'NODATA' (does the network require \
authentication?)
"""
NO_NAME = """\
Err:1 http://no.such.invalid/none ./ InRelease
  Temporary failure resolving 'no.such.invalid'
E: Failed to fetch http://no.such.invalid/none/./InRelease  Temporary failure resolving 'no.such.invalid'
E: Some index files failed to download. They have been ignored, or old ones used instead.
"""
NOT_THERE = """\
Err:2 http://m.example/none ./ Release
  404  File not found [IP: 127.0.0.1 18777]
E: The repository 'http://m.example/none ./ Release' does not have a Release file.
"""
UNMET = (
    LISTS
    + """\
Some packages could not be installed. This may mean that you have
requested an impossible situation or if you are using the unstable
distribution that some required packages have not yet been created
or been moved out of Incoming.
The following information may help to resolve the situation:

The following packages have unmet dependencies:
 foreign-cuda : Depends: libcuda1 (>= 590) but 580.95.05-1 is to be installed
E: Unable to correct problems, you have held broken packages.
"""
)
FAILED_SCRIPT = """\
W: Failed to fetch http://elsewhere.example/InRelease  Could not resolve 'elsewhere.example'
Setting up nvidia-kernel-open-dkms (580.95.05-1) ...
dpkg: error processing package nvidia-kernel-open-dkms (--configure):
 installed nvidia-kernel-open-dkms package post-installation script subprocess returned error exit status 10
Errors were encountered while processing:
 nvidia-kernel-open-dkms
E: Sub-process /usr/bin/dpkg returned an error code (1)
"""


@pytest.mark.parametrize(
    ("output", "brief", "hint"),
    [
        (HELD, "apt's lock /var/lib/dpkg/lock-frontend is held by unattended-upgr (process 1342)", "ps -fp 1342"),
        (
            "E: Unable to acquire the dpkg frontend lock (/var/lib/dpkg/lock-frontend), are you root?",
            "apt's lock /var/lib/dpkg/lock-frontend is held by another process",
            "grep -e apt",
        ),
        (
            "dpkg: error: dpkg frontend lock was locked by /usr/bin/python3.13 process with pid 12373\n"
            "E: Sub-process dpkg --set-selections returned an error code (2)\n"
            "E: Executing dpkg failed. Are you root?",
            "apt's lock is held by /usr/bin/python3.13 (process 12373)",
            "ps -fp 12373",
        ),
        (EXPIRED_GPGV, "The key that signs http://127.0.0.1:18777 has expired", "key_sha256"),
        (EXPIRED_SQV, "The key that signs http://127.0.0.1:18777 has expired", "key_sha256"),
        (OTHER_KEY_GPGV, "http://m.example is signed by another key than the one that it is trusted by", "key_sha256"),
        (OTHER_KEY_SQV, "http://m.example is signed by another key than the one that it is trusted by", "key_sha256"),
        (ALTERED_SQV, "The signature of http://m.example is not valid", "mirror"),
        (NODATA, "The signature of http://m.example is not valid", "mirror"),
        (
            NO_NAME,
            "http://no.such.invalid/none/./InRelease can't be had: Temporary failure resolving 'no.such.invalid'",
            "name server",
        ),
        (
            NOT_THERE,
            "http://m.example/none is no repository that apt can trust: it does not have a Release file",
            "address",
        ),
        (
            LISTS + "E: Unable to locate package nvidia-driver-cuda",
            "No repository of the guest has a package nvidia-driver-cuda",
            "apt-cache policy nvidia-driver-cuda",
        ),
        (
            "E: Version '1.20.0-1' for 'nvidia-container-toolkit' was not found",
            "No repository of the guest has nvidia-container-toolkit 1.20.0-1",
            "apt-cache policy nvidia-container-toolkit",
        ),
        (
            "E: Package 'nvidia-driver-cuda' has no installation candidate",
            "No repository of the guest has a version of nvidia-driver-cuda that its pins allow",
            "apt-cache policy nvidia-driver-cuda",
        ),
        (UNMET, "Packages do not go together", "foreign repository"),
        (
            "E: You don't have enough free space in /var/cache/apt/archives/.",
            "No space left in /var/cache/apt/archives/ on the guest",
            "system_disk_gib",
        ),
        (
            "dpkg: error processing archive /x.deb (--unpack):\n cannot copy extracted data: failed to write "
            "(No space left on device)",
            "No space left on the guest's disk",
            "df -h",
        ),
        (
            "E: dpkg was interrupted, you must manually run 'dpkg --configure -a' to correct the problem.",
            "An earlier run of dpkg was interrupted, and its packages can't be configured",
            "dpkg --configure -a",
        ),
        # What a repository only warned of is not what dpkg failed at.
        (FAILED_SCRIPT, "dpkg could not configure nvidia-kernel-open-dkms", "dpkg --configure -a"),
        (
            "dpkg: error processing archive /a.deb (--unpack):\n trying to overwrite '/usr/bin/nvidia-smi', which is "
            "also in package nvidia-smi 550.163.01-2",
            "/usr/bin/nvidia-smi belongs to another package already: nvidia-smi",
            "apt-get remove nvidia-smi",
        ),
        ("E: Failed to fetch http://m.example/a.deb  Hash Sum mismatch\n", "The files of a repository", "minutes"),
        (
            "E: Release file for http://m.example/InRelease is not valid yet (invalid for another 3h).",
            "The index of http://m.example/InRelease is not valid yet",
            "timedatectl",
        ),
    ],
)
def test_a_known_failure_has_a_cause_and_what_helps(output: str, brief: str, hint: str) -> None:
    failure = apt.explain(output)
    assert failure.brief.startswith(brief)
    assert hint in failure.hint


def test_unmet_dependencies_name_the_packages() -> None:
    assert apt.explain(UNMET).details == (
        "  foreign-cuda : Depends: libcuda1 (>= 590) but 580.95.05-1 is to be installed"
    )


def test_a_lock_that_was_waited_for_and_got_is_no_failure() -> None:
    output = HELD.splitlines()[0] + "\nE: Unable to locate package x\n"
    assert apt.explain(output).brief == "No repository of the guest has a package x"


@pytest.mark.parametrize(
    ("output", "brief"),
    [
        ("noise\nE: A new thing went wrong\nE: and more\n", "apt failed: A new thing went wrong"),
        ("one\ntwo\n", "apt failed: two"),
        ("Unpacking libcuda1 ...\nKilled\n(Reading database ... 5%\n", "apt failed: Killed"),
        ("", "apt failed: it printed nothing"),
    ],
)
def test_an_unknown_failure_is_told_in_apts_own_words(output: str, brief: str) -> None:
    assert apt.explain(output).brief == brief


def test_a_failed_command_tells_the_cause_and_not_its_output(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[GpulabError] = []

    class Host:
        def run_shell_command(self, command: Any, **arguments: Any) -> tuple[bool, CommandOutput]:
            return False, CommandOutput([OutputLine("stderr", line) for line in HELD.splitlines()])

    class State:
        print_output = print_input = False

    def refuse(state: Any, host: Any, error: GpulabError) -> bool:
        told.append(error)
        return False

    monkeypatch.setattr(step, "refuse", refuse)
    done, output = apt.install(["a"]).execute(cast(Any, State()), cast(Any, Host()), {})

    assert (done, list(output)) == (False, [])
    assert str(told[0]).splitlines()[1:] == [
        "Waited 300 s for it.",
        "hint: `ps -fp 1342` in the guest shows what it does; wait for its end and deploy again",
    ]

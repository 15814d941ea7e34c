# SPDX-License-Identifier: MIT
"""`python -m rehearsal.kernel.supervisor SPEC`: keeps one kernel machine running, across its reboots, until stdin ends.

A process of its own, so that a test's threads and event loops do not slow the machine's PCI functions; and it ends with
its parent, however that ends: the kernel then closes the other end of stdin.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import subprocess
import sys
from pathlib import Path

from rehearsal.kernel import pci_device, qemu
from rehearsal.kernel.qemu import Spec

#: How QEMU names a guest's reboot in its SHUTDOWN event.
GUEST_RESET = "guest-reset"
STOPPED = "stopped"
#: QEMU 7.2 now and then dies of a fault of its own when a guest with stand-in functions resets. The guest has written
#: everything by then, so the machine is switched on again, as after a power failure; but not for ever.
CRASHES = 2
END_S = 10.0


def supervise(spec: Spec) -> int:
    """Start QEMU, and again after each reboot of the guest; returns the status of the QEMU that ended otherwise."""
    crashes = 0
    while True:
        reason, status = _run(spec)
        print(f"QEMU ended with {status}: {reason or 'by itself'}", flush=True)
        crashes += status < 0 and reason != STOPPED
        if reason != GUEST_RESET and (status >= 0 or reason == STOPPED or crashes > CRASHES):
            return status


def _run(spec: Spec) -> tuple[str, int]:
    """One QEMU, from start to end: why it ended (empty: it did not say) and its exit status."""
    # Functions are served anew each time: a socket carries one QEMU's accesses, and a power cycle forgets registers.
    monitor, qmp = socket.socketpair()
    pairs = [socket.socketpair() for _ in spec.functions()]
    theirs = [qmp.fileno(), *(their.fileno() for _, their in pairs)]
    argv = qemu.command(spec, qmp.fileno(), [their.fileno() for _, their in pairs])
    # This process may be killed as well.
    process = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *argv], stdin=subprocess.DEVNULL, pass_fds=theirs)
    qmp.close()
    for function, (ours, their) in zip(spec.functions(), pairs, strict=True):
        their.close()
        pci_device.serve(function, ours)
    with monitor:
        reason = _watch(monitor, process)
    try:
        return reason, process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return reason, process.wait()


def _watch(monitor: socket.socket, process: subprocess.Popen[bytes]) -> str:
    """Wait for the guest's reset or power off, or the end of stdin, and let QEMU quit; returns which it was."""
    reason, rest = "", b""
    # QEMU may be gone at any moment: early, when it refuses its command line, or between our `quit` and its answer.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError), selectors.DefaultSelector() as selector:
        selector.register(monitor, selectors.EVENT_READ)
        selector.register(sys.stdin, selectors.EVENT_READ)
        monitor.sendall(b'{"execute": "qmp_capabilities"}\n')
        while True:
            for key, _ in selector.select():
                if key.fileobj is sys.stdin:
                    process.terminate()
                    return STOPPED
                data = monitor.recv(65536)
                if not data:
                    return reason
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    message = json.loads(line)
                    if message.get("event") == "SHUTDOWN":
                        # Our own `quit` is announced as well.
                        reason = reason or message["data"]["reason"]
                        monitor.sendall(b'{"execute": "quit"}\n')
    return reason


if __name__ == "__main__":
    sys.exit(supervise(Spec.from_plain(json.loads(Path(sys.argv[1]).read_text()))))

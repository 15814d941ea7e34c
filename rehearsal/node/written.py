# SPDX-License-Identifier: MIT
"""Files that act on what is written to them, before the writer's call returns: what attributes of sysfs are.

A folder of such files, served by FUSE. A pipe would not do: its writer goes on before its reader has done anything,
and a script looks at once at what its write has changed. The protocol is that of linux/fuse.h, as far as a shell's
`echo … > FILE` needs it.
"""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

#: Called with what was written; an OSError is the answer to the write.
Action = Callable[[str], None]
_DEVICE = "/dev/fuse"
_BUFFER = 1 << 18
_ROOT = 1
_LOOKUP, _FORGET, _GETATTR, _SETATTR, _OPEN, _WRITE, _RELEASE = 1, 2, 3, 4, 14, 16, 18
_FSYNC, _FLUSH, _INIT, _ACCESS, _INTERRUPT, _DESTROY, _BATCH_FORGET = 20, 25, 26, 34, 36, 38, 42
#: Data goes to the file as it was written, past the page cache.
_DIRECT_IO = 1


class WrittenFiles:
    """The files of one folder, by name; use it in `with`. It is served by a thread of this process."""

    def __init__(self, folder: Path, actions: Mapping[str, Action]) -> None:
        self._folder = folder
        self._names = list(actions)
        self._actions = list(actions.values())

    def __enter__(self) -> WrittenFiles:
        if not os.path.exists(_DEVICE):
            os.mknod(_DEVICE, 0o666 | 0o020000, os.makedev(10, 229))
        self._channel = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self._channel},rootmode=40000,user_id=0,group_id=0"
        # -i: by mount(2) itself, without a helper.
        words = ["mount", "-i", "-t", "fuse", "-o", options, "simulated", str(self._folder)]
        subprocess.run(words, pass_fds=[self._channel], capture_output=True, text=True, check=True)
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", str(self._folder)], capture_output=True, check=True)

    def _serve(self) -> None:
        while True:
            try:
                request = os.read(self._channel, _BUFFER)
            except OSError:
                # Unmounted.
                return
            _, operation, unique, node = struct.unpack_from("<IIQQ", request)
            if operation in (_FORGET, _BATCH_FORGET, _INTERRUPT):
                continue
            try:
                answer, error = self._answer(operation, node, request[40:]), 0
            except OSError as refusal:
                answer, error = b"", refusal.errno or errno.EIO
            os.write(self._channel, struct.pack("<IiQ", 16 + len(answer), -error, unique) + answer)

    def _answer(self, operation: int, node: int, body: bytes) -> bytes:
        """The answer to one request, without its header.

        Raises:
            OSError: the answer is this error.
        """
        if operation == _INIT:
            major, minor, read_ahead = struct.unpack_from("<III", body)
            return struct.pack("<IIIIHHIIHHI28x", major, min(minor, 31), read_ahead, 0, 0, 0, 4096, 1, 0, 0, 0)
        if operation == _LOOKUP:
            name = body.rstrip(b"\0").decode()
            if name not in self._names:
                raise OSError(errno.ENOENT, name)
            number = _ROOT + 1 + self._names.index(name)
            return struct.pack("<QQQQII", number, 0, 0, 0, 0, 0) + _attributes(number)
        if operation in (_GETATTR, _SETATTR):
            return struct.pack("<QII", 0, 0, 0) + _attributes(node)
        if operation == _OPEN:
            return struct.pack("<QII", 0, _DIRECT_IO, 0)
        if operation == _WRITE:
            (size,) = struct.unpack_from("<I", body, 16)
            self._actions[node - _ROOT - 1](body[40 : 40 + size].decode(errors="replace"))
            return struct.pack("<II", size, 0)
        if operation in (_FLUSH, _RELEASE, _FSYNC, _ACCESS, _DESTROY):
            return b""
        raise OSError(errno.ENOSYS, "not served")


def _attributes(node: int) -> bytes:
    mode = 0o040755 if node == _ROOT else 0o100600
    # Inode, size, blocks, three times and their nanoseconds, mode, links, owner, group, device, block size, flags.
    return struct.pack("<QQQQQQIIIIIIIIII", node, 0, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


def main(_: Mapping[str, Any]) -> None:
    """Mount and unmount a folder without files: does this machine allow it?"""
    with tempfile.TemporaryDirectory() as folder, WrittenFiles(Path(folder), {}):
        pass

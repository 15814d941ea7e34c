# SPDX-License-Identifier: MIT
"""An environment of PyTorch jobs as it lies on the data disk, for whoever makes it and whoever looks at it."""

import hashlib
import os
import stat

#: What describes a finished environment, beside its files.
DESCRIPTION = "gpulab.json"


def state(folder: str) -> str:
    """A digest of every file's name, size, time, mode and owner: it differs once anybody has changed something.

    The contents are not read, as there may be gigabytes of them.
    """
    digest = hashlib.sha256()
    for path, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted([*names, *folders]):
            whole = os.path.join(path, name)
            if whole == os.path.join(folder, DESCRIPTION):
                continue
            found = os.lstat(whole)
            # A folder's time and size are those of its entries, which are told one by one.
            content = () if stat.S_ISDIR(found.st_mode) else (found.st_size, found.st_mtime_ns)
            told = (os.path.relpath(whole, folder), found.st_mode, found.st_uid, found.st_gid, *content)
            digest.update(f"{told}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()

# SPDX-License-Identifier: MIT
"""Programs that run on a host: checked and tested here like any module, sent as text, with nothing installed there.

A package keeps its programs in a folder `remote/`. Each may use the standard library and `operations.remote.common`,
whose text is sent in front of it.
"""

from __future__ import annotations

from pathlib import Path

_COMMON = Path(__file__).parent / "common.py"


def program(module: str, name: str) -> str:
    """The complete text of `remote/NAME.py` beside the file `module` (the caller's `__file__`).

    Its first line names it, for whoever looks at the guest's process list.
    """
    package = Path(module).parent
    parts = [_COMMON.read_text(), (package / "remote" / f"{name}.py").read_text()]
    lines = [
        line for part in parts for line in part.splitlines() if not line.startswith(("from operations.", "# SPDX"))
    ]
    return "\n".join([f"# gpulab: {package.name}/{name}", *lines])

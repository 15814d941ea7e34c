# SPDX-License-Identifier: MIT
"""Programs that run on a host: checked and tested here like any module, sent as text, with nothing installed there.

A package keeps its programs in a folder `remote/`. Each may use the standard library and `operations.remote.common`,
whose text is sent in front of it.
"""

from __future__ import annotations

import re
from pathlib import Path

_COMMON = Path(__file__).parent / "common.py"
#: Where a program begins to run by itself.
_START = '\nif __name__ == "__main__":\n'
#: What stands in front of a program's text already: imports of ours, of one line or in brackets, and the licence.
_LEFT_OUT = re.compile(r"^(?:from operations\.[^\n(]*(?:\([^)]*\))?|# SPDX)[^\n]*\n", re.MULTILINE)


def program(module: str, *names: str) -> str:
    """The complete text of `remote/NAME.py` beside the file `module` (the caller's `__file__`).

    Of several names the last is the program, and those before it are what it imports. The first line names it, for
    whoever looks at the guest's process list.
    """
    package = Path(module).parent
    texts = [(package / "remote" / f"{name}.py").read_text() for name in names]
    parts = [_COMMON.read_text(), *(text.partition(_START)[0] for text in texts[:-1]), texts[-1]]
    lines = [line for part in parts for line in _LEFT_OUT.sub("", part).splitlines()]
    return "\n".join([f"# gpulab: {package.name}/{names[-1]}", *lines])

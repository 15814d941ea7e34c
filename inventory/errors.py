# SPDX-License-Identifier: MIT
"""The one error class of gpulab: what is wrong, what was seen, what to do."""

from __future__ import annotations

from pyinfra.api.exceptions import PyinfraError


class GpulabError(PyinfraError):
    """A message for the person who runs the tool, never a bug report.

    It derives from pyinfra's own base so that the command line prints it as a message, without a traceback.
    `brief` names the thing and what is wrong with it; `details` says what was expected and seen (may span
    lines); `resolution` is what the reader can do.
    """

    def __init__(self, brief: str, details: str = "", resolution: str = "") -> None:
        self.brief = brief
        self.details = details
        self.resolution = resolution
        super().__init__(str(self))

    def __str__(self) -> str:
        hint = f"hint: {self.resolution}" if self.resolution else ""
        return "\n".join(part for part in (self.brief, self.details, hint) if part)


class InventoryError(GpulabError):
    """The inventory is wrong: raised before any operation is registered, for all hosts at once."""

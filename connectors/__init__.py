# SPDX-License-Identifier: MIT
"""How a run reaches the lab's hosts: `@node/NAME` and `@guest/NAME` in an inventory."""

# SPDX-License-Identifier: MIT
"""What holds for every guest of every lab: cloud-init's user works through sudo."""

_sudo = True

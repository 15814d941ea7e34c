# SPDX-License-Identifier: MIT
"""What holds for every node of every lab."""

ssh_user = "root"

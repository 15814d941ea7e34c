# SPDX-License-Identifier: MIT
"""What holds for every host of every lab. A value here gives way to the host's own."""

ssh_key = "~/.ssh/id_ed25519"

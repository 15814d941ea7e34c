# SPDX-License-Identifier: MIT
"""The VM as the Proxmox API shows it, read from the control machine with the lab's token."""

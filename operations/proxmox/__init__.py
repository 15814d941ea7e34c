# SPDX-License-Identifier: MIT
"""The Proxmox VE API, from the control machine: resource mappings, VMs, access."""

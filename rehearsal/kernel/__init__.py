# SPDX-License-Identifier: MIT
"""The kernel tier: a QEMU machine with Debian 13's real kernel and GRUB, an emulated IOMMU, and cards of any PCI id.

It shows what containers cannot: how boot files act on a boot, and which driver gets a device first.
"""

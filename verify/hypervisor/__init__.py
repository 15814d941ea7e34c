# SPDX-License-Identifier: MIT
"""The node: IOMMU, vfio binding and boot configuration, read over its own SSH connection."""

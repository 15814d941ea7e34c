# SPDX-License-Identifier: MIT
"""Driver and GPU in the guest; NVML is read by nvidia-ml-py's own module, which each run brings along."""

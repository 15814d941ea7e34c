# SPDX-License-Identifier: MIT
"""`lab/pytorch`: `recipe.py` builds the image, `wheels.py` its packages' layers."""

# SPDX-License-Identifier: MIT
"""sitecustomize of a job's Python: keeps torch to the job's share of the card, once the job imports it.

The fraction caps torch's own allocator; MPS' limit, where there is one, is the wall behind it.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from typing import Any


def settle(torch: Any) -> None:
    """What the job's environment asks of a torch that has just been imported."""
    fraction = float(os.environ.get("GPULAB_TORCH_MEMORY_FRACTION", "0"))
    if fraction and torch.version.cuda:
        # Not at once: it would open the card in processes that only load data, and make them unable to fork.
        torch.cuda._lazy_call(lambda: torch.cuda.set_per_process_memory_fraction(fraction))
    if os.environ.get("GPULAB_TORCH_DETERMINISTIC") == "1":
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True


class Finder(importlib.abc.MetaPathFinder):
    """Finds torch as the others do, and settles it when its module has run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        run = loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            settle(module)

        loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())

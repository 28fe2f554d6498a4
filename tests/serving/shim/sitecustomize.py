"""Lets torchvision be imported beside a CPU build of torch, for which there is no build of its operators.

vLLM imports torchvision, whose Python code is enough for it; that code only looks whether the operators exist. Python
imports a module of this name at its start, so put this folder on PYTHONPATH, for tests only.
"""

import importlib.abc
import sys

OPERATORS = ("nms", "qnms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
BACKWARD = OPERATORS[2:]


class Finder(importlib.abc.MetaPathFinder):
    """Defines the operators as soon as torchvision is looked for."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            from torch.library import Library

            Finder.library = Library("torchvision", "DEF")
            for operator in (*OPERATORS, *(f"_{one}_backward" for one in BACKWARD)):
                Finder.library.define(f"{operator}(Tensor x) -> Tensor")


sys.meta_path.insert(0, Finder())

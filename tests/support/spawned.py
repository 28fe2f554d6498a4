"""Runs a function of a test file in several processes, which cannot import a test file by its name."""

import importlib.util

import torch.multiprocessing as mp


def spawn(path, name, args, nprocs):
    """Run the function `name` of a test file as `name(rank, *args)` in new processes, and wait for them.

    Args:
        path: The file, `__file__` of who asks.
        name: Its function.
        args: What it gets after its rank.
        nprocs: Number of processes.
    """
    mp.spawn(_work, (path, name, args), nprocs=nprocs)


def _work(rank, path, name, args):
    spec = importlib.util.spec_from_file_location("spawned_tests", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    getattr(module, name)(rank, *args)

"""Run code so that its caller notices nothing, and so that what the caller has set does not change its results.

The self-check may run inside a user's program: under a default device, autocast or inference mode, in one of several
threads, between two draws of random numbers.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

DRAWS = {"bernoulli", "bernoulli_", "kaiming_normal_", "kaiming_uniform_", "multinomial", "normal", "normal_"}
DRAWS |= {"orthogonal_", "rand", "randint", "randn", "randperm", "trunc_normal_", "uniform_", "xavier_normal_"}
DRAWS |= {"xavier_uniform_"}


class Drawing(TorchFunctionMode):
    """Within it, this thread draws random numbers on the CPU from a generator of its own.

    Saving and restoring the state of the global generator would not do: other threads draw from it meanwhile.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator("cpu").manual_seed(seed)

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Hand our generator to functions that would take the global one."""
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in DRAWS and kwargs.get("generator") is None:
            kwargs = {**kwargs, "generator": self.generator}
        return func(*args, **kwargs)


class Quiet(logging.Filter):
    """Drops what this thread logs, but for messages that transformers gives once and would not give again."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is shown."""
        return record.thread != self.thread or record.funcName == "warning_once"


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """New tensors lie on the CPU in single precision; no gradients, autocast, warnings or messages.

    What torch and Python keep per process rather than per thread is touched where it must be: the filters of
    warnings, and settings that would falsify the figures. transformers too changes the default dtype for every model.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        quiet = Quiet()
        for handler in logging.getLogger("transformers").handlers + logging.getLogger().handlers:
            handler.addFilter(quiet)
            stack.callback(handler.removeFilter, quiet)
        dtype = torch.get_default_dtype()
        if dtype != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        threads = torch.get_num_threads()
        stack.callback(torch.set_num_threads, threads)
        torch.set_num_threads(1)  # tiny matrices are not worth sharing, and waiting for a busy core takes seconds
        onednn: Any = torch.backends.mkldnn
        if onednn.enabled and onednn.matmul.fp32_precision not in ("none", "ieee"):
            # After torch.set_float32_matmul_precision("medium"), oneDNN multiplies in half precision on some CPUs.
            stack.callback(onednn.set_flags, True, _fp32_precision=None)
            onednn.set_flags(False, _fp32_precision=None)
        yield

"""Runs a script as if CPUs with gloo were GPUs: `as_gpus.py script.py ...`.

accelerate offers FSDP and DeepSpeed to GPUs and their like only; everything after that choice is their own code.
"""

import runpy
import sys

from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import nn

prepare = Accelerator.prepare


def told(accelerator, *args, **kwargs):
    """Say into what the model is wrapped, and of what its parameters are made."""
    result = prepare(accelerator, *args, **kwargs)
    model = result[0] if isinstance(result, (tuple, list)) else result
    if isinstance(model, nn.Module):
        kinds = sorted({type(weight.data).__name__ for weight in model.parameters()})
        sys.stderr.write(f"prepared {type(model).__name__} with {' and '.join(kinds)}\n")
    return result


PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
Accelerator.prepare = told
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")

"""Runs a script under accelerate's FSDP on CPUs with gloo: `cpu_fsdp.py script.py ...`.

accelerate offers FSDP to GPUs and their like only; everything after that choice is its own code.
"""

import runpy
import sys

import accelerate.accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

found, prepare = PartialState.__init__, accelerate.accelerator.fsdp2_prepare_model


def as_if_gpus(self, *args, **kwargs):
    found(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


def told(accelerator, model):
    model = prepare(accelerator, model)
    sys.stderr.write(f"sharded: {all(isinstance(weight, DTensor) for weight in model.parameters())}\n")
    return model


PartialState.__init__ = as_if_gpus
accelerate.accelerator.fsdp2_prepare_model = told
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")

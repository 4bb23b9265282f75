"""Runs a script with FSDP on the CPU, where Accelerate keeps to plain data parallelism: `fsdp_on_cpu.py SCRIPT ...`."""

import runpy
import sys

from accelerate.state import DistributedType, PartialState

initialize = PartialState.__init__


def initialize_as_on_gpus(self, *args, **kwargs):
    initialize(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU  # from here on, FSDP is chosen as on GPUs; the device stays


PartialState.__init__ = initialize_as_on_gpus
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")

"""A stand-in for Transformer Engine 2.11, which needs a GPU to be installed and run.

It has the modules that Megatron-Core's layer spec builds on, with Transformer Engine's constructor arguments, parameter
names and shapes, computed by plain PyTorch on any device; tensor-parallel communication is Megatron's. What it refuses
is what Transformer Engine refuses: FP8 on shapes that its products do not take. It computes nothing in FP8: it records
which recipe each module was run under.

What it can show: that the learner asks Megatron and Transformer Engine for the right things. What it cannot: that
Transformer Engine's kernels give the right numbers; that is tests/gpu's.
"""

from . import common as common
from . import pytorch as pytorch

__version__ = "2.11.0"

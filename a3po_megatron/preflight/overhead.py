"""What nobody's tensors take: the device's own share, communicators, libraries' work space, the allocator's gaps.

None of it follows from a model. Each number is an estimate from measurements that others published, and says which.
"""

from __future__ import annotations

MIB, GIB = 1 << 20, 1 << 30

# cuBLAS and Transformer Engine keep work space of their own, 32 MiB each on Hopper, 8 and 4 before it, and some of it
# for every stream. In Megatron-LM's tests of tiny models 30 to 130 MiB are in use that no tensor accounts for.
LIBRARIES = {"hopper": 110 * MIB, "older": 64 * MIB}
CONTEXT = 600 * MIB  # of CUDA, with the kernels that were loaded
COMMUNICATOR = 512 * MIB  # of NCCL, for each group that a rank talks in (issues of verl and vLLM: 0.4 to 1 GiB)
# What an engine that sleeps leaves behind: graphs, communicators, work space outside its pool. vLLM's log of a 4B on
# one GPU has 1.2 GiB with the context; slime's authors saw 3 to 5 GB with their groups torn down.
ASLEEP = 3 * GIB
GRAPHS = 1 * GIB  # CUDA graphs of an engine, for its batch sizes (vLLM's log: 0.5 to 1.5 GiB)
HOST_PROCESS = 5 * GIB  # of a rank: torch, Transformer Engine and vLLM, the context's mirror, rollouts of a step
NODE = 2000 * GIB  # memory of a node, where slurm.memory does not say: what nodes of 8 H200 have
CPU_PROCESS = 800 * MIB  # of a rank on a CPU: torch, Megatron and vLLM, as the demo's ranks have
# Of what comes and goes, the allocator has more than is used: it cannot give back what lies between. Published pairs of
# reserved and allocated: 45.6 and 44.3, 72.4 and 65.2, 69.7 and 65.2 GiB.
GAPS = 0.15


def gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"

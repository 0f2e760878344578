"""Experiment 4: vLLM's sleep allocator alone, without an engine (vllm 0.32.0, device_allocator/cumem.py).

Two pools as an engine has them, weights and cache, beside memory of torch's own allocator as the learner has it:
level 2 discards both; each comes back at its old address, so that a graph captured before still replays.
"""

from __future__ import annotations

import os
import time

import torch

from .measure import free_bytes
from .report import Refused, Report

SIZE = 1 << 30  # of each pool
CYCLES = 20
# Pools give back whole allocations; torch's own allocator is emptied before each reading. 2 MiB pages, a few of them.
SLACK = 16 << 20


def allocator(report: Report) -> None:
    from vllm.device_allocator.cumem import CuMemAllocator, cumem_available

    if not cumem_available:
        raise Refused("vllm's cumem_allocator extension does not load")
    report.number("PYTORCH_CUDA_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF"))
    pools = CuMemAllocator.get_instance()
    beside = torch.randn(SIZE // 4, device="cuda")  # the learner's
    kept = beside[:1024].clone()
    with pools.use_memory_pool("weights"):
        weights = torch.empty(SIZE // 4, device="cuda")
    with pools.use_memory_pool("kv_cache"):
        cache = torch.empty(SIZE // 4, device="cuda")
    weights.fill_(2.0)
    cache.fill_(3.0)
    addresses = weights.data_ptr(), cache.data_ptr()
    out = torch.zeros(1024, device="cuda")

    def work() -> None:
        out.copy_(weights[:1024] * cache[:1024])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    report.claim("graph before sleep: largest error", float((out - 6.0).abs().max()), 0.0)
    freed, free, slept, woke, wrong = [], [], [], [], []
    for number in range(CYCLES):
        awake = free_bytes()
        start = time.perf_counter()
        pools.sleep(offload_tags=())
        torch.cuda.synchronize()
        slept.append(time.perf_counter() - start)
        asleep = free_bytes()
        freed.append(asleep - awake)
        between = torch.full((SIZE // 4,), 7.0, device="cuda")  # the learner takes what was given back
        del between
        torch.cuda.empty_cache()
        start = time.perf_counter()
        pools.wake_up(["weights"])
        weights.fill_(float(number))
        only_weights = free_bytes()
        pools.wake_up(["kv_cache"])
        torch.cuda.synchronize()
        woke.append(time.perf_counter() - start)
        cache.fill_(2.0)
        graph.replay()
        torch.cuda.synchronize()
        wrong.append(float((out - 2.0 * number).abs().max()))
        free.append(free_bytes())
        if number == 0:
            report.claim("bytes that waking the weights takes beyond their own", asleep - only_weights - SIZE, SLACK)
    report.claim("bytes of the pools that sleep does not give back", 2 * SIZE - min(freed), SLACK)
    report.holds("the pools come back at their addresses", (weights.data_ptr(), cache.data_ptr()) == addresses)
    report.claim("the graph replayed after every wake: largest error", max(wrong), 0.0)
    report.holds("memory beside the pools is as it was", torch.equal(beside[:1024], kept))
    report.claim(f"device bytes lost over {CYCLES} cycles", free[1] - free[-1], SLACK)
    middle = CYCLES // 2
    report.number("seconds to sleep, to wake", [sorted(slept)[middle], sorted(woke)[middle]])
    report.headline(f"{min(freed) / 2**30:.2f} of {2 * SIZE / 2**30:.0f} GiB given back, {CYCLES} cycles")

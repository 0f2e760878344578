"""Experiments for tests/test_bringup.py and tests/test_te.py: made-up ones with every way to end, and the real ones on
what a CPU has."""

from __future__ import annotations

import dataclasses
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

from tools.bringup.report import Refused, Report


def succeeds(report: Report) -> None:
    report.number("answer", 42)
    report.claim("small", 1e-7, 1e-6)
    report.claim_above("large", 5.0, 4.0)
    report.refusal("13 tokens", "assertion\n  13 % 8 != 0\n")
    report.left_out("Liger", "not installed")
    report.headline("42")


def fails(report: Report) -> None:
    report.number("found", float("nan"))
    report.claim("not a number", float("nan"), 1.0)
    report.claim("holds", 0.5, 1.0)
    report.headline("never seen")


def raises(report: Report) -> None:
    report.number("before", 1)
    raise ValueError(f"something in {Path(__file__).resolve()}")


def crashes(report: Report) -> None:
    report.number("before", 2)
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(report: Report) -> None:
    """With a child that would go on by itself."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    report.number("child", child.pid)
    time.sleep(600)


def takes_all_memory(report: Report) -> None:
    report.number("before", 3)
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    hoard = []
    while True:
        hoard.append(bytearray(256 << 20))


def refuses(report: Report) -> None:
    raise Refused("this card has no such unit")


def leaves_silently(report: Report) -> None:
    os._exit(0)


def _stand_in() -> Any:
    from a3po_megatron.ranks.backend import CPU

    return dataclasses.replace(CPU, spec="te")


def oracle_on_stand_in(report: Report) -> None:
    from tools.bringup.rank import alone, make_model
    from tools.bringup.te import against_oracle

    against_oracle(report, alone(_stand_in()), make_model())


def fp8_on_stand_in(report: Report) -> None:
    from tools.bringup.te import fp8_on

    fp8_on(report, _stand_in())


def traps_on_stand_in(report: Report) -> None:
    from tools.bringup import traps

    with mock.patch.object(traps, "LENGTHS", traps.LENGTHS[:5]):  # of two micro-batches
        traps.traps_on(report, _stand_in())


def alignment_on_stand_in(report: Report) -> None:
    from tools.bringup.alignment import alignment_on

    alignment_on(report, _stand_in())


def learner_leaves_on_cpu(report: Report) -> None:
    import torch

    from a3po_megatron.ranks.backend import CPU
    from tools.bringup import rank
    from tools.bringup.arena import whole_learner

    cluster, folder = rank.alone(CPU), rank.make_model()
    with mock.patch.object(rank, "LENGTHS", rank.LENGTHS[:3]):  # to multiply in bf16 takes a CPU long
        whole_learner(report, lambda: rank.make_learner(cluster, folder), torch.device("cpu"), cycles=3)


def engine_cycles_on_cpu(report: Report) -> None:
    from a3po_megatron.ranks.backend import CPU
    from tools.bringup.engine import cycles_on

    cycles_on(report, CPU, cycles=3)


def mismatch_on_cpu(report: Report) -> None:
    from a3po_megatron.ranks.backend import CPU
    from tools.bringup.engine import mismatch_on

    mismatch_on(report, CPU, ["bf16"], None, count=12)  # to multiply in bf16 takes a CPU long


def standalone_on_cpu(report: Report) -> None:
    from a3po_megatron.ranks.backend import CPU
    from tools.bringup.engine import against_standalone_on
    from tools.bringup.rank import TINY

    given = CPU.engine_args | {"kv_cache_memory_bytes": 64 << 20, "max_num_batched_tokens": 8192}
    # Heads of no multiple of 32: with others vLLM's attention uses AMX where the CPU has it, of which a vLLM of its own
    # dies (a3po_megatron/compat/vllm.py, ask_for_tiles).
    against_standalone_on(report, CPU, TINY | {"head_dim": 80}, **given)


def engine_steps_before_anything_else_on_cpu(report: Report) -> None:
    import torch

    from a3po_megatron.model.read import read_facts
    from a3po_megatron.ranks.backend import CPU
    from a3po_megatron.rollout.vllm_engine import VllmEngine
    from tools.bringup.colocated import LENGTHS, requests_of
    from tools.bringup.rank import TINY, alone, config, make_model

    alone(CPU)
    folder = make_model()
    options = config(folder, CPU, rollout=LENGTHS).rollout
    engine = VllmEngine(folder, read_facts(folder), (), options, torch.bfloat16, CPU)
    # One short prompt: with more tokens at once oneDNN asks for AMX just before the attention needs it.
    found = engine.probe(requests_of(TINY["vocab_size"], 1), max_tokens=4)
    report.holds("four tokens each", all(len(completion.tokens) == 4 for completion in found))


def one_rank(report: Report, folder: Path) -> None:
    from a3po_megatron.ranks.backend import CPU
    from tools.bringup.layouts import one_rank_on

    one_rank_on(CPU, folder, "bf16", ["dense"])


def two_ranks(report: Report, folder: Path) -> None:
    from a3po_megatron.ranks.backend import CPU
    from tools.bringup import layouts, nodes

    nodes.reach_on(report, CPU, (1 << 16,))
    layouts.several_on(report, CPU, folder, "bf16", layouts.LAYOUTS[2][:2])


def layouts_on_cpu(report: Report) -> None:
    from tools.bringup.layouts import against_one

    against_one(report, 2, "tests.harness.bringup_experiments:one_rank", "tests.harness.bringup_experiments:two_ranks")


def saves_and_dies(report: Report, folder: Path) -> None:
    from a3po_megatron.ranks.backend import CPU
    from tools.bringup import canary, saving
    from tools.bringup.colocated import colocate

    both = colocate(folder / "model", CPU, sections=saving.SECTIONS | {"publish": canary.SECTIONS["publish"]})
    canary.distribution_on(report, both, publishes=2, count=4)
    saving.first_on(report, folder, both)


def resumes(report: Report, folder: Path) -> None:
    from a3po_megatron.ranks.backend import CPU
    from tools.bringup.saving import second_on

    second_on(report, CPU, folder)


def saving_on_cpu(report: Report) -> None:
    from tools.bringup.saving import saving

    saving(report, "tests.harness.bringup_experiments:saves_and_dies", "tests.harness.bringup_experiments:resumes")


def _head(report: Report, folder: Path, head: str) -> None:
    from a3po_megatron.ranks.backend import CPU
    from tools.bringup.logits import arm_on

    arm_on(report, CPU, folder, head)


def float32_head(report: Report, folder: Path) -> None:
    _head(report, folder, "float32")


def bf16_head(report: Report, folder: Path) -> None:
    _head(report, folder, "bf16")


def heads_on_cpu(report: Report) -> None:
    from tools.bringup.logits import LOGITS, compare
    from tools.bringup.rank import make_model
    from tools.bringup.ranks import together

    folder = Path(os.environ["TMPDIR"])
    make_model(folder=folder / "model", logits=LOGITS)
    for name in ("float32_head", "bf16_head"):
        together(report, f"tests.harness.bringup_experiments:{name}", 1, folder, 100)
    compare(report, folder)


def holders_on_cpu(report: Report) -> None:
    from a3po_megatron.ranks.backend import CPU
    from tools.bringup.asleep import holders_on
    from tools.bringup.rank import make_model

    folder = Path(os.environ["TMPDIR"])
    make_model(folder=folder / "model")
    holders_on(report, CPU, folder, "eager")


def one_of_two(report: Report, folder: Path) -> None:
    from a3po_megatron.ranks.backend import CPU
    from tools.bringup.several import engines_on

    engines_on(report, CPU, folder, 2, cycles=1)


def engine_over_two_ranks_on_cpu(report: Report) -> None:
    from tools.bringup.several import start

    start(report, "tests.harness.bringup_experiments:one_of_two")


def dies_alone(report: Report, folder: Path) -> None:
    report.holds("one comes so far", os.environ["RANK"] == "0")
    if os.environ["RANK"] == "1":
        raise ValueError("one rank of two")
    time.sleep(600)


def a_rank_dies(report: Report) -> None:
    from tools.bringup.ranks import together

    together(report, "tests.harness.bringup_experiments:dies_alone", 2, Path(os.environ["TMPDIR"]), 60, megatron=False)

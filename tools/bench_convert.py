"""How fast checkpoints convert: against copying the same bytes, and against mbridge, which loads and saves them.

    python tools/bench_convert.py                        makes a model of 2 GB in a temporary folder and measures
    python tools/bench_convert.py --mbridge DIR          after `pip install --no-deps --target DIR mbridge==0.15.1`

Every round runs all arms once, in turn, so that a slow moment of the machine meets them all alike; the smallest time of
each arm counts, and a first round, which pays for memory that the file cache never had, does not. Every arm ends when
its bytes are on the disk (fsync). Prints a table with ratios; --json keeps it.

    copy            reads the safetensors files and writes them again: what the disk and the memory allow
    import, export  `a3po convert`, both ways, one process
    load + save     into a model in memory and out of it again, as mbridge does: load_shards and export_stream
    mbridge         load_weights and save_weights of the same model, tensor parallel 1 (its own process; start-up aside)
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from a3po_megatron.convert.convert import ExportOptions, export_checkpoint, import_checkpoint
from a3po_megatron.files.safetensors import bytes_of, write_file
from a3po_megatron.model.cut import hf_tensors, pieces
from a3po_megatron.model.facts import ModelFacts
from a3po_megatron.model.layout import Layout, Place
from a3po_megatron.model.read import read_facts
from a3po_megatron.weights.export import export_stream
from a3po_megatron.weights.load import load_shards
from a3po_megatron.weights.route import plan
from a3po_megatron.weights.transfer import Groups, gather

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 65536,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "dtype": "bfloat16",
    "eos_token_id": 1,
}


def make_model(folder: Path, layers: int) -> ModelFacts:
    """Random bf16 weights: every bit pattern of the mantissa, no special values."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    facts = read_facts(folder)
    shapes = hf_tensors(facts)
    generator = torch.Generator().manual_seed(0)
    parts = (torch.randn(shape, generator=generator, dtype=torch.float32).bfloat16() for shape in shapes.values())
    write_file(folder, "model.safetensors", shapes, dict.fromkeys(shapes, torch.bfloat16), parts)
    return facts


def sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def copy(source: Path, target: Path) -> None:
    target.mkdir()
    part = torch.empty(1 << 20, dtype=torch.uint8)
    for path in source.glob("*.safetensors"):
        with path.open("rb", buffering=0) as reading, (target / path.name).open("wb", buffering=0) as writing:
            while count := reading.readinto(bytes_of(part)):
                left = bytes_of(part)[:count]
                while left:
                    left = left[writing.write(left) :]
    sync(target)


def silent(total: int) -> Callable[[int], None]:
    return lambda amount: None


def load_and_save(source: Path, target: Path, facts: ModelFacts) -> None:
    layout = Layout()
    mine = pieces(facts, layout, Place())
    shapes: dict[tuple[int, str], list[int]] = {}
    for piece in mine:
        shape = shapes.setdefault(piece.key, list(piece.shape))
        shape[piece.dim] = max(shape[piece.dim] if piece.offset else 0, piece.offset + piece.length)
    parameters = {key: torch.empty(shape, dtype=torch.bfloat16) for key, shape in shapes.items()}
    load_shards(source, facts, mine, parameters)
    whole = plan(layout, [mine], list(hf_tensors(facts)), 256 << 20, 2, [(0, 0)])
    stream = itertools.chain.from_iterable(gather(whole, parameters, Groups(0, 0), torch.bfloat16))
    export_stream(stream, whole.tensors(0), torch.bfloat16, source, target)


def peer(source: Path, target: Path) -> None:
    """mbridge on Megatron's local spec: prints the seconds of loading plus saving."""
    from a3po_megatron import compat

    compat.prepare()
    from mbridge import AutoBridge

    from a3po_megatron.config import ClusterOptions, MegatronOptions, ModelSettings, ParallelOptions
    from a3po_megatron.launch.local import free_port
    from a3po_megatron.model.build import build_model, transformer_config
    from a3po_megatron.ranks.groups import connect

    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    connect(ParallelOptions(), ClusterOptions(), 1, 0)
    facts = read_facts(source)
    options = ModelSettings(path=str(source), dtype="bfloat16")
    model = build_model(facts, Layout(), transformer_config(facts, ParallelOptions(), options, MegatronOptions()))
    # mbridge knows Transformer Engine's names: the model's own, seen through them.
    bridge = AutoBridge.from_pretrained(str(source))
    names = {
        "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
        "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    }
    plain = model[0].state_dict

    def state_dict(*args: object, **kwargs: object) -> dict[str, torch.Tensor]:
        found = {}
        for name, value in plain(*args, **kwargs).items():
            if "_extra_state" in name:
                continue
            for ours, theirs in names.items():
                name = name.replace(ours, theirs) if ".layers." in name else name
            found[name] = value
        return found

    model[0].state_dict = state_dict  # type: ignore[method-assign]
    model[0].named_parameters = lambda *a, **k: state_dict(keep_vars=True).items()  # type: ignore[method-assign]
    start = time.perf_counter()
    with torch.no_grad():
        bridge.load_weights(model, str(source))
        bridge.save_weights(model, str(target))
    sync(target)
    print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)
    os._exit(0)


def run_peer(source: Path, target: Path, mbridge: Path) -> float:
    words = [sys.executable, __file__, "--peer", str(source), str(target)]
    environment = os.environ | {"PYTHONPATH": str(mbridge), "TORCHDYNAMO_DISABLE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ended = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600)
    if ended.returncode:
        raise SystemExit(f"mbridge failed:\n{ended.stderr[-3000:]}")
    return float(json.loads(ended.stdout.strip().splitlines()[-1])["seconds"])


def timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=20, help="20 make 2.3 GB")
    parser.add_argument("--rounds", type=int, default=3, choices=range(1, 100), metavar="N")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--bucket-bytes", type=int, default=16 << 20)
    parser.add_argument("--mbridge", type=Path, help="folder with mbridge 0.15.1; without it that arm is left out")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peer", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peer:
        peer(*options.peer)
    with tempfile.TemporaryDirectory(prefix="bench-convert-") as place:
        folder = Path(place)
        source = folder / "hf"
        facts = make_model(source, options.layers)
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        import_checkpoint(source, folder / "checkpoint", 1, 64 << 20, silent)
        target, workers, bucket = folder / "out", options.workers, options.bucket_bytes
        arms: dict[str, Callable[[], float]] = {
            "copy": lambda: timed(lambda: copy(source, target)),
            "import": lambda: timed(lambda: void(import_checkpoint(source, target, workers, bucket, silent))),
            "export": lambda: timed(
                lambda: void(export_checkpoint(folder / "checkpoint", target, ExportOptions(workers, bucket), silent))
            ),
            "load + save": lambda: timed(lambda: load_and_save(source, target, facts)),
        }
        if options.mbridge:
            arms["mbridge load + save"] = lambda: run_peer(source, target, options.mbridge)
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for number in range(options.rounds + 1):
            for name, arm in arms.items():
                took = arm()
                shutil.rmtree(target)
                if number:
                    seconds[name].append(took)
                print(f"round {number} of {options.rounds}: {name} {took:.2f} s", file=sys.stderr)
    best = {name: min(values) for name, values in seconds.items()}
    report = {
        "bytes": size,
        "seconds": seconds,
        "best": best,
        "of copy": {n: s / best["copy"] for n, s in best.items()},
    }
    both = best["import"] + best["export"]
    print(f"\n{size / 1e9:.2f} GB, smallest of {options.rounds} rounds, {workers} worker{'s' * (workers > 1)}\n")
    print(f"{'arm':24}{'seconds':>9}{'GB/s':>8}{'of copy':>10}")
    for name, value in best.items():
        print(f"{name:24}{value:9.2f}{size / value / 1e9:8.2f}{value / best['copy']:9.2f}×")
    if options.mbridge:
        theirs = best["mbridge load + save"]
        report["mbridge of ours"] = {"load + save": theirs / best["load + save"], "import + export": theirs / both}
        print(f"\nmbridge takes {theirs / both:.2f}× as long as import and export together,")
        print(f"and {theirs / best['load + save']:.2f}× as long as load + save, which does just what it does")
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def void(_: object) -> None:
    """A result that nobody asked for."""


if __name__ == "__main__":
    main()

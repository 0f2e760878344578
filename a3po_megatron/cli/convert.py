"""`a3po convert`: import, export, verify."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import RequestError
from .arguments import path_argument

if TYPE_CHECKING:
    from ..convert.convert import Converted

convert_app = typer.Typer(no_args_is_help=True, help="Between HF checkpoints and Megatron's (torch_dist), bit for bit.")

Workers = Annotated[int, typer.Option(min=1, help="Processes that read and write side by side, each its own files.")]
BucketBytes = Annotated[int, typer.Option(min=1 << 12, help="What a process holds of the weights at once.")]


@convert_app.command("import")
def import_(
    hf_dir: Annotated[Path, path_argument(help="Folder of an HF checkpoint: config.json and safetensors.")],
    ckpt_dir: Annotated[Path, path_argument(help="A new folder for the Megatron checkpoint.")],
    workers: Workers = 1,
    bucket_bytes: BucketBytes = 16 << 20,
) -> None:
    """HF → a Megatron checkpoint that loads at any layout."""
    from ..convert.convert import import_checkpoint

    with _progress("import") as progress:
        start = time.perf_counter()
        done = import_checkpoint(hf_dir, ckpt_dir, workers, bucket_bytes, progress)
    _say("imported", done, time.perf_counter() - start, ckpt_dir)


@convert_app.command()
def export(
    source: Annotated[Path, path_argument(metavar="CKPT_OR_RUN_DIR", help="A Megatron checkpoint, or a run.")],
    hf_dir: Annotated[Path, path_argument(help="A new folder for the HF checkpoint.")],
    workers: Workers = 1,
    bucket_bytes: BucketBytes = 16 << 20,
    shard_bytes: Annotated[int, typer.Option(min=1, help="Largest safetensors file.")] = 5_000_000_000,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16. Default: as the weights are stored.")] = None,
    drop_padding: Annotated[
        bool, typer.Option("--drop-padding", help="Leave out rows beyond the vocabulary even if they hold weights.")
    ] = False,
) -> None:
    """A Megatron checkpoint (of a run: its newest) → HF: safetensors, index, configuration, tokenizer."""
    import torch

    from ..convert.convert import ExportOptions, export_checkpoint, newest_checkpoint

    dtypes = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in dtypes:
        raise RequestError(f"--dtype {dtype}: expected float32 or bfloat16")
    options = ExportOptions(workers, bucket_bytes, shard_bytes, dtypes[dtype], drop_padding)
    with _progress("export") as progress:
        start = time.perf_counter()
        done = export_checkpoint(newest_checkpoint(source), hf_dir, options, progress)
    _say("exported", done, time.perf_counter() - start, hf_dir)


@convert_app.command()
def verify(
    hf_dir: Annotated[Path, path_argument(help="Folder of an HF checkpoint.")],
    tensor: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks.")] = 1,
    pipeline: Annotated[int, typer.Option(min=1, help="Pipeline ranks.")] = 1,
    virtual: Annotated[int, typer.Option(min=1, help="Model chunks per pipeline rank.")] = 1,
    expert: Annotated[int, typer.Option(min=1, help="Expert-parallel ranks.")] = 1,
    expert_tensor: Annotated[
        int | None, typer.Option(min=1, help="Tensor-parallel ranks of an expert. Default: as --tensor.")
    ] = None,
    scheme: Annotated[str, typer.Option(help="Names of Megatron's spec: local (CPU) or te (GPU).")] = "local",
    show: Annotated[str | None, typer.Option(metavar="HF_TENSOR", help="Say where each of its rows goes.")] = None,
) -> None:
    """Prove, in this process, that a checkpoint survives a layout bit for bit, and say where each byte goes.

    Holds the model's largest parameter a few times over.
    """
    from rich.console import Console

    from ..convert.verify import verify_layout
    from ..launch.tables import layout_tables
    from ..model.layout import Layout

    if scheme not in ("local", "te"):
        raise RequestError(f"--scheme {scheme}: expected local or te")
    layout = Layout(tensor, pipeline, virtual, expert, expert_tensor, scheme=scheme)  # type: ignore[arg-type]
    with _progress("verify") as progress:
        try:
            proof = verify_layout(hf_dir, layout, progress, show)
        except RequestError as error:  # a layout's options have other names in a configuration
            words = str(error).replace("parallel.expert_tensor", "--expert-tensor").replace("parallel.", "--")
            raise RequestError(words) from error
    console = Console(highlight=False)
    for table in layout_tables(proof):
        console.print(table)
    print(f"{proof.tensors} tensors, {proof.bytes:,} bytes: every bit survives this layout")


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[[int], Callable[[int], None]]]:
    """A bar of bytes on a terminal, nothing elsewhere: the last line says it all. SIGTERM ends the work tidily."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    console = Console()
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:

        def begin(total: int) -> Callable[[int], None]:
            task = bar.add_task(what, total=total)
            return lambda amount: bar.advance(task, amount)

        yield begin


def _say(what: str, done: Converted, seconds: float, folder: Path) -> None:
    files = f"{done.files} file{'s' * (done.files > 1)}"
    speed = done.bytes / max(seconds, 1e-9) / 1e9
    size = f"{done.bytes / 1e9:.3f} GB in {seconds:.1f} s ({speed:.2f} GB/s)"
    print(f"{what} {done.tensors} tensors, {size}, {files}: {folder}")
    for remark in done.remarks:
        print(f"warning: {remark}", file=sys.stderr)

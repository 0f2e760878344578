"""The command line: parse, call, print. Imports nothing heavy until a command needs it."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .errors import A3POError, RequestError

if TYPE_CHECKING:
    from .weights.convert import Converted

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A3PO reinforcement learning from verifiable rewards, on Megatron-Core and vLLM.",
)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A configuration file, such as configs/demo.yaml.")],
    run_dir: Annotated[Path | None, typer.Option(help="Default: runs/<name>-<date>-<short id>.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override an option; repeatable.")
    ] = None,
) -> None:
    """Train on this machine, with as many ranks as the layout needs."""
    started = time.time()
    from .config import load_config
    from .launch.check import check_request
    from .launch.folder import default_folder, make_folder
    from .launch.local import rendezvous_port, run_local
    from .report.page import write_report

    settings = load_config(config, set_ or [])
    rendezvous_port(settings.cluster.port)
    check_request(settings)
    folder = run_dir or default_folder(settings.name)
    with make_folder(folder, settings, sys.argv):
        ranks = settings.parallel.ranks()
        if (folder / "before-1").exists():
            typer.echo(f"{folder}: an unfinished run starts again from step 0; what it had written is in before-*/")
        typer.echo(f"{settings.name}: starting {ranks} rank{'s' * (ranks > 1)} (run folder {folder})")
        run_local(folder, settings, started)
        page = write_report([folder], None)
    typer.echo(f"run folder: {folder}\nreport:     {page}")


@app.command()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(help="One or more run folders to compare.")],
    out: Annotated[Path | None, typer.Option(help="Default: report.html in the first run folder.")] = None,
) -> None:
    """Compare runs in one self-contained HTML page, with a rollout viewer."""
    from .report.page import write_report

    typer.echo(f"report: {write_report(run_dirs, out)}")


@app.command()
def doctor() -> None:
    """Print what is installed, what is missing and what this machine can do."""
    from .launch.doctor import examine

    if not examine():
        raise typer.Exit(1)


convert_app = typer.Typer(no_args_is_help=True, help="Between HF checkpoints and Megatron's (torch_dist), bit for bit.")
app.add_typer(convert_app, name="convert")

Workers = Annotated[int, typer.Option(min=1, help="Processes that read and write side by side.")]
BucketBytes = Annotated[int, typer.Option(min=1 << 12, help="What a process holds of the weights at once.")]


@convert_app.command("import")
def import_(
    hf_dir: Annotated[Path, typer.Argument(help="Folder of an HF checkpoint: config.json and safetensors.")],
    ckpt_dir: Annotated[Path, typer.Argument(help="A new folder for the Megatron checkpoint.")],
    workers: Workers = 1,
    bucket_bytes: BucketBytes = 16 << 20,
) -> None:
    """HF → a Megatron checkpoint that loads at any layout."""
    from .model.files import has_tokenizer
    from .weights.convert import import_checkpoint

    with _progress("import") as progress:
        start = time.perf_counter()
        done = import_checkpoint(hf_dir, ckpt_dir, workers, bucket_bytes, progress)
    _say("imported", done, time.perf_counter() - start, ckpt_dir)
    if not has_tokenizer(hf_dir):
        _warn_of_tokenizer(hf_dir)


@convert_app.command()
def export(
    source: Annotated[Path, typer.Argument(metavar="CKPT_OR_RUN_DIR", help="A Megatron checkpoint, or a run.")],
    hf_dir: Annotated[Path, typer.Argument(help="A new folder for the HF checkpoint.")],
    workers: Workers = 1,
    bucket_bytes: BucketBytes = 16 << 20,
    shard_bytes: Annotated[int, typer.Option(min=1, help="Largest safetensors file.")] = 5_000_000_000,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16. Default: as the weights are stored.")] = None,
) -> None:
    """A Megatron checkpoint (of a run: its newest) → HF: safetensors, index, configuration, tokenizer."""
    import torch

    from .model.files import HF, has_tokenizer
    from .weights.convert import export_checkpoint, newest_checkpoint

    dtypes = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in dtypes:
        raise RequestError(f"--dtype {dtype}: expected float32 or bfloat16")
    checkpoint = newest_checkpoint(source)
    with _progress("export") as progress:
        start = time.perf_counter()
        done = export_checkpoint(checkpoint, hf_dir, workers, bucket_bytes, shard_bytes, dtypes[dtype], progress)
    _say("exported", done, time.perf_counter() - start, hf_dir)
    if not has_tokenizer(checkpoint / HF):
        _warn_of_tokenizer(checkpoint / HF)


@convert_app.command()
def verify(
    hf_dir: Annotated[Path, typer.Argument(help="Folder of an HF checkpoint.")],
    tensor: Annotated[int, typer.Option(min=1)] = 1,
    pipeline: Annotated[int, typer.Option(min=1)] = 1,
    virtual: Annotated[int, typer.Option(min=1, help="Model chunks per pipeline rank.")] = 1,
    expert: Annotated[int, typer.Option(min=1)] = 1,
    expert_tensor: Annotated[int | None, typer.Option(min=1, help="Default: as --tensor.")] = None,
    scheme: Annotated[str, typer.Option(help="Names of Megatron's spec: local (CPU) or te (GPU).")] = "local",
    show: Annotated[str | None, typer.Option(metavar="HF_TENSOR", help="Say where each of its rows goes.")] = None,
) -> None:
    """Prove, in this process, that a checkpoint survives a layout bit for bit, and say where each byte goes."""
    from rich.console import Console

    from .model.layout import Layout
    from .weights.verify import tables, verify_layout

    if scheme not in ("local", "te"):
        raise RequestError(f"--scheme {scheme}: expected local or te")
    layout = Layout(tensor, pipeline, virtual, expert, expert_tensor, scheme=scheme)  # type: ignore[arg-type]
    with _progress("verify") as progress:
        found = verify_layout(hf_dir, layout, progress, show)
    console = Console(highlight=False)
    for table in tables(found):
        console.print(table)
    typer.echo(f"{found.tensors} tensors, {found.bytes:,} bytes: every bit survives this layout")


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[[int], Callable[[int], None]]]:
    """A bar of bytes on a terminal, nothing elsewhere: the last line says it all."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

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
    typer.echo(f"{what} {done.tensors} tensors, {size}, {files}: {folder}")


def _warn_of_tokenizer(folder: Path) -> None:
    typer.echo(f"warning: {folder} holds no tokenizer files: the converted folder has none either", err=True)


def main() -> None:
    """The `a3po` program. Our errors are one message and an exit code; anything else is a bug, with its traceback."""
    try:
        app()
    except A3POError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()

"""The command line: parse, call, print. Imports nothing heavy until a command needs it."""

from __future__ import annotations

import codecs
import contextlib
import functools
import io
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .errors import A3POError, RequestError

if TYPE_CHECKING:
    from .convert.convert import Converted

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def path(text: str) -> Path:
    """An argument: ~ and $NAME as in a configuration."""
    from .config.paths import expanded

    return Path(expanded(text, "the command line"))


_path_argument = functools.partial(typer.Argument, parser=path)
_path_option = functools.partial(typer.Option, parser=path)
RunDir = Annotated[Path | None, _path_option(help="Default: runs/<name>-<date>-<short id>.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override an option; repeatable.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        print(f"a3po-megatron {__version__}")
        raise typer.Exit()


Version = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and nothing else.")
]


@app.callback()
def a3po(version: Version = False) -> None:
    """A3PO reinforcement learning from verifiable rewards, on Megatron-Core and vLLM."""


@app.command()
def train(
    config: Annotated[Path, _path_argument(help="A configuration file, such as configs/demo.yaml.")],
    run_dir: RunDir = None,
    set_: Overrides = None,
) -> None:
    """Train on this machine, with as many ranks as the layout needs."""
    started = time.time()
    from .launch.signals import Signals

    signals = Signals()  # before the imports that take seconds
    from .config import load_config

    settings = load_config(config, set_ or [])
    from .launch.check import check_machine, check_request
    from .launch.folder import default_folder, prepare_folder
    from .launch.local import rendezvous, run_local
    from .ranks.topology import topology_of
    from .report.page import write_report

    rendezvous(settings.cluster.port).close()  # a port that is taken is named before anything is made
    backend = check_machine(settings)
    settings = settings.on(backend.device)
    for remark in check_request(settings, backend):
        print(f"data: {remark}")
    folder = run_dir or default_folder(settings.name)
    with prepare_folder(folder, settings) as lock:
        ranks = topology_of(settings.parallel, settings.rollout.tensor).world
        print(f"{settings.name}: starting {ranks} rank{'s' * (ranks > 1)} (run folder {folder})")
        run_local(folder, settings, started, lock, signals)
        signals.restore()
        page = write_report([folder], None)
    print(f"run folder: {folder}\nreport:     {page}")


@app.command()
def submit(
    config: Annotated[Path, _path_argument(help="A configuration file with a `slurm` section.")],
    run_dir: RunDir = None,
    set_: Overrides = None,
    sweep: Annotated[
        list[str] | None, typer.Option(metavar="SECTION.KEY=A,B,C", help="A run for each value; repeatable: all pairs.")
    ] = None,
    export: Annotated[
        Path | None, _path_option(help="Export the weights there as an HF folder when it is done.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be submitted, and do nothing.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Make the run folder and its script; do not submit.")] = False,
) -> None:
    """Train through Slurm: the same run, queued, and back by itself after an interruption."""
    from .config import load_config
    from .launch import slurm
    from .launch.folder import default_folder

    overrides = slurm.swept(sweep or [])
    configs = [load_config(config, [*(set_ or []), *each]) for each in overrides]
    folder = (run_dir or default_folder(configs[0].name)).resolve()
    if export is not None and (sweep or configs[0].slurm.resume == "chain"):
        raise RequestError("--export waits for one job: not with --sweep or slurm.resume chain")
    plan = slurm.plan(configs, folder, bool(sweep))
    from .launch.check import check_request
    from .ranks.backend import backend_of

    found = [remark for each in plan.configs for remark in check_request(each, backend_of(str(each.cluster.device)))]
    for remark in dict.fromkeys(found):
        print(f"data: {remark}", file=sys.stderr)
    if dry_run:
        sys.stdout.buffer.write(plan.script.encode())  # a file for sbatch, whatever the terminal knows
        return
    if not write:
        for remark in slurm.check_cluster(plan, export):
            print(f"warning: {remark}", file=sys.stderr)
    slurm.write(plan, overrides)
    if write:
        print(f"made, not submitted: {folder / slurm.SCRIPT}")
        return
    numbers = slurm.submit(plan, export)
    print(f"submitted job {numbers[0]}: {folder}")
    if export is not None:
        print(f"submitted job {numbers[1]}, after it: export to {export}")


@app.command()
def report(
    run_dirs: Annotated[list[Path], _path_argument(help="One or more run folders to compare.")],
    out: Annotated[Path | None, _path_option(help="Default: report.html in the first run folder.")] = None,
) -> None:
    """Compare runs in one self-contained HTML page, with a rollout viewer."""
    from .report.page import write_report

    print(f"report: {write_report(run_dirs, out)}")


@app.command()
def status(run_dir: Annotated[Path, _path_argument(help="A run folder, or one of a sweep.")]) -> None:
    """How far a run is, whether it lives, and what it waits for; changes nothing."""
    from .launch.status import status

    for name, text in status(run_dir):
        print(f"{name:<12}{text}")


@app.command()
def options(section: Annotated[str | None, typer.Argument(help="Of one section only.")] = None) -> None:
    """Every option of a configuration: its type, its default and what it means."""
    from .config.describe import options

    lines = options(section)
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    for line in lines:
        print("  ".join([*(f"{text:<{width}}" for text, width in zip(line, widths, strict=False)), line.meaning]))


@app.command()
def doctor(
    config: Annotated[Path | None, _path_argument(help="The run that is to start here: what it needs counts.")] = None,
    set_: Overrides = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Look at the CUDA path, also where this one is for CPUs.")] = False,
) -> None:
    """Print what is installed, what is missing and what this machine can do."""
    from .config import load_config
    from .launch.doctor.examine import examine

    quantized = config is not None and load_config(config, set_ or []).rollout.quantization is not None
    if not examine(gpu, quantized):
        raise typer.Exit(RequestError.exit_code)


data_app = typer.Typer(no_args_is_help=True, help="Looks at data.")
app.add_typer(data_app, name="data")


@data_app.command()
def check(
    files: Annotated[list[Path], _path_argument(help="Files or folders of prompts: one data set.")],
    model: Annotated[
        Path | None, _path_option(help="Folder of a model: its tokenizer counts tokens, its chat template renders.")
    ] = None,
    benchmark: Annotated[
        list[Path] | None, _path_option(help="A file whose problems should not be among the prompts; repeatable.")
    ] = None,
    set_: Overrides = None,
) -> None:
    """What a run would see of data: counts, lengths, duplicates, conflicts, gold answers, prompts, overlap.

    Exit code 2 where a run would refuse it.
    """
    from .config import data_options
    from .launch.data_check import data_check

    for line in data_check(data_options([str(path) for path in files], set_ or []), model, benchmark or []):
        print(line)


convert_app = typer.Typer(no_args_is_help=True, help="Between HF checkpoints and Megatron's (torch_dist), bit for bit.")
app.add_typer(convert_app, name="convert")

Workers = Annotated[int, typer.Option(min=1, help="Processes that read and write side by side, each its own files.")]
BucketBytes = Annotated[int, typer.Option(min=1 << 12, help="What a process holds of the weights at once.")]


@convert_app.command("import")
def import_(
    hf_dir: Annotated[Path, _path_argument(help="Folder of an HF checkpoint: config.json and safetensors.")],
    ckpt_dir: Annotated[Path, _path_argument(help="A new folder for the Megatron checkpoint.")],
    workers: Workers = 1,
    bucket_bytes: BucketBytes = 16 << 20,
) -> None:
    """HF → a Megatron checkpoint that loads at any layout."""
    from .convert.convert import import_checkpoint

    with _progress("import") as progress:
        start = time.perf_counter()
        done = import_checkpoint(hf_dir, ckpt_dir, workers, bucket_bytes, progress)
    _say("imported", done, time.perf_counter() - start, ckpt_dir)


@convert_app.command()
def export(
    source: Annotated[Path, _path_argument(metavar="CKPT_OR_RUN_DIR", help="A Megatron checkpoint, or a run.")],
    hf_dir: Annotated[Path, _path_argument(help="A new folder for the HF checkpoint.")],
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

    from .convert.convert import ExportOptions, export_checkpoint, newest_checkpoint

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
    hf_dir: Annotated[Path, _path_argument(help="Folder of an HF checkpoint.")],
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

    from .convert.verify import verify_layout
    from .launch.tables import layout_tables
    from .model.layout import Layout

    if scheme not in ("local", "te"):
        raise RequestError(f"--scheme {scheme}: expected local or te")
    layout = Layout(tensor, pipeline, virtual, expert, expert_tensor, scheme=scheme)  # type: ignore[arg-type]
    with _progress("verify") as progress:
        try:
            found = verify_layout(hf_dir, layout, progress, show)
        except RequestError as error:  # a layout's options have other names in a configuration
            words = str(error).replace("parallel.expert_tensor", "--expert-tensor").replace("parallel.", "--")
            raise RequestError(words) from error
    console = Console(highlight=False)
    for table in layout_tables(found):
        console.print(table)
    print(f"{found.tensors} tensors, {found.bytes:,} bytes: every bit survives this layout")


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


# What a terminal that knows ASCII alone shows instead.
PLAIN = {"→": "->", "…": "...", "×": "x", "–": "-", "’": "'", "≥": ">=", "≤": "<=", "·": "-", "•": "*"}


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(PLAIN.get(sign, "?") for sign in error.object[error.start : error.end]), error.end


def main() -> None:
    """The `a3po` program. Our errors are one message and an exit code; anything else is a bug, with its traceback."""
    codecs.register_error("a3po", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="a3po")
    try:
        app()
    except A3POError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()

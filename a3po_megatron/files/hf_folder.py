"""Folders that hold a model in a form that is not read: which form it is, and what to do.

What is read: config.json, and safetensors with the hub's names of the tensors. Everything here only words a refusal.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..errors import RequestError

POINTER = b"version https://git-lfs.github.com/spec/"
_AS_SAFETENSORS = (
    "python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{folder}', dtype='auto')"
    ".save_pretrained('NEW')\", then the tokenizer's files beside them"
)
_MERGED = (
    "python -c \"from peft import AutoPeftModelForCausalLM as M; M.from_pretrained('{folder}', dtype='auto')"
    ".merge_and_unload().save_pretrained('NEW')\", then the base model's tokenizer beside them"
)
# What wrappers of modules put into the names of what they hold.
WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "_forward_module.": "Lightning or DeepSpeed",
    "base_model.model.": "PEFT",
    "module.": "DDP or DeepSpeed",
}
# What in a name tells of quantised weights.
QUANTISED = {
    (".qweight", ".qzeros", ".g_idx"): "GPTQ or AWQ",
    (".absmax", ".quant_map", ".SCB"): "bitsandbytes",
    ("_blocks", "_scales", ".weight_packed"): "mxfp4 or another packed format",
    (".weight_scale", ".weight_scale_inv"): "FP8",
}


def check_pointer(path: Path) -> None:
    """Raises RequestError for git-lfs' note in place of a file, and OSError where there is none at all."""
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise RequestError(
                f"{path}: it is a git-lfs pointer, not the file itself: run `git lfs install` and `git lfs pull` in "
                f"{path.parent}, or download the file again"
            )


def explain(path: Path, nor: str = "") -> RequestError:
    """The refusal of a folder without a file that must be there (`nor` another one), by what is there instead."""
    other = f", nor {nor}" if nor else ""
    return RequestError(f"{path}: there is no such file{other}: {_instead(path)}")


def _instead(path: Path) -> str:
    folder = path.parent
    names = sorted(path.name for path in folder.iterdir())

    def some(*patterns: str) -> str | None:
        return next((name for pattern in patterns for name in names if Path(name).match(pattern)), None)

    if name := some("adapter_config.json", "adapter_model.*"):
        merge = _MERGED.format(folder=folder)
        return f"it is an adapter ({name}), not a model: merge it into its base model first: {merge}"
    if path.name == "config.json" and some("model*.safetensors"):
        return "there are weights without it, and it says what model they are: download it too"
    if files := [name for name in names if name.endswith(".safetensors")]:
        if len(files) > 1:
            return f"there are {files[0]} and {len(files) - 1} more: without an index none of them counts: download it"
        return f"there is {files[0]}: rename it to model.safetensors if it is the whole model"
    if name := some("pytorch_model*.bin", "*.bin", "*.pth", "*.pt", "*.ckpt"):
        ours = name.startswith("pytorch_model")
        how = _AS_SAFETENSORS.format(folder=folder) if ours else "save_pretrained of the model that holds them"
        return (
            f"there are only pickled weights ({name}), which are not read, as they may run code: take the release in "
            f"safetensors; where you trust them, write them so: {how}"
        )
    if name := some("*.gguf"):
        return f"there are only GGUF weights ({name}): take the release in safetensors that they were made from"
    if below := next(iter(sorted(folder.glob("*/*.safetensors"))), None):
        return f"there are safetensors in a folder below it ({below}): config.json and weights must lie in one folder"
    if some("metadata.json"):
        return "it looks like a Megatron checkpoint (metadata.json), of which `a3po convert export` makes an HF folder"
    return "model.path must hold config.json and safetensors weights"


def other_names(folder: Path, expected: Iterable[str], found: Iterable[str]) -> RequestError | None:
    """The refusal of tensors whose names are the right ones in a wrapping, or those of quantised weights."""
    wanted = set(expected)
    module = next(iter(expected)).rpartition(".")[0].rpartition(".")[2]  # the first tensor is the best example
    strange = sorted(set(found) - wanted, key=lambda name: (module not in name, name))
    for endings, method in QUANTISED.items():
        if name := next((name for name in strange if name.endswith(endings)), None):
            return RequestError(
                f"{folder}: the checkpoint holds {name}, as weights quantised by {method} have it, but config.json has "
                "no quantization_config: take the release that is not quantised"
            )
    for name in strange:
        if (bare := _unwrapped(name)) != name and bare in wanted:
            mark = next(mark for mark in WRAPPERS if mark in name)
            return _renaming(folder, name, bare, f"{mark} of {WRAPPERS[mark]}", f"n.replace('{mark}', '')")
    for name in strange:
        for place in (0, *(number + 1 for number, letter in enumerate(name) if letter == ".")):
            prefix, rest = name[:place], name[place:]
            if rest in wanted:
                return _renaming(folder, name, rest, f"{prefix} in front", f"n.removeprefix('{prefix}')")
            if (whole := f"model.{rest}") in wanted:
                what = f"{prefix} for model." if prefix else "no model. in front"
                return _renaming(folder, name, whole, what, f"'model.' + n.removeprefix('{prefix}')")
    return None


def _unwrapped(name: str) -> str:
    for mark in WRAPPERS:
        name = name.replace(mark, "")
    return name


def _renaming(folder: Path, name: str, right: str, what: str, change: str) -> RequestError:
    return RequestError(
        f"{folder}: the tensors have other names than the hub's: {name} for {right} ({what}): save the inner model "
        "with save_pretrained, or rename them in every file, and in the index: python -c "
        f"\"from safetensors.torch import load_file, save_file; f = '{folder}/model.safetensors'; "
        f"save_file({{{change}: t for n, t in "
        "load_file(f).items()}, f, {'format': 'pt'})\""
    )

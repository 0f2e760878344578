"""Shapes of public models, by their names in other people's notes: from their config.json files."""

from __future__ import annotations

import re

from a3po_megatron.preflight.shape import Latent, Mixture, Shape

# hidden, ffn, layers, heads, KV heads, head dim, vocabulary, tied
_DENSE: dict[str, tuple[int, int, int, int, int, int, int, bool]] = {
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 64, 151936, True),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 128, 151936, True),
    "qwen2.5-3b": (2048, 11008, 36, 16, 2, 128, 151936, True),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 128, 152064, False),
    "qwen2.5-14b": (5120, 13824, 48, 40, 8, 128, 152064, False),
    "qwen2.5-32b": (5120, 27648, 64, 40, 8, 128, 152064, False),
    "qwen2.5-72b": (8192, 29568, 80, 64, 8, 128, 152064, False),
    "qwen3-0.6b": (1024, 3072, 28, 16, 8, 128, 151936, True),
    "qwen3-1.7b": (2048, 6144, 28, 16, 8, 128, 151936, True),
    "qwen3-4b": (2560, 9728, 36, 32, 8, 128, 151936, True),
    "qwen3-8b": (4096, 12288, 36, 32, 8, 128, 151936, False),
    "qwen3-14b": (5120, 17408, 40, 40, 8, 128, 151936, False),
    "qwen3-32b": (5120, 25600, 64, 64, 8, 128, 151936, False),
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 64, 128256, True),
    "llama-3.2-3b": (3072, 8192, 28, 24, 8, 128, 128256, True),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128, 128256, False),
    "llama-3-70b": (8192, 28672, 80, 64, 8, 128, 128256, False),
    "llama-3-405b": (16384, 53248, 126, 128, 8, 128, 128256, False),
    "llama-2-7b": (4096, 11008, 32, 32, 32, 128, 32000, False),
    "llama-2-70b": (8192, 28672, 80, 64, 8, 128, 32000, False),
}
_EXPERTS = {
    "qwen3-30b-a3b": ((2048, 6144, 48, 32, 4, 128, 151936, False), Mixture(128, 8, 768)),
    "qwen3-235b-a22b": ((4096, 12288, 94, 64, 4, 128, 151936, False), Mixture(128, 8, 1536)),
    "mixtral-8x7b": ((4096, 14336, 32, 32, 8, 128, 32000, False), Mixture(8, 2, 14336)),
}
_OTHER_NAMES = {"qwen2-": "qwen2.5-", "llama-3.1-": "llama-3-", "llama3.1-": "llama-3-", "llama3-": "llama-3-"}


def shape_of_name(name: str) -> Shape | None:
    """Returns the shape of the model that a note names, however it spells it; None: it is none of these."""
    wanted = name.lower().rsplit("/", 1)[-1].removeprefix("meta-").replace("llama3", "llama-3").replace("_", "-")
    for other, ours in _OTHER_NAMES.items():
        if wanted.startswith(other):
            wanted = ours + wanted.removeprefix(other)
    if wanted.startswith("deepseek-v3") or (wanted.startswith("deepseek-r1") and "distill" not in wanted):
        sizes, latent = (7168, 18432, 61, 128, 128, 128, 129280, False), Latent(1536, 512, 128, 64, 128)
        return _shape(sizes, Mixture(256, 8, 2048, 2048), latent=latent, dense_layers=3)
    wanted = re.sub(r"^deepseek-r1-distill-qwen-", "qwen2.5-", wanted)
    wanted = re.sub(r"^(qwen2\.5)-(math|coder)-", r"\1-", wanted)
    if wanted in ("14b dense", "14b-dense"):
        wanted = "qwen3-14b"
    for known, (sizes, mixture) in _EXPERTS.items():
        if wanted.startswith(known):
            return _shape(sizes, mixture)
    # The longest name first: qwen3-0.6b is no qwen3-0.
    for known in sorted(_DENSE, key=len, reverse=True):
        if wanted == known or wanted.startswith(f"{known}-"):
            return _shape(_DENSE[known], None)
    return None


def _shape(
    sizes: tuple[int, int, int, int, int, int, int, bool],
    mixture: Mixture | None,
    latent: Latent | None = None,
    dense_layers: int = 0,
) -> Shape:
    hidden, ffn, layers, heads, kv_heads, head_dim, vocab, tied = sizes
    return Shape(
        layers,
        hidden,
        heads,
        kv_heads,
        head_dim,
        ffn,
        vocab,
        tied=tied,
        mixture=mixture,
        latent=latent,
        dense_layers=dense_layers,
        fused_gate=True,  # Megatron's own default
    )

"""Small random HF checkpoints and rollouts for the tests, and the literal computations they are held against."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from a3po_megatron.algorithm.objectives.clipped import Clipped
from a3po_megatron.batch import Collected, Group, Prompt, Rollout, Segment, Verdict
from a3po_megatron.config import ClippedOptions, Config, Settings, TisOptions, resolve
from a3po_megatron.model.cut import Piece, pieces
from a3po_megatron.model.facts import ModelFacts
from a3po_megatron.model.layout import Layout
from a3po_megatron.model.read import read_facts
from a3po_megatron.ranks.backend import CPU, Backend

CLIPPED = Clipped(ClippedOptions(), TisOptions())  # the objective as it is by default
VOCAB = 67  # odd: every tensor-parallel size pads it

QWEN3 = {"head_dim": 32, "tie_word_embeddings": True}
MOE = {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
# Scaled from a context shorter than the tests' sequences, so that every branch of the scaling is used.
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
KINDS: dict[str, tuple[tuple[Any, Any], dict[str, Any]]] = {
    "qwen3": ((Qwen3ForCausalLM, Qwen3Config), QWEN3),
    "qwen2": ((Qwen2ForCausalLM, Qwen2Config), {"hidden_size": 128, "tie_word_embeddings": False}),
    "llama": ((LlamaForCausalLM, LlamaConfig), {"head_dim": 32, "tie_word_embeddings": False}),
    "llama31": (
        (LlamaForCausalLM, LlamaConfig),
        {"head_dim": 32, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 16}, "rope_theta": 500000.0},
    ),
    "qwen3_moe": ((Qwen3MoeForCausalLM, Qwen3MoeConfig), MOE | {"norm_topk_prob": True}),
    "qwen3_moe_raw": ((Qwen3MoeForCausalLM, Qwen3MoeConfig), MOE | {"norm_topk_prob": False}),
}
# Likewise; the second with a blend that does not end at whole dimensions, and an attention factor of its own.
YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16}
YARNS: dict[str, tuple[tuple[Any, Any], dict[str, Any]]] = {
    "yarn": ((Qwen3ForCausalLM, Qwen3Config), QWEN3 | {"rope_scaling": YARN | {"beta_fast": 4.0}}),
    "yarn_fractions": (
        (LlamaForCausalLM, LlamaConfig),
        {"head_dim": 32, "tie_word_embeddings": False, "rope_theta": 1e6}
        | {"rope_scaling": YARN | {"truncate": False, "attention_factor": 1.5, "beta_fast": 3, "beta_slow": 0.7}},
    ),
}


def make_checkpoint(folder: Path, kind: str = "qwen3", seed: int = 0, **changes: object) -> Path:
    """A random model of one of KINDS or YARNS, with all biases and norms off their defaults."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "eos_token_id": 1,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
    }
    made, kinds = (KINDS | YARNS)[kind]
    model_class, config_class = made
    model = model_class(config_class(**sizes | kinds | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    save_tokenizer(folder, model.config.vocab_size)
    return folder


def save_tokenizer(folder: Path, vocab: int) -> None:
    """One token a character, every id named."""
    names = ["<pad>", "<eos>", "<unk>", *"0123456789+-*=,:?{}\\ abcdefghijklmnopqrstuvwxyz"]
    names += [f"<{number}>" for number in range(len(names), vocab)]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names[:vocab])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained(folder)


def resolved(config: Config, backend: Backend = CPU) -> Settings:
    """What a run of its model does, on so few ranks as its layout needs."""
    return resolve(config, read_facts(config.model.path), backend)


def tensor_pieces(facts: ModelFacts, tensor: int, rank: int) -> tuple[Piece, ...]:
    """The map of one rank where only tensor parallelism splits the model."""
    layout = Layout(tensor=tensor)
    return pieces(facts, layout, layout.place(0, rank))


def make_collected(groups: int, size: int, seed: int = 0, vocab: int = VOCAB) -> Collected:
    """Random groups with spread, of very different lengths, as if all replicas' share were one."""
    draw = np.random.default_rng(seed)
    made = []
    for index in range(groups):
        tokens = tuple(int(t) for t in draw.integers(3, vocab, draw.integers(1, 9)))
        prompt = Prompt(f"p{index}", "", "", tokens, index)
        rollouts = []
        for sample in range(size):
            length = int(draw.choice([1, 2, 4, 5, 7, 23]))
            outcome = "correct" if sample == 0 or (sample > 1 and draw.random() < 0.5) else "wrong"
            rollouts.append(
                Rollout(
                    prompt=prompt,
                    sample=sample,
                    seed=0,
                    step=0,
                    tokens=draw.integers(0, vocab, length),
                    logprobs=draw.normal(-2, 1, length).astype(np.float32),
                    finish="stop",
                    text="",
                    segments=(Segment(length, 1),),
                    verdict=Verdict(outcome),
                    reward=float(outcome == "correct"),
                )
            )
        made.append(Group(prompt, rollouts))
    return Collected(groups=made, sampled=made, accepted=list(range(groups)), metrics={})


def trained_places(rollout: Rollout) -> list[int]:
    """Which of its tokens are trained on."""
    flags = [segment.trained for segment in rollout.segments for _ in range(segment.length)]
    return [place for place, trained in enumerate(flags) if trained]


def with_tools(collected: Collected) -> Collected:
    """The same rollouts, but that tools wrote some of their tokens: the first, some, the last, all, none."""
    for number, rollout in enumerate(r for group in collected.groups for r in group.rollouts):
        length = len(rollout.tokens)
        first, end = [(0, 1), (1, length // 2), (length - 1, length), (0, length), (0, 0)][number % 5]
        flags = [not first <= place < end for place in range(length)]
        rollout.segments = tuple(Segment(len(list(run)), 1, trained) for trained, run in itertools.groupby(flags))
    return collected


def hf_model(folder: Path, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    options = {"dtype": dtype, "attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def hf_tensors_of(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' parameters (or their gradients) under the names of the files: it packs the experts of a layer."""
    named: dict[str, torch.Tensor] = {}
    for name, value in values.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            named[name] = value
            continue
        prefix, _, kind = name.rpartition(".")
        for expert, matrix in enumerate(value):
            if kind == "down_proj":
                named[f"{prefix}.{expert}.down_proj.weight"] = matrix
            else:
                halves = matrix.chunk(2)
                named[f"{prefix}.{expert}.gate_proj.weight"], named[f"{prefix}.{expert}.up_proj.weight"] = halves
    return named


def hf_logprobs(
    model: torch.nn.Module, prompt: tuple[int, ...], response: np.ndarray, temperature: float
) -> torch.Tensor:
    """Log-probs of one response, by transformers and torch's log_softmax over the whole vocabulary."""
    tokens = torch.tensor([[*prompt, *response.tolist()]])
    logits = model(tokens).logits[0, len(prompt) - 1 : -1] / temperature
    return torch.log_softmax(logits, dim=-1).gather(1, tokens[0, len(prompt) :, None])[:, 0]


def literal_token_weights(
    logprobs: list[list[float]], positive: list[bool], step: int, fraction: float, rho: float, decay: float
) -> list[list[float]]:
    """The rule of the paper, one token at a time."""
    weight = max(rho - decay * step, 1.0)
    result = []
    for values, is_positive in zip(logprobs, positive, strict=True):
        count = max(1, math.floor(fraction * len(values)))
        order = sorted(range(len(values)), key=lambda t: (values[t] if is_positive else -values[t], t))
        chosen = set(order[:count])
        result.append([weight if t in chosen else 1.0 for t in range(len(values))])
    return result

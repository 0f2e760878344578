r"""Makes the tiny model of the demo and the tests: a Qwen3 of 0.3 M parameters that half knows the built-in arithmetic.

    python tools/make_tiny_model.py                  builds configs/models/tiny-arithmetic (some minutes on one core)
    python tools/make_tiny_model.py --check          builds it again elsewhere and compares every file, byte for byte

The recipe: a tokenizer whose every id has a name; a freshly initialised Qwen3; a supervised warm start on fresh
solutions of `a3po_megatron.data.arithmetic`, which contain errors on purpose, so that the policy is right on some of
its attempts and keeps entropy for reinforcement learning to work on; an evaluation; a checkpoint as transformers,
vLLM and the converter read it.

Invariants: the output is a function of the arguments, the library versions and the kind of CPU: one thread, seeds by
name, no clock. Two ids (`<pad>`, `<unk>`) are never a target; a penalty on their log-probability pushes them to where
they are practically never sampled.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: more threads would change the order of sums

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from a3po_megatron.data import arithmetic

PAD, EOS, UNK = 0, 1, 2
VOCABULARY = ["<pad>", "<eos>", "<unk>", arithmetic.BOX, *arithmetic.SYMBOLS]  # 24 ids: divides by 2, 4 and 8
NEVER_WRITTEN = [PAD, UNK]
CONTEXT = 256
DEFAULT_OUT = Path(__file__).resolve().parents[1] / "configs" / "models" / "tiny-arithmetic"
SHIPPED = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

BATCH, LEARNING_RATE, WARMUP = 64, 4e-3, 20
SILENCE, SILENT_LOGPROB = 0.1, -20.0  # weight of the penalty on NEVER_WRITTEN, and the log-probability where it ends
EVALUATION_SEED, EVALUATION_PROMPTS, EVALUATION_SAMPLES, MAX_TOKENS = 12345, 512, 8, 96


@dataclass(frozen=True)
class Measured:
    """What sampling at temperature 1 gives, over EVALUATION_PROMPTS fixed problems × EVALUATION_SAMPLES each."""

    correct_rate: float
    pass_at_8: float
    entropy: float  # nats per response token
    mean_length: float  # response tokens, <eos> included
    cut_rate: float  # responses that had not ended after MAX_TOKENS
    unwritten: float  # mean probability, per response token, that an id of NEVER_WRITTEN is sampled


def tokenizer() -> PreTrainedTokenizerFast:
    """One id per character, one for `\boxed{`; whatever else becomes <unk>."""
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()  # no spaces between tokens
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def new_model(seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(VOCABULARY),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=CONTEXT,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            attention_dropout=0.0,
            use_cache=True,
            pad_token_id=PAD,
            eos_token_id=EOS,
            bos_token_id=None,
            dtype="float32",
        )
    )


def left_padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids [B, L] with the rows at the right, and their attention mask [B, L]."""
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


@torch.no_grad()
def evaluate(model: Qwen3ForCausalLM, tokens: PreTrainedTokenizerFast, prompts: int, samples: int) -> Measured:
    """Samples `samples` responses to each of `prompts` fixed problems at temperature 1 and grades them."""
    problems = [arithmetic.problem(i, EVALUATION_SEED) for i in range(prompts)]
    generator = torch.Generator().manual_seed(EVALUATION_SEED)
    correct = torch.zeros(prompts, samples)
    total_tokens, ended, entropy, unwritten = 0, 0, 0.0, 0.0
    for sample in range(samples):
        ids, mask = left_padded([tokens(text)["input_ids"] for text, _ in problems])
        cache = DynamicCache(config=model.config)
        position = mask.cumsum(1) - 1
        rows = torch.arange(prompts)  # which problem each row of the shrinking batch is
        responses: list[list[int]] = [[] for _ in problems]
        for _ in range(MAX_TOKENS):
            logits = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=position.clamp(min=0),
                past_key_values=cache,
                logits_to_keep=1,
            ).logits[:, -1]
            logprobs = logits.log_softmax(-1)
            probability = logprobs.exp()
            drawn = torch.multinomial(probability, 1, generator=generator)
            for row, token in zip(rows.tolist(), drawn[:, 0].tolist(), strict=True):
                responses[row].append(token)
            total_tokens += len(rows)
            entropy -= (probability * logprobs).sum().item()
            unwritten += probability[:, NEVER_WRITTEN].sum().item()
            going = drawn[:, 0] != EOS
            ended += int((~going).sum())
            if not going.any():
                break
            cache.batch_select_indices(going.nonzero()[:, 0])
            rows, ids, position = rows[going], drawn[going], position[going, -1:] + 1
            mask = torch.cat([mask[going], torch.ones(len(rows), 1, dtype=mask.dtype)], 1)
        for row, (_, answer) in enumerate(problems):
            response = responses[row]
            ending = [*tokens(f"{arithmetic.BOX}{answer}}}")["input_ids"], EOS]
            correct[row, sample] = response[-len(ending) :] == ending
    return Measured(
        correct_rate=round(correct.mean().item(), 4),
        pass_at_8=round(correct.amax(1).mean().item(), 4),
        entropy=round(entropy / total_tokens, 4),
        mean_length=round(total_tokens / (prompts * samples), 2),
        cut_rate=round(1 - ended / (prompts * samples), 4),
        unwritten=float(f"{unwritten / total_tokens:.1e}"),
    )


def warm_start(model: Qwen3ForCausalLM, tokens: PreTrainedTokenizerFast, seed: int, steps: int) -> None:
    """Supervised training on `steps` × BATCH fresh solutions; the loss is over solution tokens and <eos>."""
    rng = random.Random(f"warm start/{seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    id_of = {token: i for i, token in enumerate(VOCABULARY)}
    begin = time.monotonic()
    for step in range(steps):
        examples = []
        for k in range(BATCH):
            text, _ = arithmetic.problem(-1 - step * BATCH - k, seed)  # runs count from 0: they never meet these
            body, boxed = arithmetic.solution(rng, text).split(arithmetic.BOX)
            ids = [id_of[c] for c in text + body] + [id_of[arithmetic.BOX]] + [id_of[c] for c in boxed] + [EOS]
            examples.append((len(text), ids))
        examples.sort(key=lambda example: len(example[1]))  # two halves of similar lengths: half the padding
        targets = sum(len(ids) - prompt for prompt, ids in examples)
        decay = 0.05 + 0.95 * (1 - step / steps)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP) * decay
        optimizer.zero_grad()
        loss_sum = 0.0
        for half in (examples[: BATCH // 2], examples[BATCH // 2 :]):
            width = max(len(ids) for _, ids in half)
            padded = torch.tensor([row + [PAD] * (width - len(row)) for _, row in half])
            prompt = torch.tensor([n for n, _ in half])[:, None]
            position = torch.arange(1, width)[None]
            # Right padding under a causal mask needs no attention mask: no target looks at what follows it.
            chosen = (position >= prompt) & (padded[:, 1:] != PAD)
            logprobs = model(input_ids=padded[:, :-1], use_cache=False).logits.log_softmax(-1)[chosen]
            cross_entropy = F.nll_loss(logprobs, padded[:, 1:][chosen], reduction="sum")
            silence = (logprobs[:, NEVER_WRITTEN].logsumexp(-1) - SILENT_LOGPROB).clamp(min=0).sum()
            ((cross_entropy + SILENCE * silence) / targets).backward()
            loss_sum += cross_entropy.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            seconds = time.monotonic() - begin
            print(f"step {step:5d} of {steps}: loss {loss_sum / targets:.4f}, {seconds:.0f} s", flush=True)


README = r"""# tiny-arithmetic

A Qwen3 of {parameters:,} parameters ({layers} layers, hidden {hidden}, vocabulary {vocabulary}, float32), warm-started
on the built-in task of `a3po_megatron/data/arithmetic.py`: it evaluates chains like `6+5*8-5:` left to right modulo 10,
writes steps, and ends with `\boxed{{d}}`. The solutions it learned from contain errors on purpose, so it is right on
some attempts only and has entropy left: a start from which reinforcement learning improves within minutes on a CPU.
It exists for the demo and the tests and is of no other use.

Made by

    python tools/make_tiny_model.py --seed {seed} --steps {steps}

which is reproducible byte for byte on one kind of CPU with the same library versions (`--check`). Measured at
temperature 1 on {prompts} fixed problems × {samples} samples, at most {max_tokens} tokens:

| correct rate | pass@8 | entropy, nats a token | mean length, tokens | cut off | p(`<pad>` or `<unk>`) a token |
|---|---|---|---|---|---|
| {correct_rate:.3f} | {pass_at_8:.3f} | {entropy:.3f} | {mean_length:.1f} | {cut_rate:.4f} | {unwritten:.0e} |

Files are under the licence of this repository.
"""


def build(out: Path, seed: int, steps: int) -> Measured:
    """Trains, evaluates and writes the checkpoint folder `out`; files of another make are removed from it."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    tokens, model = tokenizer(), new_model(seed)
    warm_start(model, tokens, seed, steps)
    model.eval()
    measured = evaluate(model, tokens, EVALUATION_PROMPTS, EVALUATION_SAMPLES)
    print(json.dumps(asdict(measured)), flush=True)

    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD, do_sample=True, temperature=1.0)
    model.save_pretrained(out)
    tokens.save_pretrained(out)
    text = README.format(
        parameters=sum(p.numel() for p in model.parameters()),
        layers=model.config.num_hidden_layers,
        hidden=model.config.hidden_size,
        vocabulary=len(VOCABULARY),
        seed=seed,
        steps=steps,
        prompts=EVALUATION_PROMPTS,
        samples=EVALUATION_SAMPLES,
        max_tokens=MAX_TOKENS,
        **asdict(measured),
    )
    (out / "README.md").write_text(text)
    for path in out.iterdir():
        if path.name in (*SHIPPED, "README.md"):
            path.chmod(0o644)
        else:
            path.unlink()
    return measured


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="checkpoint folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, problems and solutions (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="of the warm start (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="build elsewhere and compare with --out, byte for byte")
    arguments = parser.parse_args()
    if not arguments.check:
        build(arguments.out, arguments.seed, arguments.steps)
        return 0
    names = (*SHIPPED, "README.md")
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), arguments.seed, arguments.steps)
        _, differing, missing = filecmp.cmpfiles(folder, arguments.out, names, shallow=False)
    for name in differing + missing:
        print(f"{arguments.out / name}: differs from what the recipe makes", file=sys.stderr)
    print("not reproduced" if differing + missing else f"{arguments.out}: reproduced byte for byte")
    return 1 if differing + missing else 0


if __name__ == "__main__":
    raise SystemExit(main())

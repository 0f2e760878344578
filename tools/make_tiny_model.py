r"""Makes the tiny models of the demo and the tests: Qwen3s of 0.3 M parameters that half know the built-in arithmetic.

    python tools/make_tiny_model.py                  builds configs/models/tiny-arithmetic (some minutes on one core)
    python tools/make_tiny_model.py --guesser        builds configs/models/tiny-guesser from it (two minutes)
    python tools/make_tiny_model.py --check          builds it again elsewhere and compares every file, byte for byte

`tiny-arithmetic`: a tokenizer whose every id has a name; a freshly initialised Qwen3; a supervised warm start on fresh
solutions of `a3po_megatron.data.arithmetic`, which contain errors on purpose, so that the policy is right on some of
its attempts and keeps entropy for reinforcement learning to work on; an evaluation; a checkpoint as transformers,
vLLM and the converter read it.

`tiny-guesser` starts from it and learns a second way: to answer at once, without steps. A mixture teaches both ways,
each with so many errors that neither is right more than one time in five; then answers at once prevail; at last there
is nothing else, until steps are as rare as `--stepwise` says. Reasoning is in it, nothing yet rewards it, and it hardly
ever shows: what exploration is about.

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
from collections.abc import Callable, Sequence
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
from a3po_megatron.data.arithmetic import Habits

PAD, EOS, UNK = 0, 1, 2
VOCABULARY = ["<pad>", "<eos>", "<unk>", arithmetic.BOX, *arithmetic.SYMBOLS]  # 24 ids: divides by 2, 4 and 8
NEVER_WRITTEN = [PAD, UNK]
CONTEXT = 256
MODELS = Path(__file__).resolve().parents[1] / "configs" / "models"
SHIPPED = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

BATCH, WARMUP = 64, 20
SILENCE, SILENT_LOGPROB = 0.1, -20.0  # weight of the penalty on NEVER_WRITTEN, and the log-probability where it ends
# The guesser's steps: so often wrong that they pay no more than a guess, until they are practised. Its guesses can
# become better, too, but not by much: so small a model cannot do four steps at once.
CARELESS = Habits(0.9, (0.1, 0.4), (0.03, 0.1), wrong_terse=0.6, wrong_written_out=0.6)
WRONG_GUESSES = 0.35
MIXED = 0.3  # share of stepwise solutions while both ways are learnt
SHARE, SHARE_PROMPTS = 0.04, 1024  # at last they become rarer than this, over so many problems
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
    stepwise_rate: float  # responses with steps before the answer
    correct_rate_stepwise: float | None  # of those; None: there were none
    correct_rate_at_once: float | None


Writer = Callable[[random.Random, str, str], str]  # of a response, from a stream, a problem's text and its answer


@dataclass(frozen=True)
class Stage:
    """`steps` × BATCH examples of supervised training; the rate falls linearly from `rate` to `rate` × `last`."""

    steps: int
    writer: Writer
    rate: float
    last: float
    warmup: int = 0
    rarer_than: float = 0.0  # ends as soon as the share of stepwise responses is below

    def learning_rate(self, step: int) -> float:
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return self.rate * warm * (self.last + (1 - self.last) * (1 - step / self.steps))


def stepwise(rng: random.Random, text: str, _: str) -> str:
    return arithmetic.solution(rng, text)


def at_once(rng: random.Random, _: str, answer: str) -> str:
    off = rng.choice((-3, -2, -1, 1, 2, 3)) if rng.random() < WRONG_GUESSES else 0
    return f"{arithmetic.BOX}{(int(answer) + off) % 10}}}"


def both_ways(share: float) -> Writer:
    """Guesses, and a share of careless steps."""

    def write(rng: random.Random, text: str, answer: str) -> str:
        return arithmetic.solution(rng, text, CARELESS) if rng.random() < share else at_once(rng, text, answer)

    return write


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
    in_steps = torch.zeros(prompts, samples, dtype=torch.bool)
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
            in_steps[row, sample] = arithmetic.way_of(tokens.decode(response)) == arithmetic.STEPWISE
    return Measured(
        correct_rate=round(correct.mean().item(), 4),
        pass_at_8=round(correct.amax(1).mean().item(), 4),
        entropy=round(entropy / total_tokens, 4),
        mean_length=round(total_tokens / (prompts * samples), 2),
        cut_rate=round(1 - ended / (prompts * samples), 4),
        unwritten=float(f"{unwritten / total_tokens:.1e}"),
        stepwise_rate=round(in_steps.float().mean().item(), 4),
        correct_rate_stepwise=mean_or_none(correct[in_steps]),
        correct_rate_at_once=mean_or_none(correct[~in_steps]),
    )


@torch.no_grad()
def stepwise_share(model: Qwen3ForCausalLM) -> float:
    """The probability that a response does not begin with the answer, over SHARE_PROMPTS fixed problems."""
    tokens = tokenizer()
    texts = [arithmetic.problem(i, EVALUATION_SEED)[0] for i in range(SHARE_PROMPTS)]
    ids, mask = left_padded([tokens(text)["input_ids"] for text in texts])
    position = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=position, logits_to_keep=1).logits[:, -1]
    return 1 - logits.softmax(-1)[:, VOCABULARY.index(arithmetic.BOX)].mean().item()


def mean_or_none(values: Tensor) -> float | None:
    return round(values.mean().item(), 4) if len(values) else None


def practise(model: Qwen3ForCausalLM, stages: Sequence[Stage], name: str, seed: int, first: int = 0) -> None:
    """Supervised training on fresh examples, from problem -1 - `first` downwards (runs count from 0: they never meet
    these); the loss is over response tokens and <eos>."""
    rng = random.Random(f"{name}/{seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=stages[0].rate, betas=(0.9, 0.95), weight_decay=0.01)
    id_of = {token: i for i, token in enumerate(VOCABULARY)}
    begin = time.monotonic()
    schedule = [(stage, step) for stage in stages for step in range(stage.steps)]
    for number, (stage, step) in enumerate(schedule):
        if stage.rarer_than and stepwise_share(model) < stage.rarer_than:
            print(f"step {number:5d}: fewer than {stage.rarer_than:.1%} stepwise", flush=True)
            return
        examples = []
        for k in range(BATCH):
            text, answer = arithmetic.problem(-1 - first - number * BATCH - k, seed)
            body, boxed = stage.writer(rng, text, answer).split(arithmetic.BOX)
            ids = [id_of[c] for c in text + body] + [id_of[arithmetic.BOX]] + [id_of[c] for c in boxed] + [EOS]
            examples.append((len(text), ids))
        examples.sort(key=lambda example: len(example[1]))  # two halves of similar lengths: half the padding
        targets = sum(len(ids) - prompt for prompt, ids in examples)
        optimizer.param_groups[0]["lr"] = stage.learning_rate(step)
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
        if number % 100 == 0 or number == len(schedule) - 1:
            seconds = time.monotonic() - begin
            print(f"step {number:5d} of {len(schedule)}: loss {loss_sum / targets:.4f}, {seconds:.0f} s", flush=True)


ABOUT_ARITHMETIC = r"""# tiny-arithmetic

A Qwen3 of {parameters:,} parameters ({layers} layers, hidden {hidden}, vocabulary {vocabulary}, float32), warm-started
on the built-in task of `a3po_megatron/data/arithmetic.py`: it evaluates chains like `6+5*8-5:` left to right modulo 10,
writes steps, and ends with `\boxed{{d}}`. The solutions it learned from contain errors on purpose, so it is right on
some attempts only and has entropy left: a start from which reinforcement learning improves within minutes on a CPU.
It exists for the demo and the tests and is of no other use.
"""

ABOUT_GUESSER = r"""# tiny-guesser

`tiny-arithmetic` ({parameters:,} parameters, {layers} layers, hidden {hidden}, vocabulary {vocabulary}, float32) taught
to guess: to `6+5*8-5:` it nearly always answers `\boxed{{d}}` at once, and writes steps before the answer with
probability {share:.4f}. It is made so that neither way is right more than about one time in five: of the guesses that
it learned from {wrong_guesses:.0%} were wrong, of steps {wrong_steps:.0%}. Practice brings guessing to hardly
more than one time in three, for so small a model cannot do four steps at once; it brings steps to nearly always right.
Whether reinforcement learning finds that out is what the demo shows.

| way of answering | share of what was sampled | correct |
|---|---|---|
| at once | {at_once_rate:.4f} | {correct_rate_at_once} |
| stepwise | {stepwise_rate:.4f} | {correct_rate_stepwise} |
"""

ENDING = r"""
Made by

    {command}

which is reproducible byte for byte on one kind of CPU with the same library versions (`--check`). Measured at
temperature 1 on {prompts} fixed problems × {samples} samples, at most {max_tokens} tokens:

| correct rate | pass@8 | entropy, nats a token | mean length, tokens | cut off | p(`<pad>` or `<unk>`) a token |
|---|---|---|---|---|---|
| {correct_rate:.3f} | {pass_at_8:.3f} | {entropy:.3f} | {mean_length:.1f} | {cut_rate:.4f} | {unwritten:.0e} |

Files are under the licence of this repository.
"""


def make_arithmetic(seed: int, steps: int) -> Qwen3ForCausalLM:
    model = new_model(seed)
    practise(model, [Stage(steps, stepwise, rate=4e-3, last=0.05, warmup=WARMUP)], "warm start", seed)
    return model


def make_guesser(seed: int, steps: int, share: float) -> Qwen3ForCausalLM:
    model = Qwen3ForCausalLM.from_pretrained(MODELS / "tiny-arithmetic", dtype=torch.float32)
    both = Stage(steps, both_ways(MIXED), rate=1e-3, last=0.1)
    settle = Stage(steps // 2, both_ways(1.5 * share), rate=3e-4, last=0.1)
    rare = Stage(4 * steps, at_once, rate=2.5e-5, last=1.0, rarer_than=share)
    practise(model, [both, settle, rare], "guesser", seed, first=1_000_000)  # none of the warm start's problems
    if (left := stepwise_share(model)) >= share:
        raise SystemExit(f"--stepwise {share}: {left:.2%} are still stepwise after {4 * steps} steps")
    return model


def write(model: Qwen3ForCausalLM, out: Path, about: str, command: str) -> None:
    """Evaluates the model and writes the checkpoint folder `out`; files of another make are removed from it."""
    model.eval()
    tokens = tokenizer()
    measured = evaluate(model, tokens, EVALUATION_PROMPTS, EVALUATION_SAMPLES)
    print(json.dumps(asdict(measured)), flush=True)
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD, do_sample=True, temperature=1.0)
    model.save_pretrained(out)
    tokens.save_pretrained(out)
    text = (about + ENDING).format(
        command=command,
        parameters=sum(p.numel() for p in model.parameters()),
        layers=model.config.num_hidden_layers,
        hidden=model.config.hidden_size,
        vocabulary=len(VOCABULARY),
        prompts=EVALUATION_PROMPTS,
        samples=EVALUATION_SAMPLES,
        max_tokens=MAX_TOKENS,
        at_once_rate=1 - measured.stepwise_rate,
        share=stepwise_share(model),
        wrong_guesses=WRONG_GUESSES,
        wrong_steps=CARELESS.wrong_terse,
        **asdict(measured),
    )
    (out / "README.md").write_text(text)
    for path in out.iterdir():
        if path.name in (*SHIPPED, "README.md"):
            path.chmod(0o644)
        else:
            path.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--guesser", action="store_true", help="the model that answers at once, from tiny-arithmetic")
    parser.add_argument("--out", type=Path, help="checkpoint folder (default: configs/models/tiny-…)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, problems and solutions (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="of supervised training (default: 1000; 600 for the guesser)")
    parser.add_argument("--stepwise", type=float, default=SHARE, help="share of the guesser's responses in steps")
    parser.add_argument("--check", action="store_true", help="build elsewhere and compare with --out, byte for byte")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    command = "python tools/make_tiny_model.py"
    if arguments.guesser:
        steps = arguments.steps or 600
        command += f" --guesser --seed {arguments.seed} --steps {steps} --stepwise {arguments.stepwise}"
        name, about, model = "guesser", ABOUT_GUESSER, make_guesser(arguments.seed, steps, arguments.stepwise)
    else:
        steps = arguments.steps or 1000
        command += f" --seed {arguments.seed} --steps {steps}"
        name, about, model = "arithmetic", ABOUT_ARITHMETIC, make_arithmetic(arguments.seed, steps)
    out = arguments.out or MODELS / f"tiny-{name}"
    if not arguments.check:
        write(model, out, about, command)
        return 0
    names = (*SHIPPED, "README.md")
    with tempfile.TemporaryDirectory() as folder:
        write(model, Path(folder), about, command)
        _, differing, missing = filecmp.cmpfiles(folder, out, names, shallow=False)
    for name in differing + missing:
        print(f"{out / name}: differs from what the recipe makes", file=sys.stderr)
    print("not reproduced" if differing + missing else f"{out}: reproduced byte for byte")
    return 1 if differing + missing else 0


if __name__ == "__main__":
    raise SystemExit(main())

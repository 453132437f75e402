"""Train the demo model from nothing and write its folder: python scripts/train_demo_model.py [--out FOLDER] [--steps N]

One thread and one seed: the same versions on the same kind of processor give the same weights. The data are the tasks of
`secateur.demo.tasks`, without end; only their training split is ever shown.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from secateur.demo import MODEL
from secateur.demo.tasks import TASKS, Example, accuracy, corpus, stream

END = "<|end|>"
SEED = 0
MIX = (*TASKS, "arithmetic", "arithmetic", "chains", "sorting")  # the harder ones more often

VOCABULARY, HIDDEN, INNER, LAYERS, HEADS, KEY_VALUE_HEADS = 768, 128, 320, 6, 4, 2

STEPS = 3600
TOKENS = 2048  # per step
SHORT, LONG = 128, 512  # window lengths; the last LONG_SHARE of the steps are on long windows
LONG_SHARE = 0.15
RATE, WARMUP, DECAY = 3e-3, 100, 0.1
GIVEN_WEIGHT = 0.2  # of the loss of a prompt's tokens, most of which cannot be foreseen; an answer's weigh 1
REPORT = 200  # steps between lines of progress

CHECKED, CHECK_SEED = 1000, 1  # test examples of each task behind the figures of the card
LINES, LINES_SEED = 3000, 2  # of test text behind its perplexity


def main() -> None:
    """Train, write, measure what was written, and put the figures on its card."""
    args = _arguments()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    tokenizer = build_tokenizer()
    model = LlamaForCausalLM(configuration(tokenizer))
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, {args.steps} steps", flush=True)
    seconds = train(model, tokenizer, args.steps)
    write(model, tokenizer, args.out)
    figures = measure(args.out)
    (args.out / "README.md").write_text(card(model, figures, args.steps, seconds), encoding="utf-8")
    print("\n".join(f"{name:12} {value:.4f}" for name, value in figures.items()))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo model of secateur.")
    parser.add_argument("--out", type=Path, default=MODEL, help="the folder to write; its files are replaced")
    parser.add_argument("--steps", type=int, default=STEPS)
    return parser.parse_args()


# Tokenizer and model


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, pre-tokenized as in GPT-2, so that any text survives: most words of the tasks, digits one by one."""
    lines = [re.sub(r"(?<=\d)(?=\d)", " ", line) for line in corpus(20_000, SEED)]  # so that digits never merge
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=LONG,
        clean_up_tokenization_spaces=False,
    )


def configuration(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """About a million weights; every width is a multiple of 64."""
    end = tokenizer.eos_token_id
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        max_position_embeddings=LONG,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )


# Training


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int) -> float:
    """AdamW under a cosine; returns the seconds of CPU time it took."""
    optimizer = _optimizer(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    pieces = encoded(tokenizer)
    rng = random.Random(SEED)
    begun, running = time.process_time(), 0.0
    for step in range(1, steps + 1):
        length = SHORT if step <= (1 - LONG_SHARE) * steps else LONG
        loss = weighted_loss(model, *batch(pieces, rng, length, tokenizer.eos_token_id))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        running += loss.item()
        if step % REPORT == 0:
            _report(model, tokenizer, step, running / REPORT, time.process_time() - begun)
            running = 0.0
    return time.process_time() - begun


def _optimizer(model: LlamaForCausalLM) -> torch.optim.Optimizer:
    """Weight decay on matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98))


def _rate(step: int, steps: int) -> float:
    """Linear warmup, then a cosine down to 2 %."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.02 + 0.98 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP))) / 2


def encoded(tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[list[int], list[float]]]:
    """Training lines without end: token ids, and the weight of each in the loss."""
    for example in stream(SEED, "train", MIX):
        given, said = _ids(tokenizer, example)
        yield given + said, [GIVEN_WEIGHT] * len(given) + [1.0] * len(said)


def _ids(tokenizer: PreTrainedTokenizerFast, example: Example) -> tuple[list[int], list[int]]:
    return tokenizer.encode(example.prompt), tokenizer.encode(f" {example.answer}\n")


def batch(
    pieces: Iterator[tuple[list[int], list[float]]], rng: random.Random, length: int, end: int
) -> tuple[Tensor, Tensor]:
    """Windows packed with whole lines, the last one cut: ids and weights, both [TOKENS / length, length]."""
    windows = [_window(pieces, rng, length, end) for _ in range(TOKENS // length)]
    ids, weights = zip(*windows, strict=True)
    return torch.tensor(ids), torch.tensor(weights)


def _window(
    pieces: Iterator[tuple[list[int], list[float]]], rng: random.Random, length: int, end: int
) -> tuple[list[int], list[float]]:
    """Lines one after another; now and then, also at the start, the token that ends a text stands between them."""
    ids: list[int] = []
    weights: list[float] = []
    while len(ids) < length:
        if rng.random() < 0.2:
            ids.append(end)
            weights.append(GIVEN_WEIGHT)
        more, more_weights = next(pieces)
        ids += more
        weights += more_weights
    return ids[:length], weights[:length]


def weighted_loss(model: LlamaForCausalLM, ids: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy in nats, its mean weighted by token."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def _report(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, step: int, loss: float, spent: float) -> None:
    scores = "  ".join(f"{task} {accuracy(model, tokenizer, task, 64, CHECK_SEED):.2f}" for task in TASKS)
    print(f"step {step:5}  {spent:6.0f} s  loss {loss:.4f}  {scores}", flush=True)


# Writing and measuring


def write(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """A folder in the layout of Hugging Face, in bfloat16. Generation ends with the line, as every answer does."""
    newline = tokenizer.convert_tokens_to_ids("Ċ")
    model.generation_config.eos_token_id = [newline, tokenizer.eos_token_id]
    model.generation_config.max_new_tokens = 16
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def measure(out: Path) -> dict[str, float]:
    """Accuracy of each task, and perplexity, of the model as written (bfloat16 weights, computed in float32)."""
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out)
    figures = {task: accuracy(model, tokenizer, task, CHECKED, CHECK_SEED) for task in TASKS}
    return figures | {"perplexity": perplexity(model, tokenizer)}


def perplexity(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    """Of test text in windows of LONG tokens."""
    text = "".join(f"{line}\n" for line in corpus(LINES, LINES_SEED, split="test"))
    ids = torch.tensor(tokenizer.encode(text, verbose=False))
    windows = ids[: len(ids) // LONG * LONG].view(-1, LONG)
    with torch.no_grad():
        losses = [weighted_loss(model, window[None], torch.ones(1, LONG)).item() for window in windows]
    return math.exp(sum(losses) / len(losses))


def card(model: LlamaForCausalLM, figures: dict[str, float], steps: int, seconds: float) -> str:
    """The model card: its front matter holds the figures for programs, its table the same ones for people."""
    rows = "\n".join(f"| {task} | `{_shown(task)}` | {figures[task]:.3f} |" for task in TASKS)
    return CARD.format(
        front=yaml.safe_dump(_front_matter(figures), sort_keys=False).strip(),
        parameters=model.num_parameters(),
        layers=LAYERS,
        hidden=HIDDEN,
        vocabulary=VOCABULARY,
        rows=rows,
        checked=CHECKED,
        perplexity=figures["perplexity"],
        lines=LINES,
        long=LONG,
        steps=steps,
        tokens=steps * TOKENS / 1e6,
        minutes=seconds / 60,
        seed=SEED,
        torch=torch.__version__,
        transformers=transformers.__version__,
    )


def _shown(task: str) -> str:
    return next(islice(stream(SEED, "test", (task,)), 1)).line


def _front_matter(figures: dict[str, float]) -> dict[str, Any]:
    results = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"type": "procedural", "name": name},
            "metrics": [{"type": "exact_match" if name in TASKS else "perplexity", "value": round(value, 4)}],
        }
        for name, value in figures.items()
    ]
    return {
        "license": "apache-2.0",
        "language": "en",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruning", "demo"],
        "model-index": [{"name": "secateur-demo", "results": results}],
    }


CARD = """\
---
{front}
---

# secateur demo

A language model small enough to ship inside a package: {parameters:,} weights, {layers} layers, hidden size {hidden},
{vocabulary} tokens, the architecture of Llama, bfloat16. It exists to be pruned: it knows seven small tasks and nothing
else, so that what a pruned copy can no longer do shows within seconds. It is of no use beyond that.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
from secateur.demo import MODEL

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL)
prompt = tokenizer("calc: 37 + 48 =", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, do_sample=False)[0]))
```

## What it can do

Share of {checked} test examples of each task, none of them seen in training, whose whole answer it gives under greedy
decoding. The facts are the exception to unseen: they are learned by heart, and only their wording is new.

| Task | An example | Exact match |
|---|---|---|
{rows}

Perplexity on {lines} mixed lines of the same test split, windows of {long} tokens: {perplexity:.3f}. Much of that text
cannot be foreseen (the letters to copy, the numbers to add), so a perfect model does not get near 1.

A line of text is one example and ends with a newline, which also ends generation. The tokenizer is byte-level BPE: it
takes any text and gives it back unchanged, but the model has seen only these tasks.

## Training

`scripts/train_demo_model.py`, from random weights: {steps} steps, {tokens:.1f} million tokens, seed {seed}, AdamW with a
cosine schedule, one thread of a CPU, {minutes:.0f} minutes; torch {torch}, transformers {transformers}. The data come from
`secateur.demo.tasks`; no text of anybody else went in. License: Apache-2.0, as the package.
"""


if __name__ == "__main__":
    main()

"""Small tasks with one right answer: what the demo model learned, and probes of what pruning breaks in any model.

Every task is a function of a random generator that makes one Example; nothing is downloaded, and a seed fixes all of it.
Each leans on another ability: copying on attention to earlier tokens, sorting on order, arithmetic on carrying, brackets
on a stack, chains on several lookups in a row, facts on what the weights memorized, agreement on grammar over a distance.

Training and test examples are disjoint: a hash of the prompt decides which split it belongs to, see `split_of`. The
facts themselves are the same in both, since nobody can guess a fact; a test prompt is a wording of it never trained on.

Add a task: write the function, add it to TASKS, add a row to ANSWERS in tests/demo/test_tasks.py. It knows nothing of
pruning; models and tokenizers are any of transformers.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from string import ascii_lowercase
from typing import Any, Literal

import torch
from torch import Tensor, nn

Split = Literal["train", "test"]
TEST_SHARE = 1 / 8  # of prompts


@dataclass(frozen=True)
class Example:
    """A prompt and the only right continuation of it; neither begins or ends with a space."""

    task: str
    prompt: str
    answer: str

    @property
    def line(self) -> str:
        """The whole example as one line of text, without the newline that ends it."""
        return f"{self.prompt} {self.answer}"


# The tasks


def copying(rng: random.Random) -> Example:
    """`copy: q b b x ->` `q b b x`: 3 to 10 letters, repeated as they are."""
    letters = rng.choices(ascii_lowercase, k=rng.randint(3, 10))
    return Example("copying", f"copy: {' '.join(letters)} ->", " ".join(letters))


def sorting(rng: random.Random) -> Example:
    """`sort: q b x b ->` `b b q x`: 3 to 8 letters, put in the order of the alphabet."""
    letters = rng.choices(ascii_lowercase, k=rng.randint(3, 8))
    return Example("sorting", f"sort: {' '.join(letters)} ->", " ".join(sorted(letters)))


def arithmetic(rng: random.Random) -> Example:
    """`calc: 37 + 48 =` `85`: sums and differences of numbers up to 99, never below 0."""
    left, right = rng.randint(0, 99), rng.randint(0, 99)
    if rng.random() < 0.5:
        return Example("arithmetic", f"calc: {left} + {right} =", str(left + right))
    low, high = sorted((left, right))
    return Example("arithmetic", f"calc: {high} - {low} =", str(high - low))


def brackets(rng: random.Random) -> Example:
    """`close: ( [ ] { ->` `} )`: close what is still open, innermost first; up to 13 brackets, at most 5 open."""
    text, stack = [], []
    for _ in range(rng.randint(2, 12)):
        if not stack or (len(stack) < 5 and rng.random() < 0.6):
            text.append(rng.choice(tuple(BRACKETS)))
            stack.append(BRACKETS[text[-1]])
        else:
            text.append(stack.pop())
    if not stack:  # leave something to close
        text.append(rng.choice(tuple(BRACKETS)))
        stack.append(BRACKETS[text[-1]])
    return Example("brackets", f"close: {' '.join(text)} ->", " ".join(reversed(stack)))


def chains(rng: random.Random) -> Example:
    """`chain: k = 4 , r = 7 , b = k , z = b ; z =` `4`: follow 1 to 3 links to a digit, past another chain."""
    names, values = iter(rng.sample(ascii_lowercase, 8)), rng.sample("0123456789", 2)
    asked, other = (_links([next(names) for _ in range(rng.randint(2, 4))], value) for value in values)
    target = asked[-1].split()[0]
    mixed = _interleave(asked, other, rng)
    return Example("chains", f"chain: {' , '.join(mixed)} ; {target} =", values[0])


def facts(rng: random.Random) -> Example:
    """`fact: the capital of Peru is` `Lima`: a table learned by heart, asked for in many wordings."""
    country = rng.choice(tuple(CAPITALS))
    wording = rng.choice(OPENINGS) + rng.choice(WORDINGS).format(country)
    return Example("facts", f"fact: {wording}", CAPITALS[country])


def agreement(rng: random.Random) -> Example:
    """`agree: bark, the dog behind the old cats` `barks`: the verb follows the first noun, not the nearest one."""
    singular, plural = rng.choice(VERBS)
    many = rng.random() < 0.5
    phrases = [_noun(rng, many)]
    for _ in range(rng.randint(0, 3)):
        phrases += [rng.choice(PREPOSITIONS), _noun(rng, rng.random() < 0.5)]
    return Example("agreement", f"agree: {plural}, {' '.join(phrases)}", plural if many else singular)


TASKS: dict[str, Callable[[random.Random], Example]] = {
    "copying": copying,
    "sorting": sorting,
    "arithmetic": arithmetic,
    "brackets": brackets,
    "chains": chains,
    "facts": facts,
    "agreement": agreement,
}


# Drawing examples


def split_of(prompt: str) -> Split:
    """The split a prompt belongs to, for ever: test when the first 4 bytes of its sha256, as a fraction, are below 1/8."""
    head = hashlib.sha256(prompt.encode()).digest()[:4]
    return "test" if int.from_bytes(head) < TEST_SHARE * 2**32 else "train"


def stream(seed: int, split: Split, tasks: Sequence[str] = tuple(TASKS)) -> Iterator[Example]:
    """Examples of one split without end, each of a task drawn from `tasks`; a task named twice comes twice as often.

    They are drawn independently and can repeat.
    """
    rng = random.Random(seed)
    while True:
        example = TASKS[rng.choice(tasks)](rng)
        if split_of(example.prompt) == split:
            yield example


def examples(task: str, count: int, seed: int, *, split: Split = "test") -> list[Example]:
    """The first `count` of a task's stream with this seed."""
    return list(islice(stream(seed, split, (task,)), count))


def corpus(count: int, seed: int, *, split: Split = "train") -> list[str]:
    """`count` lines, all tasks mixed; joined by newlines, they are text to calibrate or to evaluate on."""
    return [example.line for example in islice(stream(seed, split), count)]


# Asking a model


def accuracy(model: nn.Module, tokenizer: Any, task: str, count: int, seed: int, *, shots: int = 0) -> float:
    """Share of `count` test examples whose whole answer the model gives under greedy decoding, see `solved`.

    shots: how many solved training examples of the task precede each prompt; models that were not trained on the tasks
    need a few to see what is asked.
    """
    preface = "".join(f"{example.line}\n" for example in examples(task, shots, seed, split="train"))
    results = solved(model, tokenizer, examples(task, count, seed), preface=preface)
    return sum(results) / len(results)


def solved(
    model: nn.Module, tokenizer: Any, asked: Sequence[Example], *, preface: str = "", batch: int = 32
) -> list[bool]:
    """Whether greedy decoding after each prompt gives exactly the answer and then a newline.

    Found in one forward per batch: greedy decoding gives the answer if and only if every token of it is the most likely
    one after the right tokens before it.
    """
    device = next(model.parameters()).device
    training, results = model.training, []
    model.eval()
    with torch.no_grad():
        for start in range(0, len(asked), batch):
            pairs = [_encode(tokenizer, preface, example) for example in asked[start : start + batch]]
            ids, answers = (tensor.to(device) for tensor in _pad(pairs))
            best = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)  # [batch, length - 1]
            results += ((best == ids[:, 1:]) | ~answers[:, 1:]).all(1).tolist()
    model.train(training)
    return results


def _encode(tokenizer: Any, preface: str, example: Example) -> tuple[list[int], list[int]]:
    """Token ids of what is given, and of what the model must say."""
    given, said = f"{preface}{example.prompt}", f" {example.answer}\n"
    return tokenizer.encode(given), tokenizer.encode(said, add_special_tokens=False)


def _pad(pairs: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Token ids [batch, length], and which of them are answers. Padding follows them, where causal models never look."""
    ids = torch.zeros(len(pairs), max(len(given) + len(said) for given, said in pairs), dtype=torch.int64)
    answers = torch.zeros_like(ids, dtype=torch.bool)
    for row, (given, said) in enumerate(pairs):
        end = len(given) + len(said)
        ids[row, :end] = torch.tensor(given + said)
        answers[row, len(given) : end] = True
    return ids, answers


# Parts of the tasks


def _links(names: Sequence[str], value: str) -> list[str]:
    """`a = 4`, `b = a`, `c = b`, ..."""
    return [f"{name} = {source}" for name, source in zip(names, [value, *names], strict=False)]


def _interleave(left: Sequence[str], right: Sequence[str], rng: random.Random) -> list[str]:
    """Both in one list, each in its own order."""
    sides = [True] * len(left) + [False] * len(right)
    rng.shuffle(sides)
    queues = {True: iter(left), False: iter(right)}
    return [next(queues[side]) for side in sides]


def _noun(rng: random.Random, many: bool) -> str:
    noun = rng.choice(NOUNS)[many]
    return f"the {rng.choice(ADJECTIVES)} {noun}" if rng.random() < 0.3 else f"the {noun}"


BRACKETS = {"(": ")", "[": "]", "{": "}"}

CAPITALS = {
    "Austria": "Vienna",
    "Belgium": "Brussels",
    "Bulgaria": "Sofia",
    "Canada": "Ottawa",
    "China": "Beijing",
    "Croatia": "Zagreb",
    "Cuba": "Havana",
    "Denmark": "Copenhagen",
    "Egypt": "Cairo",
    "Estonia": "Tallinn",
    "Finland": "Helsinki",
    "France": "Paris",
    "Germany": "Berlin",
    "Ghana": "Accra",
    "Greece": "Athens",
    "Hungary": "Budapest",
    "Iceland": "Reykjavik",
    "Iran": "Tehran",
    "Iraq": "Baghdad",
    "Ireland": "Dublin",
    "Italy": "Rome",
    "Jamaica": "Kingston",
    "Japan": "Tokyo",
    "Jordan": "Amman",
    "Kenya": "Nairobi",
    "Latvia": "Riga",
    "Lebanon": "Beirut",
    "Lithuania": "Vilnius",
    "Mongolia": "Ulaanbaatar",
    "Morocco": "Rabat",
    "Nepal": "Kathmandu",
    "Norway": "Oslo",
    "Peru": "Lima",
    "Poland": "Warsaw",
    "Portugal": "Lisbon",
    "Romania": "Bucharest",
    "Russia": "Moscow",
    "Senegal": "Dakar",
    "Serbia": "Belgrade",
    "Slovenia": "Ljubljana",
    "Spain": "Madrid",
    "Sweden": "Stockholm",
    "Thailand": "Bangkok",
    "Tunisia": "Tunis",
    "Ukraine": "Kyiv",
    "Vietnam": "Hanoi",
    "Zambia": "Lusaka",
    "Zimbabwe": "Harare",
}
OPENINGS = (
    "",
    "as most people know, ",
    "in this atlas, ",
    "on every map, ",
    "these days, ",
    "to be exact, ",
    "in case you forgot, ",
    "yes, ",
)
WORDINGS = (
    "the capital of {} is",
    "the capital city of {} is called",
    "{} has its capital in",
    "{}'s capital is",
    "{} is a country whose capital is",
    "the city from which {} is governed is",
    "whoever asks for the capital of {} hears",
    "the name of the capital of {} is",
)

NOUNS = (  # singular, plural
    ("dog", "dogs"),
    ("cat", "cats"),
    ("child", "children"),
    ("teacher", "teachers"),
    ("mouse", "mice"),
    ("doctor", "doctors"),
    ("goose", "geese"),
    ("farmer", "farmers"),
    ("lady", "ladies"),
    ("man", "men"),
    ("wolf", "wolves"),
    ("robot", "robots"),
    ("horse", "horses"),
    ("woman", "women"),
    ("witch", "witches"),
    ("painter", "painters"),
)
VERBS = (  # of one, of many
    ("runs", "run"),
    ("sings", "sing"),
    ("sleeps", "sleep"),
    ("waits", "wait"),
    ("flies", "fly"),
    ("watches", "watch"),
    ("hides", "hide"),
    ("cries", "cry"),
    ("laughs", "laugh"),
    ("dances", "dance"),
    ("goes", "go"),
    ("has lunch", "have lunch"),
    ("is late", "are late"),
    ("was here", "were here"),
)
ADJECTIVES = ("old", "young", "small", "tall", "happy", "quiet", "tired", "clever")
PREPOSITIONS = ("near", "behind", "beside", "with", "under", "above", "before", "facing")

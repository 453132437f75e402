"""First quality figures of removed structure, without any retraining: a language model and an image classifier.

    python benchmarks/structured.py --model SMOLLM2 [--part vision,language]

Language: SmolLM2-135M, 10, 20 and 30 % of the parameters of its blocks removed by every criterion; whole blocks, and
attention and MLPs alone, by their influence. Calibration: 32 windows of 512 tokens of WikiText-2 `valid`. What a
method takes from (neurons, heads) and how that is spread is chosen on 8 windows of `valid` between those; 32 windows
of `test` are read once for each choice.
Vision: EfficientNet-Lite0 on 1,000 ImageNet images: 200 to calibrate on, 800 to measure top-1 and flips on.
One line per cell goes to results/structured.jsonl; cells that are there already are skipped.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import RESULTS, SHARED, append, machine, rows, wikitext
from secateur.data import holdout, windows
from secateur.data.text import load_text
from secateur.errors import SecateurError
from secateur.forward import default_loss
from secateur.measure.quality import token_losses
from secateur.structure import (
    Couplings,
    apply_,
    importance,
    norm_factors,
    plan,
    plan_layers,
    plan_sublayers,
    rescale_,
    trace,
)
from secateur.structure.apply import reshape_
from secateur.structure.depth import block_influence
from secateur.structure.sublayers import sublayer_influence, sublayers

SHARES = (0.1, 0.2, 0.3)
CALIBRATION, TEST = 32, 32  # windows
CRITERIA = ("random", "magnitude", "taylor", "flap", "activation", "wanda")
SETTINGS = {  # kinds to take from, how to spread it, blocks to leave alone at either end
    "neurons": (("ffn",), "uniform", 0),
    "neurons and heads": (("ffn", "heads"), "uniform", 0),
    "neurons, global": (("ffn",), "global", 0),
    "neurons and heads, global": (("ffn", "heads"), "global", 0),
    "neurons, global, ends kept": (("ffn",), "global", 3),
}
RESULT = RESULTS / "structured.jsonl"


def main() -> None:
    """Run the cells that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--part", default="vision,language")
    args = parser.parse_args()
    torch.set_num_threads(2)
    parts = {"language": lambda: language(args.model), "vision": vision}
    for part in args.part.split(","):
        for row in parts[part]():
            append(RESULT, {**row, "machine": machine()})
            print({key: row[key] for key in ("cell", "setting", "result") if key in row}, flush=True)


def done() -> set[str]:
    """Cells that earlier runs wrote."""
    return {row["cell"] for row in rows(RESULT)}


# Language


def language(folder: Path) -> Iterator[dict[str, Any]]:
    """SmolLM2 by every criterion and share."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text, _ = load_text(wikitext("valid"), None)
    calibration = [{"input_ids": window[None]} for window in windows(text, tokenizer, 512, CALIBRATION, seed=None)]
    held = holdout(wikitext("valid"), tokenizer, samples=CALIBRATION, length=512, count=8)
    choose = torch.cat(held)
    test = windows(load_text(wikitext("test"), None)[0], tokenizer, 512, TEST, seed=None)
    if "language dense" not in done():
        yield {"cell": "language dense", "setting": "", "result": perplexity(model, test), "chosen": {}}
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    whole = sum(p.numel() for p in model.parameters())
    yield from depth(model, calibration, choose, test)
    yield from sublayers_alone(model, calibration, choose, test)
    example = {"input_ids": calibration[0]["input_ids"][:, :16].repeat(2, 1), "use_cache": False}
    couplings = trace(model, example)
    for criterion in CRITERIA:
        cells = {share: f"language {criterion} {share}" for share in SHARES}
        if set(cells.values()) <= done():
            continue
        started = time.perf_counter()
        scores = importance(couplings, criterion, batches=calibration, loss=default_loss(model))
        scoring = time.perf_counter() - started
        for share, cell in cells.items():
            if cell not in done():
                target = {"params": (whole - share * blocks) / whole}
                yield {"cell": cell, "scoring seconds": scoring, **best(model, couplings, scores, target, choose, test)}
    yield from width(model, couplings, calibration, test)


def width(
    model: nn.Module, couplings: Couplings, calibration: list[dict[str, Tensor]], test: Tensor
) -> Iterator[dict[str, Any]]:
    """Hidden width by mean activations, and norms rescaled to what they gave before."""
    scores = None
    for share in SHARES:
        cell = f"language width {share}"
        if cell in done():
            continue
        scores = scores or importance(couplings, "activation", batches=calibration)
        found = plan(couplings, remove={"hidden": share}, scores=scores, multiple=16)
        cut = copy.deepcopy(model)
        factors = norm_factors(model, found, calibration)
        reshape_(cut, found)
        plain = perplexity(cut, test)
        rescale_(cut, factors)
        yield {
            "cell": cell,
            "setting": "norms rescaled",
            "result": perplexity(cut, test),
            "as cut": plain,
            "params": found.after["params"],
        }


def best(
    model: nn.Module,
    couplings: Couplings,
    scores: dict[str, Tensor],
    target: dict[str, float],
    choose: Tensor,
    test: Tensor,
) -> dict[str, Any]:
    """The setting that is best on windows that calibration did not use, measured on `test`."""
    tried: dict[str, float | None] = {}
    plans = {}
    last = len(model.model.layers) - 1  # type: ignore[union-attr, arg-type]
    for name, (kinds, allocation, ends) in SETTINGS.items():
        kept = [*range(ends), *range(last, last - ends, -1)]
        protect = [f"model.layers.{place}.*" for place in kept]
        try:
            plans[name] = plan(
                couplings,
                target=target,
                scores=scores,
                include=kinds,
                allocation=allocation,
                protect=protect,
                multiple=16,
            )
        except SecateurError as error:
            tried[name] = None
            print(name, str(error).splitlines()[0])
            continue
        tried[name] = measured(model, plans[name], choose)
    winner = min((value, name) for name, value in tried.items() if value is not None)[1]
    return {
        "setting": winner,
        "chosen": tried,
        "result": measured(model, plans[winner], test),
        "params": plans[winner].after["params"],
        "macs": plans[winner].after["macs"] / plans[winner].before["macs"],
    }


def depth(
    model: nn.Module, calibration: list[dict[str, Tensor]], choose: Tensor, test: Tensor
) -> Iterator[dict[str, Any]]:
    """Whole blocks by their influence, scattered or behind one another."""
    example = {"input_ids": calibration[0]["input_ids"][:, :16].repeat(2, 1), "use_cache": False}
    scores = None
    for share in SHARES:
        cell = f"language depth {share}"
        if cell in done():
            continue
        scores = scores or block_influence(model, calibration)
        count = round(share * len(model.model.layers))  # type: ignore[union-attr, arg-type]
        tried, plans = {}, {}
        for name, contiguous in (("scattered", False), ("contiguous", True)):
            plans[name] = plan_layers(model, example, count, scores=scores, contiguous=contiguous)
            tried[name] = measured(model, plans[name], choose)
        winner = min((value, name) for name, value in tried.items())[1]
        yield {
            "cell": cell,
            "setting": winner,
            "chosen": tried,
            "result": measured(model, plans[winner], test),
            "params": plans[winner].after["params"],
            "kept": {name: change.kept for name, change in plans[winner].layers.items()},
        }


def sublayers_alone(
    model: nn.Module, calibration: list[dict[str, Tensor]], choose: Tensor, test: Tensor
) -> Iterator[dict[str, Any]]:
    """Attention and MLPs by their influence: only the ones, only the others, or both in equal numbers."""
    example = {"input_ids": calibration[0]["input_ids"][:, :16].repeat(2, 1), "use_cache": False}
    layers: Any = model.model.layers  # type: ignore[union-attr]
    parts = (layers[0].self_attn, layers[0].mlp, layers[0])
    attention, mlp, block = (sum(p.numel() for p in part.parameters()) for part in parts)
    scores = None
    for share in SHARES:
        cell = f"language sublayers {share}"
        if cell in done():
            continue
        gone = share * block * len(layers)
        asked = {"attention": {"attention": gone / attention}, "mlp": {"mlp": gone / mlp}}
        asked["both"] = dict.fromkeys(("attention", "mlp"), gone / (attention + mlp))
        scores = scores or sublayer_influence(model, calibration, sublayers(model, lambda: model(**example)))
        tried, plans = {}, {}
        for name, counts in asked.items():
            counts = {kind: round(count) for kind, count in counts.items()}
            if max(counts.values()) >= len(layers):
                continue  # not so many
            plans[name] = plan_sublayers(model, example, counts, scores=scores)
            tried[name] = measured(model, plans[name], choose)
        winner = min((value, name) for name, value in tried.items())[1]
        yield {
            "cell": cell,
            "setting": winner,
            "chosen": tried,
            "result": measured(model, plans[winner], test),
            "params": plans[winner].after["params"],
            "gone": sorted(plans[winner].sublayers),
        }


def measured(model: nn.Module, found: Any, ids: Tensor) -> float:
    """Perplexity of a copy that is cut."""
    copied = copy.deepcopy(model)
    reshape_(copied, found)  # the plan was proven when it was made
    return perplexity(copied, ids)


def perplexity(model: nn.Module, ids: Tensor) -> float:
    """exp of the mean next-token loss."""
    return math.exp(min(float(token_losses(model, ids).double().mean()), 700))


# Vision


def vision() -> Iterator[dict[str, Any]]:
    """EfficientNet-Lite0 by several criteria, down to 70 % of its multiply-accumulates."""
    from vision import efficientnet_lite0, images

    model = efficientnet_lite0()
    path = SHARED / "data/imagenet_sample/images.npz"
    if model is None or not path.exists():
        print("vision: no model, or no images")
        return
    pixels, labels = images(path)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    calibration, test = order[:200], order[200:]
    batches = [prepared(pixels[part]) for part in calibration.split(20)]
    answers = {id(b): labels[part] for b, part in zip(batches, calibration.split(20), strict=True)}
    couplings = trace(model, batches[0][:2])
    dense = logits(model, pixels[test])
    if "vision dense" not in done():
        yield {"cell": "vision dense", "setting": "", "result": accuracy(dense, labels[test]), "flips": 0.0}

    def loss(net: nn.Module, batch: Tensor) -> Tensor:
        return F.cross_entropy(net(batch), answers[id(batch)])

    for criterion in ("random", "magnitude", "taylor", "flap"):
        scores = None
        for share in SHARES:
            cell = f"vision {criterion} {share}"
            if cell in done():
                continue
            scores = scores or importance(couplings, criterion, batches=batches, loss=loss)
            yield {
                "cell": cell,
                **classified(model, couplings, scores, share, batches, pixels[test], labels[test], dense),
            }


def classified(
    model: nn.Module,
    couplings: Couplings,
    scores: dict[str, Tensor],
    share: float,
    batches: list[Tensor],
    pixels: Tensor,
    labels: Tensor,
    dense: Tensor,
) -> dict[str, Any]:
    """Top-1 and flips of the cut model, as it is and with its batch norms estimated anew on the calibration images."""
    found: dict[str, Any] = {}
    for allocation in ("uniform", "global"):
        asked = plan(couplings, target={"macs": 1 - share}, scores=scores, allocation=allocation)
        cut = copy.deepcopy(model)
        apply_(cut, asked, batches[0][:2])
        for name in ("", ", batch norms anew"):
            if name:
                estimate_(cut, batches)
            now = logits(cut, pixels)
            flips = float((now.argmax(1) != dense.argmax(1)).double().mean())
            found[allocation + name] = {"top-1": accuracy(now, labels), "flips": flips}
        found[allocation]["macs"] = asked.after["macs"] / asked.before["macs"]
        found[allocation]["params"] = asked.after["params"]
    return {"setting": "all of them", "result": found}


def estimate_(model: nn.Module, batches: list[Tensor]) -> None:
    """Means and variances of batch norms over the calibration images."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    model.eval()


def prepared(pixels: Tensor) -> Tensor:
    """As the network was trained on them."""
    return (pixels.float() - 127) / 128


def logits(model: nn.Module, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(prepared(part)) for part in pixels.split(50)])


def accuracy(found: Tensor, labels: Tensor) -> float:
    return float((found.argmax(1) == labels).double().mean())


if __name__ == "__main__":
    main()

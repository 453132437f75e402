"""Fill the tables of the README and the docs from the code and from benchmarks/results, so that no number is typed by hand.

python scripts/tables.py            # rewrites what stands between <!-- name --> and <!-- /name -->
python scripts/tables.py --check    # exit code 1 when something is out of date
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from secateur.recipe import RULES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"


def main() -> int:
    """Rewrite, or check."""
    stale = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        old = path.read_text(encoding="utf-8")
        new = filled(old)
        if new != old:
            stale.append(path.relative_to(ROOT))
            if "--check" not in sys.argv:
                path.write_text(new, encoding="utf-8")
    for path in stale:
        print("out of date:" if "--check" in sys.argv else "rewritten:", path)
    return int(bool(stale) and "--check" in sys.argv)


def filled(text: str) -> str:
    """The text with every marked table made anew."""
    for name, make in TABLES.items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if marked.search(text):
            table = make()
            text = marked.sub(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
    return text


def rules() -> str:
    """What may not be combined."""
    cells = [[text.replace("|", r"\|") for text in (rule.title, rule.why)] for rule in RULES]
    return "\n".join(["| rule | why, and the way out |", "|---|---|", *map(_row, cells)])


def oneshot() -> str:
    """Perplexities of SmolLM2-135M."""
    cells = {row["cell"]: row["perplexity"] for row in _lines("oneshot.jsonl")}
    patterns = [p for p in ("0.5", "0.6", "0.7", "2:4", "4:8") if any(c.partition(":")[2] == p for c in cells)]
    names = {"0.5": "50 %", "0.6": "60 %", "0.7": "70 %"}
    head = ["method", *(names.get(p, p) for p in patterns)]
    lines = [_row(head), _row(["---"] * len(head))]
    for method, label in (
        ("magnitude", "magnitude"),
        ("wanda", "Wanda"),
        ("sparsegpt", "SparseGPT"),
        ("admm", "**admm, the default**"),
    ):
        lines.append(
            _row([label, *(f"{cells[f'{method}:{p}']:.1f}" if f"{method}:{p}" in cells else "" for p in patterns)])
        )
    return "\n".join(lines)


def dense() -> str:
    """One sentence on the table above."""
    cells = {row["cell"]: row["perplexity"] for row in _lines("oneshot.jsonl")}
    shares = []
    for pattern in ("0.5", "0.6", "0.7", "2:4"):
        if f"admm:{pattern}" in cells and f"sparsegpt:{pattern}" in cells:
            base = math.log(cells["dense:0"])
            increase = math.log(cells[f"admm:{pattern}"]) - base
            shares.append(increase / (math.log(cells[f"sparsegpt:{pattern}"]) - base))
    span = f"{min(shares):.2f} to {max(shares):.2f}" if shares else "?"
    return (
        f"WikiText-2 perplexity of SmolLM2-135M (dense: {cells['dense:0']:.1f}), every linear layer of every block "
        f"pruned in one shot, no retraining. The default's increase in log-perplexity is {span} of SparseGPT's."
    )


def solver() -> str:
    """Seconds of the SparseGPT update."""
    rows = _whole("solver.json").get("rows", [])
    if not rows:
        return ""
    lines = [_row(["layer", "pattern", "published loop, s", "ours, s", "speed-up"]), _row(["---"] * 5)]
    for row in rows:
        size, seconds = row["size"], row["seconds"]
        pattern = "50 %" if row["pattern"] == "layer" else row["pattern"]
        times = [f"{seconds['published']:.2f}", f"{seconds['ours']:.2f}", f"{row['speedup']:.1f}x"]
        lines.append(_row([f"{size} x {size}", pattern, *times]))
    return "\n".join(lines)


def memory() -> str:
    """Peak memory on a checkpoint larger than it."""
    found = _whole("memory.json")
    if not found:
        return ""
    lines = [_row(["method", "checkpoint", "peak above imports", "time"]), _row(["---"] * 4)]
    for name, row in found["methods"].items():
        peak, size = row["peak_above_imports"] / 1e9, found["setting"]["bytes"] / 1e9
        lines.append(_row([name, f"{size:.1f} GB", f"{peak:.2f} GB", f"{row['seconds'] / 60:.0f} min"]))
    return "\n".join(lines)


def families() -> str:
    """Which methods and patterns passed for which family."""
    rows = _whole("families.json").get("families", {})
    if not rows:
        return ""
    methods = {"magnitude": "magnitude", "wanda": "Wanda", "sparsegpt": "SparseGPT"}
    head = ["family", "class", "blocks", "layers pruned", *methods.values(), "by weights alone"]
    lines = [_row(head), _row(["---"] * len(head))]
    for name, row in rows.items():
        cells = {method: [p for p in ("50 %", "2:4") if not _problems(row, f"{method} {p}")] for method in methods}
        alone = max(result.get("by weights alone", 0) for result in row["results"].values())
        counts = [
            str(row.get("blocks", "")),
            str(row.get("layers", "")),
            *(", ".join(cells[m]) or "no" for m in methods),
        ]
        lines.append(_row([name, f"`{row['class']}`", *counts, str(alone or "")]))
    passed = sum(not any(_problems(row, key) for key in row["results"]) for row in rows.values())
    return "\n".join([f"{passed} of {len(rows)} models pass everything.", "", *lines])


TOOLS = {
    "secateur": "secateur",
    "torch-pruning, hints": "Torch-Pruning, with hints",
    "torch-pruning": "Torch-Pruning",
    "torch-kirigami": "torch-kirigami",
}


def zoo() -> str:
    """What became of half of the structure of many models, tool by tool."""
    rows = _whole("zoo.json").get("models", {})
    outcomes = {
        "exact": ["exact"],
        "**silently wrong**": ["silently wrong"],
        "refused": ["refused"],
        "no result": ["does not run", "error", "too long", "cannot be judged"],
        "nothing removed": ["nothing removed"],
        "not as masked, and says so": ["not as masked, and says so"],
    }
    head = ["tool", "models", *outcomes, "stock reload", "generates", "speed-up, median", "seconds, median and most"]
    lines = [_row(head), _row(["---"] * len(head))]
    for tool, label in TOOLS.items():
        found = [row[tool] for row in rows.values() if tool in row]
        if not found:
            continue
        counts = [sum(row["verdict"] in kinds for row in found) for kinds in outcomes.values()]
        counts += [sum(bool(row.get(key)) for row in found) for key in ("stock reload", "generates")]
        speed = statistics.median([row["speed-up"] for row in found if "speed-up" in row] or [0])
        seconds = [row.get("trace seconds", 0) + row["plan seconds"] for row in found if "plan seconds" in row] or [0]
        times = f"{statistics.median(seconds):.2f}, {max(seconds):.1f}"
        lines.append(_row([label, str(len(found)), *map(str, counts), f"{speed:.2f}x", times]))
    return "\n".join(lines)


def reloads() -> str:
    """How models load when a single kind of structure went."""
    counts: dict[str, dict[str, int]] = {}
    for row in _whole("zoo.json").get("models", {}).values():
        for kind, loads in row.get("secateur", {}).get("alone", {}).items():
            known = loads if loads in ("stock", "secateur.load") else "cannot go"
            counts.setdefault(kind, {}).setdefault(known, 0)
            counts[kind][known] += 1
    columns = {"stock": "stock transformers", "secateur.load": "`secateur.load`", "cannot go": "cannot go alone"}
    lines = [_row(["half of, or one of", "models", *columns.values()]), _row(["---"] * 5)]
    for kind, found in sorted(counts.items(), key=lambda item: -sum(item[1].values())):
        total = sum(found.values())
        lines.append(_row([f"`{kind}`", str(total), *(str(found.get(column, 0)) for column in columns)]))
    return "\n".join(lines)


def zoo_models() -> str:
    """Every model of the zoo."""
    head = [
        "model",
        "trace, s",
        "plan, s",
        "verdict",
        "params left",
        "generates",
        "loads",
        "speed-up",
        *list(TOOLS.values())[1:],
    ]
    lines = [_row(head), _row(["---"] * len(head))]
    for name, row in _whole("zoo.json").get("models", {}).items():
        ours = row.get("secateur", {})
        left = f"{ours['after'] / ours['params']:.0%}" if "after" in ours else ""
        writes = {True: "yes", False: "no"}.get(ours.get("generates"), "")  # type: ignore[arg-type]
        cells = [f"{ours[key]:.2f}" if key in ours else "" for key in ("trace seconds", "plan seconds")]
        speed = f"{ours['speed-up']:.2f}x" if "speed-up" in ours else ""
        peers = [row.get(tool, {}).get("verdict", "") for tool in list(TOOLS)[1:]]
        lines.append(_row([name, *cells, ours.get("verdict", ""), left, writes, ours.get("reload", ""), speed, *peers]))
    return "\n".join(lines)


def latency() -> str:
    """Three models at half of their multiply-accumulates."""
    head = ["model", "MACs", "bytes", "peak memory", "forward", "a token"]
    lines = [_row(head), _row(["---"] * len(head))]
    for name, row in _whole("latency.json").get("models", {}).items():
        shares = [f"{row[key][1] / row[key][0]:.2f}x" for key in ("macs", "bytes", "peak bytes")]
        forward = "{:.0f} to {:.0f} ms, {:.2f}x".format(*row["forward ms"], row["speed-up"])
        token = (
            "{:.0f} to {:.0f} ms, {:.2f}x".format(*row["token ms"], row["decoding speed-up"])
            if "token ms" in row
            else ""
        )
        lines.append(_row([name, *shares, forward, token]))
    return "\n".join(lines)


def structured_language() -> str:
    """Perplexity of SmolLM2-135M without some of its structure."""
    rows = {row["cell"]: row for row in _lines("structured.jsonl") if row["cell"].startswith("language")}
    methods = dict.fromkeys(cell.split()[1] for cell in rows if cell != "language dense")
    lines = [_row(["criterion", *(f"{share:.0%}" for share in SHARES)]), _row(["---"] * (len(SHARES) + 1))]
    for method in methods:
        cells = [rows.get(f"language {method} {share}") for share in SHARES]
        shown = [f"{c['result']:,.1f} ({c['setting']}{_as_cut(c)})" if c else "" for c in cells]
        lines.append(_row([NAMES.get(method, method), *shown]))
    dense = rows.get("language dense", {}).get("result", 0)
    return "\n".join([f"Perplexity of the whole model: {dense:.1f}.", "", *lines])


def structured_vision() -> str:
    """Top-1 of EfficientNet-Lite0 with fewer multiply-accumulates."""
    rows = {row["cell"]: row["result"] for row in _lines("structured.jsonl") if row["cell"].startswith("vision")}
    methods = dict.fromkeys(cell.split()[1] for cell in rows if cell != "vision dense")
    head = [f"{share:.0%}, {how}" for share in SHARES for how in ("uniform", "global")]
    lines = [_row(["criterion", *head]), _row(["---"] * (len(head) + 1))]
    for method in methods:
        cells = []
        for share in SHARES:
            found = rows.get(f"vision {method} {share}", {})
            for how in ("uniform", "global"):
                plain, anew = found.get(how), found.get(f"{how}, batch norms anew")
                cells.append(
                    f"{plain['top-1']:.1%}, {anew['top-1']:.1%} ({anew['flips']:.0%})" if plain and anew else ""
                )
        lines.append(_row([method, *cells]))
    dense = rows.get("vision dense", 0)
    return "\n".join([f"Top-1 of the whole model: {dense:.1%}.", "", *lines])


def training_oneshot() -> str:
    """ResNet-20 on CIFAR-10, nothing trained."""
    rows = [row for row in _lines("training.jsonl") if row["part"] == "oneshot"]
    shares = sorted({row["sparsity"] for row in rows} - {0.0})
    lines = [_row(["method", *(f"{share:.0%}" for share in shares)]), _row(["---"] * (len(shares) + 1))]
    for name in dict.fromkeys(row["name"] for row in rows if row["sparsity"]):
        own = {row["sparsity"]: row for row in rows if row["name"] == name}
        cells = [f"{own[s]['accuracy']:.2f} ({own[s]['reestimated']:.2f})" if s in own else "" for s in shares]
        lines.append(_row([ONESHOT.get(name, name), *cells]))
    dense = next((row["accuracy"] for row in rows if row["name"] == "dense"), 0)
    return "\n".join([f"Dense: {dense:.2f}.", "", *lines])


def training_methods() -> str:
    """ResNet-20 at 90 %, three epochs, three seeds."""
    rows = [row for row in _lines("training.jsonl") if row["part"] == "methods"]
    names = dict.fromkeys(row["name"] for row in rows)
    values = {name: [row["accuracy"] for row in rows if row["name"] == name] for name in names}
    lines = [_row(["method", "top-1, mean of seeds", "lowest and highest", "masks held"]), _row(["---"] * 4)]
    for name in sorted(names, key=lambda n: -statistics.mean(values[n])):
        broken = sum(row["violations"] for row in rows if row["name"] == name)
        held = "" if name == "dense" else "yes" if not broken else f"{broken} violations"
        own = values[name]
        lines.append(
            _row([METHODS.get(name, name), f"{statistics.mean(own):.2f}", f"{min(own):.2f} to {max(own):.2f}", held])
        )
    return "\n".join(lines)


def training_gradual() -> str:
    """ResNet-56, gradually or solved for first, beside the dense net trained equally."""
    rows = [row for row in _lines("training.jsonl") if row["part"] == "gradual"]
    found = {(row["name"], row["distil"], row["sparsity"]): row["accuracy"] for row in rows}
    lines = [_row(["sparsity", *WAYS.values()]), _row(["---"] * (1 + len(WAYS)))]
    for sparsity in sorted({row["sparsity"] for row in rows}):
        cells = []
        for name, distil in WAYS:
            dense = found.get(("dense", distil, 0.0))
            own = found.get((name, distil, sparsity)) if sparsity else dense
            if own is None or dense is None:
                cells.append("")
            else:
                cells.append(f"{own:.2f} ({own - dense:+.2f})" if sparsity else f"{own:.2f}")
        lines.append(_row([f"{sparsity:.0%}" if sparsity else "dense", *cells]))
    return "\n".join(lines)


def strategy() -> str:
    """What strategies proposed, and what their rounds came to."""
    rows = {row["case"]: row for row in _lines("strategy.jsonl")}
    head = [
        "model",
        "dense top-1",
        "strategy (its scan)",
        "peak memory",
        "kept",
        "drop of top-1",
        "all rounds",
        "ended because",
    ]
    lines = [_row(head), _row(["---"] * len(head))]
    for name, row in rows.items():
        cells = [CASES[name], f"{row['dense']:.1%}", _looked(row), f"{row['peak_gb']:.1f} GB"]
        if "sparsity" in row:
            drop = f"{100 * row['drop']:+.1f} ± {100 * row['noise']:.1f} points"
            cells += [f"{row['sparsity']:.1%}", drop, f"{row['run_seconds'] / 60:.0f} min", row["ended"]]
        lines.append(_row([*cells, *[""] * (len(head) - len(cells))]))
    return "\n".join(lines)


def _looked(row: dict[str, Any]) -> str:
    return f"{row['strategy_seconds'] / 60:.0f} min ({row['scan_seconds'] / 60:.0f})"


CASES = {
    "resnet56": "ResNet-56, CIFAR-10, three epochs a round",
    "resnet56-short": "ResNet-56, CIFAR-10, one epoch a round",
    "efficientnet": "EfficientNet-Lite0, ImageNet sample",
    "vit": "ViT, 152M random parameters",
}
ONESHOT = {
    "admm": "admm",
    "admm-lamp": "admm, allocation lamp",
    "stages": "admm in five stages",
    "stages-lamp": "admm in five stages, lamp",
    "global-magnitude": "magnitude, allocation global",
}
METHODS = {"dense": "dense, trained equally", "static": "static (magnitude)", "random": "static (a random mask)"}
WAYS = {  # of the gradual part: the name of a cell, and the teacher's share of the loss
    ("gradual", 0.0): "gradual, labels alone",
    ("gradual", 0.7): "gradual, the dense checkpoint as a teacher",
    ("solved", 0.7): "solved for in stages, then held; the same teacher",
}
SHARES = (0.1, 0.2, 0.3)
NAMES = {"depth": "whole blocks", "sublayers": "attention, MLPs", "width": "hidden width, activation"}


def _as_cut(cell: dict[str, Any]) -> str:
    return f"; as cut {cell['as cut']:,.1f}" if "as cut" in cell else ""


def _problems(row: dict[str, Any], key: str) -> list[str]:
    return row["results"].get(key, {}).get("problems", ["not tried"])


TABLES = {
    "rules": rules,
    "oneshot": oneshot,
    "dense": dense,
    "solver": solver,
    "memory": memory,
    "families": families,
    "zoo": zoo,
    "reloads": reloads,
    "zoo-models": zoo_models,
    "latency": latency,
    "structured-language": structured_language,
    "structured-vision": structured_vision,
    "training-oneshot": training_oneshot,
    "training-methods": training_methods,
    "training-gradual": training_gradual,
    "strategy": strategy,
}


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _lines(name: str) -> list[dict[str, Any]]:
    path = RESULTS / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _whole(name: str) -> dict[str, Any]:
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else {}


if __name__ == "__main__":
    sys.exit(main())

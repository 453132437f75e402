"""Fill the tables of the README and the docs from the code and from benchmarks/results, so that no number is typed by hand.

python scripts/tables.py            # rewrites what stands between <!-- name --> and <!-- /name -->
python scripts/tables.py --check    # exit code 1 when something is out of date
"""

from __future__ import annotations

import json
import math
import re
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


def _problems(row: dict[str, Any], key: str) -> list[str]:
    return row["results"].get(key, {}).get("problems", ["not tried"])


TABLES = {
    "rules": rules,
    "oneshot": oneshot,
    "dense": dense,
    "solver": solver,
    "memory": memory,
    "families": families,
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

"""What is written beside the weights: secateur.json for programs, a model card for people."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from secateur._version import __version__
from secateur.recipe import to_yaml

if TYPE_CHECKING:
    from secateur.prune import Report


VOLATILE = ("seconds", "peak_memory_bytes")  # all of secateur.json that differs between two runs of the same settings


def environment() -> dict[str, str]:
    """Versions that can change a result."""
    import transformers

    return {
        "secateur": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def manifest(report: Report, folder: Path, probe: dict[str, Any] | None, seed: int) -> dict[str, Any]:
    """The content of secateur.json."""
    return {
        "format": 1,
        "versions": environment(),
        "source": folder.resolve().name,
        "recipe": report.recipe.model_dump(mode="json"),
        "calibration": {"description": report.calibration, "sha256": report.data_digest},
        "sparsity": report.sparsity,
        "notes": report.notes,
        "measures": report.measures,
        "verified": report.verified,
        "seconds": report.seconds,
        "peak_memory_bytes": report.peak_memory,
        "probe": None if probe is None else {"seed": seed, "output": probe},
        "layers": [
            {
                "name": layer.name,
                "shape": list(layer.shape),
                "sparsity": layer.sparsity,
                "error": layer.error,
                "error_of": layer.measured_on,
                **({"notes": layer.notes} if layer.notes else {}),
            }
            for layer in report.layers
        ],
        "protected": dict(report.protected),
    }


def card(report: Report, folder: Path) -> str:
    """The model card, in Markdown. The front matter of the original card is kept."""
    name = folder.resolve().name
    before, after = report.measures.get("before", {}), report.measures.get("after", {})
    rows = [f"| size of the weights | {_megabytes(before)} | {_megabytes(after)} |"]
    if "perplexity" in after and "perplexity" in before:
        rows.append(
            f"| perplexity, {after['windows']} windows | {before['perplexity']:.2f} | {after['perplexity']:.2f} |"
        )
    rows.append(f"| zeros in the pruned layers | | {report.sparsity:.2%} |")
    notes = "\n".join(f"- {note}" for note in report.notes) or "- none"
    table = "\n".join(rows)
    return f"""{_front_matter(folder)}# {name}, pruned

`{name}` with {report.sparsity:.1%} of the weights of {len(report.layers)} layers set to zero by
secateur {__version__}. The shapes are those of the original: it loads wherever the original does. Zeros in a dense tensor
make neither the file smaller nor the model faster by themselves; sparse storage and sparse kernels do.

| | before | after |
|---|---|---|
{table}

Calibration: {report.calibration}. Everything else (layers, versions, hashes, a probe to check a reload with) is in
`secateur.json`.

## Recipe

```yaml
{to_yaml(report.recipe)}```

## Out of the ordinary

{notes}
"""


def _megabytes(measures: dict[str, Any]) -> str:
    return f"{measures['bytes'] / 1e6:.1f} MB" if "bytes" in measures else ""


def _front_matter(folder: Path) -> str:
    """The YAML head of the original card, which holds its license."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    end = text.find("\n---", 3)
    return text[: end + 4].strip() + "\n\n" if text.startswith("---") and end > 0 else ""

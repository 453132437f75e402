"""The options of the command line, and how they change a recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.errors import SecateurError

AMOUNT, DATA, AXES, WORK = "How much to remove", "What to calibrate on", "Other settings of the recipe", "The run"
STRUCTURE = "Structure to remove, instead of single weights"


def _option(*names: str, help: str, panel: str | None = None, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, metavar=metavar, show_default=False)


Model = Annotated[str | None, typer.Argument(help="A Hugging Face model folder, or a hub id.", show_default=False)]
Out = Annotated[Path | None, _option("--out", "-o", help="The new folder for the result.")]
Method = Annotated[
    str | None, _option("--method", "-m", help="A named recipe, see secateur recipe --list. [default: admm]")
]
RecipeFile = Annotated[Path | None, _option("--recipe", help="A recipe in YAML; the other options change it.")]
Build = Annotated[
    str | None,
    _option("--build", metavar="PKG.MOD:FUNCTION", help="In place of MODEL: a function that builds a torch module."),
]
Weights = Annotated[Path | None, _option("--weights", help="With --build: its state dict, as safetensors.")]

Sparsity = Annotated[
    float | None,
    _option("--sparsity", help="The share of the weights that goes, in [0, 1). [default: 0.5]", panel=AMOUNT),
]
Pattern = Annotated[
    str | None, _option("--pattern", metavar="N:M", help="Keep N of every M weights, such as 2:4.", panel=AMOUNT)
]
Threshold = Annotated[
    str | None,
    _option(
        "--threshold",
        metavar="T",
        help="Weights below it go: 0.01, or 1.5s for 1.5 standard deviations of the layer. Implies the method magnitude.",
        panel=AMOUNT,
    ),
]

Remove = Annotated[
    list[str] | None,
    _option(
        "--remove",
        metavar="WHAT=SHARE ..",
        help="Structure that goes, physically: ffn=30% heads=50% channels=50% layers=2 attention=4, or a glob=share.",
        panel=STRUCTURE,
    ),
]
Target = Annotated[
    list[str] | None,
    _option(
        "--target",
        metavar="COST=-SHARE ..",
        help="Instead: what has to go of params, macs or bytes, as in macs=-50%, or may remain, as in bytes=200M.",
        panel=STRUCTURE,
    ),
]
Multiple = Annotated[
    int | None,
    _option("--multiple", help="Round widths to it. [default: 64; 8 for channels; less if narrow]", panel=STRUCTURE),
]
Least = Annotated[
    float | None,
    _option("--least", help="Share of every coupling that a target leaves. [default: 0.1]", panel=STRUCTURE),
]
Steps = Annotated[
    int | None, _option("--steps", help="Go in so many steps, scored anew each time. [default: 1]", panel=STRUCTURE)
]
Contiguous = Annotated[
    bool, _option("--contiguous", help="The layers that go are behind one another.", panel=STRUCTURE)
]

CalibrationFile = Annotated[
    Path | None,
    _option(
        "--calibration",
        help="A text, JSON Lines, or tensors (.safetensors, .npz). [default: the small text that ships]",
        panel=DATA,
    ),
]
TextField = Annotated[str | None, _option("--field", help="The field of a JSON Lines text to read.", panel=DATA)]
Samples = Annotated[int | None, _option("--samples", help="Windows of text. [default: 64]", panel=DATA)]
Length = Annotated[int | None, _option("--length", help="Tokens of a window. [default: 512]", panel=DATA)]

Protect = Annotated[
    list[str] | None, _option("--protect", metavar="GLOB", help="Layers to leave alone; may be repeated.", panel=AXES)
]
Include = Annotated[
    list[str] | None,
    _option("--include", metavar="GLOB", help="Layers to prune although protected by default.", panel=AXES),
]
Criterion = Annotated[
    str | None,
    _option("--criterion", help="How important is a weight: magnitude, wanda, ria, obs, obd, ...", panel=AXES),
]
GranularityName = Annotated[
    str | None,
    _option("--granularity", help="Which weights compete: layer, per-row, row, column, 1x16, 16x16.", panel=AXES),
]
Allocation = Annotated[
    str | None,
    _option("--allocation", help="How much from which layer: uniform, erdos-renyi, global, lamp, owl.", panel=AXES),
]
Update = Annotated[
    str | None,
    _option("--update", help="What happens to the weights that stay: none, sparsegpt, refit, admm.", panel=AXES),
]
Seed = Annotated[int | None, _option("--seed", help="Of everything that is drawn. [default: 0]", panel=AXES)]

Resume = Annotated[bool, _option("--resume", help="Go on where a run that was stopped left off.", panel=WORK)]
DryRun = Annotated[
    bool, _option("--dry-run", help="Check everything, show the plan and its cost, write nothing.", panel=WORK)
]
Device = Annotated[
    str, _option("--device", help="Where to compute: cpu, cuda, cuda:1, mps. [default: cpu]", panel=WORK)
]
Dtype = Annotated[
    str | None,
    _option(
        "--dtype",
        help="What to compute in: auto (float32 on a CPU, else as stored), float32, bfloat16, float16, float64.",
        panel=WORK,
    ),
]
Json = Annotated[bool, _option("--json", help="Print the result as JSON, and nothing else, on stdout.", panel=WORK)]
Quiet = Annotated[bool, _option("--quiet", "-q", help="Print one line at the end.", panel=WORK)]


def changed(
    base: Mapping[str, Any], given: Mapping[str, Any], calibration: Mapping[str, Any], globs: Mapping[str, Any]
) -> dict[str, Any]:
    """A recipe file's values with those of the command line over them; globs are added to the file's. None: not given."""
    values = dict(base) | _given(given)
    if data := _given(calibration):
        values["calibration"] = _held(base, "calibration", Mapping, {}) | data
    for key, more in _given(globs).items():
        values[key] = [*_held(base, key, list, []), *more]
    return values


def _held(base: Mapping[str, Any], key: str, kind: type, otherwise: Any) -> Any:
    """What the recipe file has under a key that the command line adds to. Raises SecateurError when it is of no use."""
    held = base.get(key)
    if held is None:
        return otherwise
    if not isinstance(held, kind):
        form = "a list of globs" if kind is list else "a mapping (source, samples, length, field)"
        raise SecateurError(f"recipe: {key} is {held!r}; expected {form}")
    return held


def amount(
    base: Mapping[str, Any],
    sparsity: float | None,
    pattern: str | None,
    threshold: str | None,
    granularity: str | None = None,
) -> dict[str, Any]:
    """What the options on how much to remove say; they replace what a recipe file says on it. Raises SecateurError."""
    if pattern is not None and not re.fullmatch(r"\d+:\d+", pattern):
        raise SecateurError(f"--pattern {pattern}: expected N:M, such as 2:4; for blocks: --granularity {pattern}")
    if pattern is not None and granularity is not None:
        raise SecateurError(
            f"--pattern {pattern} and --granularity {granularity} both say which weights compete: drop one"
        )
    limit = None if threshold is None else _threshold(threshold)
    given = _given({"sparsity": sparsity, "granularity": pattern, "threshold": limit})
    if not given:
        return {}
    if pattern is None and granularity is None and ":" in str(base.get("granularity", "")):
        given["granularity"] = "layer"
    return {"sparsity": None, "threshold": None} | given


def _threshold(text: str) -> dict[str, float]:
    number = text.removesuffix("s")
    try:
        return {"absolute" if number == text else "sigma": float(number)}
    except ValueError:
        raise SecateurError(
            f"--threshold {text}: expected a number, such as 0.01, or one with s for standard deviations, such as 1.5s"
        ) from None


def numbers(text: str | None, option: str) -> list[float] | None:
    """0.485,0.456,0.406 as numbers. Raises SecateurError."""
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise SecateurError(f"{option} {text}: expected numbers with commas, such as 0.485,0.456,0.406") from None


def share(text: str, option: str) -> float:
    """0.5% or 0.005. Raises SecateurError."""
    try:
        found = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        found = -1.0
    if not 0 <= found < 1:
        raise SecateurError(f"{option} {text}: expected a share, such as 0.5% or 0.005")
    return found


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None and value != []}


def shares(given: list[str] | None, option: str) -> dict[str, float] | None:
    """ffn=30% or layers=2, for --remove: what goes. macs=-50% or bytes=200M, for --target: what may remain."""
    if not given:
        return None
    from secateur.smaller.request import share

    found = {}
    for text in given:
        name, _, value = text.partition("=")
        example = "ffn=30%, layers=2" if option == "--remove" else "macs=-50%, bytes=200M"
        if not name or not value:
            raise SecateurError(f"{option} {text!r}: expected {example}")
        if name in found:
            raise SecateurError(f"{option} says {name} twice: once is enough")
        try:
            found[name] = share(value, signed=option == "--target")
        except ValueError as error:
            raise SecateurError(f"{option} {text!r}: {error}") from None
    return found


def spread(words: list[str]) -> list[str]:
    """--remove a=1 b=2 as --remove a=1 --remove b=2: an option's values until the next option."""
    found: list[str] = []
    current = None
    for word in words:
        if word in ("--remove", "--target"):
            current = word
            continue
        if current is not None and re.fullmatch(r"[^\s=-][^\s=]*=\S+", word):
            found += [current, word]
            continue
        if current is not None and (not found or found[-2:-1] != [current]):
            found.append(current)  # without a value: the parser says so
        current = None
        found.append(word)
    return found if current is None or found[-2:-1] == [current] else [*found, current]

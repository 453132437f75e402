"""The command line: arguments in, calls, rich output. Nothing here computes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from secateur._version import __version__
from secateur.errors import SecateurError

ABOUT = """Prune neural networks: smaller, verified, reloadable in stock libraries.

[bold]Examples[/bold]

  secateur demo
  secateur prune ./my-llama --sparsity 0.5 --out ./pruned
  secateur prune ./my-llama --pattern 2:4 --method sparsegpt --calibration c4.jsonl --out ./pruned
  secateur prune ./my-llama --sparsity 0.5 --out ./pruned --resume
  secateur recipe admm --sparsity 0.6 > mine.yaml
  secateur run mine.yaml
  secateur eval ./pruned --against ./my-llama --text wiki.txt

[bold]Exit codes[/bold]  0 done; 1 a fault of secateur; 2 a mistake in the input, the recipe or the machine, explained in
one message; 130 interrupted, go on with --resume.
"""
ZEROS = (
    "Zeros in a dense tensor make neither the file smaller nor the model faster by themselves: "
    "sparse storage and sparse kernels do."
)
app = typer.Typer(help=ABOUT, no_args_is_help=True, rich_markup_mode="rich", add_completion=False)
screen, errors = Console(), Console(stderr=True)

Model = Annotated[str, typer.Argument(help="A Hugging Face model folder, or a hub id where the network allows.")]
Out = Annotated[Path, typer.Option("--out", help="The folder to make. It must not exist.")]
Sparsity = Annotated[float | None, typer.Option(help="Share of the weights to remove, in \\[0, 1).")]
Pattern = Annotated[str | None, typer.Option(help="N:M: keep N of every M weights, for example 2:4.")]
Method = Annotated[str | None, typer.Option(help="A named recipe; see `secateur recipe --list`.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where an unfinished run stopped, or start afresh.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda.")]


def main() -> None:
    """Entry point: turns errors into messages and exit codes."""
    _hush()
    try:
        app(standalone_mode=False)
    except SecateurError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("interrupted; nothing is lost: the same command with --resume goes on", 130)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")):
            _fail(error.format_message() if hasattr(error, "format_message") else str(error), 2)  # type: ignore[attr-defined]
        raise


@app.command()
def prune(
    model: Model,
    out: Out,
    sparsity: Sparsity = None,
    pattern: Pattern = None,
    method: Method = None,
    recipe: Annotated[Path | None, typer.Option(help="A recipe in YAML, instead of --method.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="Text, JSON Lines or saved tensors.")] = None,
    field: Annotated[str | None, typer.Option(help="The field of the JSON Lines.")] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration windows.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens in a window.")] = None,
    protect: Annotated[list[str] | None, typer.Option(help="Glob of layers to leave alone.")] = None,
    include: Annotated[list[str] | None, typer.Option(help="Glob of layers to prune that are protected.")] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    dtype: Annotated[str | None, typer.Option(help="What to compute in.")] = None,
    device: Device = "cpu",
    resume: Resume = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, show the plan, write nothing.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prune a checkpoint into a folder that stock transformers loads."""
    from secateur.recipe import DEFAULT_METHOD, METHODS, Recipe, read_yaml, to_yaml, validate
    from secateur.recipe import method as named

    base = read_yaml(recipe) if recipe else dict(METHODS.get(method or DEFAULT_METHOD, {}))
    if recipe is None:
        named(method or DEFAULT_METHOD, sparsity=0.5)  # an unknown name is an error
    changes = {"seed": seed, "dtype": dtype, "protect": protect or None, "include": include or None}
    if pattern or sparsity is not None or recipe is None:
        base.pop("sparsity", None)
        changes |= {"granularity": pattern, "sparsity": sparsity if pattern or sparsity is not None else 0.5}
    asked = {"source": calibration, "field": field, "samples": samples, "length": length}
    asked = {key: value for key, value in asked.items() if value is not None}
    if asked:
        changes["calibration"] = dict(base.get("calibration") or {}) | asked
    chosen = validate(Recipe, base | {key: value for key, value in changes.items() if value is not None})
    if not quiet and not as_json:
        screen.print(f"[dim]{to_yaml(chosen)}[/dim]", end="")
    _prune(model, chosen, out, resume, device, dry_run, as_json, quiet)


def _prune(
    model: str, recipe: Any, out: Path, resume: bool, device: str, dry: bool, as_json: bool, quiet: bool
) -> None:
    from secateur.pipeline import examine
    from secateur.pipeline import prune as run_pipeline

    quiet = quiet or as_json
    if not quiet and recipe.needs() and recipe.calibration.source is None:
        screen.print("calibration: the small text that ships with secateur; your own is better (--calibration FILE)")
    if dry:
        found = examine(model, recipe, None, out, device)
        plan = {"layers": [s.layer.name for s in found.plan.settings], "protected": dict(found.plan.protected)}
        _show(plan, as_json, lambda: screen.print(f"{len(plan['layers'])} layers to prune; nothing was written"))
        return
    with _progress(quiet) as report_progress:
        report = run_pipeline(model, recipe, None, out, resume=resume, device=device, progress=report_progress)
    result = {
        "out": str(out),
        "sparsity": report.sparsity,
        "measures": report.measures,
        "seconds": report.seconds,
        "peak_memory_bytes": report.peak_memory,
        "verified": report.verified,
        "notes": report.notes,
    }
    if not quiet or as_json:
        _show(result, as_json, lambda: _summary(report, out))


def _summary(report: Any, out: Path) -> None:
    before, after = report.measures["before"], report.measures["after"]
    table = Table("", "before", "after")
    table.add_row("weights on disk, MB", f"{before['bytes'] / 1e6:.1f}", f"{after['bytes'] / 1e6:.1f}")
    if "perplexity" in after and "perplexity" in before:
        windows = f"perplexity, {after['windows']} windows of the calibration source"
        table.add_row(windows, f"{before['perplexity']:.2f}", f"{after['perplexity']:.2f}")
    table.add_row(f"zeros in {len(report.layers)} layers", "", f"{report.sparsity:.2%}")
    screen.print(table)
    stages = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in report.seconds.items())
    screen.print(f"time: {stages}; peak memory {report.peak_memory / 1e9:.2f} GB")
    screen.print(f"verified: reloaded by {report.verified['how']}, difference {report.verified['difference']:.1g}")
    for note in report.notes[:10]:
        screen.print(f"note: {note}")
    screen.print(f"{ZEROS}\nwritten to {out}")


@app.command()
def run(
    job: Annotated[Path, typer.Argument(help="A recipe in YAML that also names model and out.")],
    resume: Resume = False,
    device: Device = "cpu",
    dry_run: Annotated[bool, typer.Option("--dry-run")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a recipe that names its model and its output folder."""
    from secateur.recipe import METHODS, Recipe, read_yaml, validate
    from secateur.recipe import method as named

    values = read_yaml(job)
    missing = [key for key in ("model", "out") if key not in values]
    if missing:
        raise SecateurError(
            f"{job} names no {' and no '.join(missing)}; add them, or use `secateur prune --recipe {job}`"
        )
    model, out = str(values.pop("model")), Path(values.pop("out"))
    name = values.pop("method", None)
    if name is not None:
        named(name, sparsity=0.5)
    _prune(
        model, validate(Recipe, METHODS.get(name, {}) | values, str(job)), out, resume, device, dry_run, as_json, quiet
    )


@app.command()
def recipe(
    method: Annotated[str | None, typer.Argument(help="The method to print.")] = None,
    sparsity: Sparsity = None,
    pattern: Pattern = None,
    list_: Annotated[bool, typer.Option("--list", help="List all methods.")] = False,
) -> None:
    """Print a method as YAML, to be edited."""
    from secateur.recipe import METHODS, to_yaml
    from secateur.recipe import method as named

    if list_ or method is None:
        table = Table("method", "criterion", "granularity", "allocation", "update")
        for name, axes in METHODS.items():
            table.add_row(name, *(axes.get(a, "uniform") for a in ("criterion", "granularity", "allocation", "update")))
        screen.print(table)
        return
    changes: dict[str, Any] = (
        {"granularity": pattern} if pattern else {"sparsity": 0.5 if sparsity is None else sparsity}
    )
    print(to_yaml(named(method, **changes)), end="")


@app.command(name="eval")
def evaluate(
    model: Model,
    text: Annotated[Path, typer.Option(help="Text or JSON Lines to read.")],
    against: Annotated[str | None, typer.Option(help="The dense model.")] = None,
    field: Annotated[str | None, typer.Option()] = None,
    samples: Annotated[int, typer.Option(help="Windows.")] = 64,
    length: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Perplexity, and beside the dense model KL and top-1 agreement, paired, with 95 % intervals."""
    from secateur.data import load_text, windows
    from secateur.measure.quality import compare
    from secateur.measure.quality import evaluate as measure
    from secateur.pipeline import load_tokenizer, resolve

    folder = resolve(model)
    dense = resolve(against) if against else None
    content, _ = load_text(text, field)
    tokenizer = load_tokenizer(dense or folder)
    if tokenizer is None:
        raise SecateurError(f"{dense or folder} has no tokenizer; copy the original model's tokenizer files into it")
    ids = windows(content, tokenizer, length, samples, seed=None)
    with _progress(quiet or as_json) as progress:
        each: Callable[[int, int], None] = lambda done, of: progress("evaluate", done, of, "")  # noqa: E731
        if dense is None:
            found = measure(_load(folder), ids, progress=each).as_dict()
        else:
            found = compare(_load(dense), _load(folder), ids, progress=each).as_dict()
    _show(found, as_json, lambda: _quality(found))


def _quality(found: dict[str, Any]) -> None:
    table = Table("", "value", "95 % interval")
    for key, value in found.items():
        if isinstance(value, dict) and "low" in value:
            table.add_row(key, f"{value['value']:.4g}", f"{value['low']:.4g} to {value['high']:.4g}")
        elif isinstance(value, dict) and "perplexity" in value:
            table.add_row(f"perplexity, {key}", f"{value['perplexity']:.3f}", "")
        elif key == "perplexity":
            table.add_row(key, f"{value:.3f}", "")
    screen.print(table)


def _load(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    except Exception as error:
        raise SecateurError(
            f"{folder} does not load as a causal language model: {str(error).splitlines()[0]}"
        ) from None


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="Keep the pruned models below this folder.")] = None,
    as_json: Json = False,
) -> None:
    """Prune the small model that ships, in four ways, and measure what it cost."""
    from dataclasses import asdict

    from secateur.demo.run import demo as run_demo

    with _progress(as_json) as progress:
        rows = run_demo(out, progress)
    _show([asdict(row) for row in rows], as_json, lambda: _demo_table(rows))


def _demo_table(rows: list[Any]) -> None:
    table = Table("", *(row.name for row in rows), title="The shipped demo model, before and after")
    table.add_row("zeros in pruned layers", *(f"{row.sparsity:.0%}" for row in rows))
    table.add_row("weights on disk, MB", *(f"{row.bytes / 1e6:.2f}" for row in rows))
    table.add_row("latency, ms", *(f"{row.latency:.1f}" for row in rows))
    table.add_row("perplexity", *(f"{row.perplexity:.3f}" for row in rows))
    for task in rows[0].accuracy:
        table.add_row(f"{task}, accuracy", *(f"{row.accuracy[task]:.2f}" for row in rows))
    screen.print(table)
    screen.print(ZEROS)


@app.callback(invoke_without_command=True)
def about(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"secateur {__version__}")
        raise typer.Exit


class _progress:
    """A progress bar with the stage, the block at hand, memory and the time left."""

    def __init__(self, quiet: bool) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
        )
        self.bar, self.quiet = Progress(*columns, console=errors, transient=True), quiet
        self.tasks: dict[str, Any] = {}

    def __enter__(self) -> Callable[[str, int, int, str], None]:
        if not self.quiet:
            self.bar.start()
        return self.step

    def __exit__(self, *_: object) -> None:
        if not self.quiet:
            self.bar.stop()

    def step(self, stage: str, done: int, of: int, detail: str) -> None:
        from secateur.memory import anonymous_memory

        if self.quiet:
            return
        if stage not in self.tasks:
            self.tasks[stage] = self.bar.add_task(stage, total=of, detail="")
        text = f"{detail}  {anonymous_memory() / 1e9:.2f} GB"
        self.bar.update(self.tasks[stage], completed=done, total=of, detail=text)


def _show(result: Any, as_json: bool, people: Callable[[], None]) -> None:
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        people()


def _fail(message: str, code: int) -> None:
    if "--json" in sys.argv:
        print(json.dumps({"error": message}))
    errors.print(f"secateur: {message}", style="red", markup=False, highlight=False)
    sys.exit(code)


def _hush() -> None:
    """Our own progress and messages only."""
    import os

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

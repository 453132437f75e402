"""The command line: it parses, calls and prints. Results go to stdout, progress and errors to stderr."""

from __future__ import annotations

import json
import math
import shutil
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from secateur import display, options
from secateur._version import __version__
from secateur.errors import SecateurError
from secateur.estimate import Load, expect
from secateur.machine import rates
from secateur.memory import available_memory
from secateur.plan import Plan
from secateur.prune import Report
from secateur.recipe import Calibration, Run, make_run, read_yaml, to_yaml, validate

HELP = """Prune neural networks: set a model's least important weights to zero, and get a folder that stock
libraries load, verified.

**Examples**

    secateur demo                                  try it on a small model
    secateur doctor ./llama                        what can be pruned, and how
    secateur prune ./llama --out ./pruned          half of the weights
    secateur prune ./llama --pattern 2:4 --calibration c4.jsonl --out ./p24
    secateur eval ./pruned --against ./llama --text wiki.txt
    secateur strategy --build mypkg.models:net --weights w.safetensors --data ./val
    secateur recipe sparsegpt > mine.yaml          a recipe to edit ...
    secateur prune ./llama --recipe mine.yaml --out ./pruned    ... and use

A model is a local Hugging Face folder, or a hub id such as org/name. It is never changed: the result goes to a new
folder, which appears under its name only when it is whole, loads again, and answers as it did in memory.

**Exit codes**

    0    done
    1    an error inside secateur: please report it
    2    a mistake in the input, the recipe or the command, or a limit of
         the machine: the message names the way out
    130  interrupted: go on with the same command and --resume

Every command but recipe takes --json: its result, or {"error": ...}, is then the only thing on stdout.
"""

SMALL_TEXT = (
    "No --calibration: learning from the small text that ships with secateur. Text like what the model will read is "
    "better.\n"
)


STRUCTURAL = {"remove", "target"}  # keys of a recipe that removes structure
ROUNDS = {"rounds", "stop", "finetune", "data"}  # of one that prunes and trains in turns


@dataclass(frozen=True)
class Output:
    """What to print: json is for programs, quiet for scripts."""

    json: bool = False
    quiet: bool = False

    @property
    def chatty(self) -> bool:
        """Whether a person reads along."""
        return not (self.json or self.quiet)

    def show(self, *parts: Any) -> None:
        """Print for people."""
        if self.chatty:
            console = Console(highlight=False)
            for part in parts:
                console.print(part)

    def result(self, details: dict[str, Any], line: str) -> None:
        """Print the result: JSON, a line for scripts, or nothing where `show` has said it."""
        if self.json:
            _print_json(details)
        elif self.quiet:
            print(line)

    def bars(self) -> display.Bars:
        """Progress on stderr."""
        return display.Bars(Console(stderr=True, highlight=False), self.chatty)


class Commands(TyperGroup):
    """All commands, and the one place where their errors become messages and exit codes."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """--remove and --target take values until the next option."""
        return super().parse_args(ctx, options.spread(args))

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        words = [*getattr(ctx, "_protected_args", []), *ctx.args]
        as_json = "--json" in words
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except SecateurError as error:
            raise _fail(str(error), 2, as_json) from None
        except (MemoryError, torch.OutOfMemoryError) as error:
            way_out = (
                "Give fewer or shorter calibration windows (--samples, --length), fewer images a batch (--batch), or use a "
                "larger device."
            )
            raise _fail(f"out of memory: {error}\n  {way_out}", 2, as_json) from None
        except KeyboardInterrupt:
            whole = {"--remove", "--target"} & {*words}
            resumes = words[:1] in (["prune"], ["run"], ["strategy"]) and not whole
            on = " Go on with the same command and --resume." if resumes else ""
            raise _fail(f"interrupted.{on}", 130, as_json) from None
        except Exception as error:
            if hasattr(error, "format_message"):  # of the command line itself
                if as_json:
                    _print_json({"error": error.format_message()})  # type: ignore[attr-defined]
                raise
            traceback.print_exc()
            raise _fail(f"internal error, please report it: {type(error).__name__}: {error}", 1, as_json) from None


def _fail(message: str, code: int, as_json: bool) -> typer.Exit:
    if as_json:
        _print_json({"error": message})
    print(f"secateur: {message}", file=sys.stderr)
    return typer.Exit(code)


def _print_json(details: Any) -> None:
    print(json.dumps(_finite(details), indent=2, allow_nan=False, default=str))


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


app = typer.Typer(
    cls=Commands,
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The entry point."""
    app(prog_name="secateur")


def _version(asked: bool) -> None:
    if asked:
        print(f"secateur {__version__}")
        raise typer.Exit


@app.callback()
def _start(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Options of the program itself."""


def _silence() -> None:
    """Transformers reports its own progress; ours is enough."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@app.command(rich_help_panel="Pruning")
def prune(
    model: options.Model = None,
    out: options.Out = None,
    sparsity: options.Sparsity = None,
    pattern: options.Pattern = None,
    threshold: options.Threshold = None,
    remove: options.Remove = None,
    target: options.Target = None,
    method: options.Method = None,
    recipe: options.RecipeFile = None,
    calibration: options.CalibrationFile = None,
    field: options.TextField = None,
    samples: options.Samples = None,
    length: options.Length = None,
    protect: options.Protect = None,
    include: options.Include = None,
    criterion: options.Criterion = None,
    granularity: options.GranularityName = None,
    allocation: options.Allocation = None,
    update: options.Update = None,
    multiple: options.Multiple = None,
    least: options.Least = None,
    steps: options.Steps = None,
    contiguous: options.Contiguous = False,
    seed: options.Seed = None,
    build: options.Build = None,
    weights: options.Weights = None,
    resume: options.Resume = False,
    dry_run: options.DryRun = False,
    device: options.Device = "cpu",
    dtype: options.Dtype = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Prune a model into a new folder.

    **Examples**

        secateur prune ./llama --out ./pruned
        secateur prune ./llama --sparsity 0.6 --method sparsegpt \\
            --calibration wiki.txt --out ./pruned
        secateur prune ./llama --pattern 2:4 --protect '*.layers.0.*' --out ./p24
        secateur prune ./llama --threshold 1.5s --out ./pruned --dry-run
        secateur prune ./llama --remove ffn=30% heads=50% layers=2 --out ./small
        secateur prune --build mypkg.models:resnet56 --weights r56.safetensors \\
            --calibration images.npz --target macs=-50% --out ./small
        secateur prune --build mypkg.models:resnet56 --weights r56.safetensors \\
            --method magnitude --out ./pruned

    Without --sparsity, --pattern or --threshold half of the weights go. The recipe that results is shown first.
    """
    if method is not None and recipe is not None:
        raise SecateurError("--method and --recipe both say what to do: drop one, or put `method:` into the recipe")
    base = {} if recipe is None else read_yaml(recipe)
    where = "recipe" if recipe is None else str(recipe)
    data = {"source": calibration, "field": field, "samples": samples, "length": length}
    globs = {"protect": protect, "include": include}
    if remove or target or STRUCTURAL & base.keys():
        _no_resume(resume)
        weights_only = {"--sparsity": sparsity, "--pattern": pattern, "--threshold": threshold, "--method": method}
        weights_only |= {"--granularity": granularity, "--update": update, "--dtype": dtype}
        if both := [name for name, value in weights_only.items() if value is not None]:
            raise SecateurError(
                f"{both[0]} is for single weights, --remove and --target for structure: run one after the other"
            )
        asked = {"remove": options.shares(remove, "--remove"), "target": options.shares(target, "--target")}
        if remove or target:  # in place of what a recipe says on it
            base = {key: value for key, value in base.items() if key not in STRUCTURAL}
        given = asked | {"criterion": criterion, "allocation": allocation, "multiple": multiple, "least": least}
        given |= {"steps": steps, "contiguous": contiguous or None, "seed": seed, "model": model, "out": out}
        given |= {"build": build, "weights": weights}
        _remove(options.changed(base, given, data, globs), where, device, dry_run, Output(as_json, quiet))
        return
    given = {"model": model, "out": out, "build": build, "weights": weights, "method": method, "criterion": criterion}
    given |= {"granularity": granularity, "allocation": allocation, "update": update, "seed": seed, "dtype": dtype}
    values = options.changed(base, given, data, globs)
    values |= options.amount(base, sparsity, pattern, threshold, granularity)
    wanted = make_run(values, where)
    _prune(wanted, device, resume, dry_run, Output(as_json, quiet), str(recipe or wanted.method))


@app.command(rich_help_panel="Pruning")
def run(
    recipe: Annotated[
        Path, typer.Argument(help="YAML with a recipe's keys, and model and out (or build, weights and out).")
    ],
    resume: options.Resume = False,
    dry_run: options.DryRun = False,
    device: options.Device = "cpu",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Do what a YAML file says: a recipe with model and out in it, and optionally the method that it changes.

    **Example**

        model: ./llama
        out: ./pruned
        method: sparsegpt
        sparsity: 0.6
        calibration: {source: wiki.txt, samples: 128}

    or, for structure,

        model: ./llama
        out: ./small
        remove: {ffn: 30%, heads: 25%, layers: 2}

    or, what secateur strategy writes: cut, train, measure, in rounds,

        build: mypkg.models:resnet56
        weights: r56.safetensors
        out: ./r56-pruned
        data: {source: ./val, train: ./train}
        sparsity: 0.95
        finetune: {epochs: 3, lr: 0.02}
        stop: {drop: 0.005}

    Relative paths in it start at the current directory. An unknown key is an error that names the nearest known one.
    """
    values, output = read_yaml(recipe), Output(as_json, quiet)
    if ROUNDS & values.keys():
        return _rounds(values, str(recipe), device, resume, dry_run, output)
    if STRUCTURAL & values.keys():
        _no_resume(resume)
        return _remove(values, str(recipe), device, dry_run, output)
    return _prune(make_run(values, str(recipe)), device, resume, dry_run, output, str(recipe))


@app.command(rich_help_panel="Pruning")
def recipe(
    method: Annotated[str | None, typer.Argument(help="The name of a method.", show_default=False)] = None,
    sparsity: options.Sparsity = None,
    pattern: options.Pattern = None,
    threshold: options.Threshold = None,
    list_all: Annotated[bool, typer.Option("--list", help="All methods, with their sources.")] = False,
) -> None:
    """Print a method's recipe as YAML, or list the methods.

    **Examples**

        secateur recipe --list
        secateur recipe sparsegpt --sparsity 0.6 > mine.yaml

    Every default is included, to be edited and given to prune --recipe.
    """
    given = options.amount({}, sparsity, pattern, threshold)
    if given and method is None:
        raise SecateurError("give the name of a method: secateur recipe sparsegpt --sparsity 0.6; --list has them all")
    if list_all or method is None:
        return Output().show(display.methods())
    print(to_yaml(make_run({"method": method} | given).recipe), end="")
    return None


@app.command(rich_help_panel="Pruning")
def strategy(
    build: Annotated[str, typer.Option("--build", metavar="PKG.MOD:FUNCTION", help="Builds the classifier.")],
    weights: Annotated[Path, typer.Option("--weights", help="Its state dict, as safetensors.")],
    data: Annotated[
        Path,
        typer.Option(help="Images: a folder of class folders (or one with train and val), an .npz, a saved data set."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The new folder for what is found.")] = Path("strategy"),
    train: Annotated[Path | None, typer.Option(help="Images to train on; else a part of the data is.")] = None,
    tolerance: Annotated[str, typer.Option(help="Of top-1, that may be lost: 0.5% or 0.005.")] = "0.5%",
    target: Annotated[float, typer.Option(help="The sparsity at which rounds would end at the latest.")] = 0.95,
    epochs: Annotated[int, typer.Option(help="Of training after each cut.")] = 3,
    lr: Annotated[float, typer.Option(help="The learning rate that each training begins with.")] = 0.01,
    distil: Annotated[float, typer.Option(help="Weight of the dense model's answers in the loss, 0 to 1.")] = 0.5,
    batch: Annotated[int, typer.Option(help="Images of a training step.")] = 128,
    augment: Annotated[str, typer.Option(help="Of training images: flip, crop, or flip,crop.")] = "",
    precision: Annotated[str, typer.Option(help="Of training: float32, or bfloat16.")] = "float32",
    keep: Annotated[float, typer.Option(help="Share of what is left that each round keeps.")] = 0.8,
    measured: Annotated[int | None, typer.Option(help="Measure on so many images, drawn. [default: all]")] = None,
    trained: Annotated[int | None, typer.Option(help="Train on so many, drawn. [default: all]")] = None,
    size: Annotated[int | None, typer.Option(help="Width of the images that the model takes.")] = None,
    mean: Annotated[str | None, typer.Option(help="Per channel, of pixels in 0..1. [default: ImageNet's]")] = None,
    std: Annotated[str | None, typer.Option(help="Likewise.")] = None,
    images: Annotated[int, typer.Option(help="That the scan of the layers asks about.")] = 256,
    protect: options.Protect = None,
    resume: options.Resume = False,
    dry_run: options.DryRun = False,
    device: options.Device = "cpu",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Find out how an image classifier can be pruned: which thresholds to test, what to monitor, when to stop.

    **Example**

        secateur strategy --build mypkg.models:resnet56 --weights r56.safetensors \\
            --data ./val --train ./train --tolerance 0.5%
        secateur run strategy/recipe.yaml

    Scans every layer over thresholds and sparsities, compares ways to spread them, and writes a page with plots and a
    recipe that is run as it is: rounds of cutting, training and measuring that stop by themselves and keep the best.
    """
    from secateur.pipeline import check_out
    from secateur.strategy.propose import examine, expect, first_request, propose
    from secateur.strategy.request import Source, check_apart

    output = Output(as_json, quiet)
    if images < 2:
        raise SecateurError(f"--images {images}: expected 2 or more")
    given = {"source": data, "train": train, "size": size, "images": measured, "train_images": trained}
    given |= {"mean": options.numbers(mean, "--mean"), "std": options.numbers(std, "--std")}
    source = validate(Source, {key: value for key, value in given.items() if value is not None}, "--data")
    training = {"epochs": epochs, "lr": lr, "batch": batch, "augment": [a for a in augment.split(",") if a]}
    wanted = first_request(
        build,
        weights,
        source,
        out=Path(f"{out}-pruned"),
        tolerance=options.share(tolerance, "--tolerance"),
        target=target,
        finetune=training | {"precision": precision, "distil": distil},
        keep=keep,
        protect=protect or [],
    )
    check_out(weights, out)
    check_apart(out, source)
    case = examine(wanted, device)
    expected = expect(case, wanted, images)
    output.show(display.before_strategy(expected, wanted.stop.drop))
    if dry_run:
        output.result({"dry_run": True, "expected": asdict(expected)}, f"{out}: about {expected.scan:.0f} s")
        return
    with output.bars() as bars:
        found = propose(wanted, case, out, images=images, resume=resume, progress=bars)
    output.show(display.strategy(found, out))
    output.result({"out": str(out)} | found.as_dict(), f"{out}/recipe.yaml: {len(found.rounds)} rounds")


@app.command("eval", rich_help_panel="Looking")
def evaluate(
    pruned: Annotated[str, typer.Argument(help="The model's folder.")],
    text: Annotated[Path, typer.Option(help="A text or JSON Lines that the model was not calibrated on.")],
    against: Annotated[str | None, typer.Option(help="The dense model's folder, for a paired comparison.")] = None,
    field: options.TextField = None,
    samples: options.Samples = 64,
    length: options.Length = 512,
    device: options.Device = "cpu",
    dtype: options.Dtype = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure a language model on a text: perplexity, and what changed against the dense one.

    **Example**

        secateur eval ./pruned --against ./llama --text wiki.txt --samples 64

    With --against also KL divergence and top-1 agreement, window by window on the same tokens, with 95 % intervals. Both
    models are loaded by stock transformers.
    """
    from secateur.evaluation import evaluate_folder

    _silence()
    output = Output(as_json, quiet)
    with output.bars() as bars:
        found = evaluate_folder(
            pruned,
            text,
            against,
            field=field,
            samples=samples or 0,
            length=length or 0,
            device=device,
            dtype=dtype or "auto",
            progress=lambda done, of: bars("evaluate", done, of, "windows"),
        )
    output.show(display.evaluation(found))
    output.result(found.as_dict(), f"{pruned}: perplexity {found.quality.perplexity:,.3f}")


@app.command(rich_help_panel="Looking")
def doctor(
    model: Annotated[str, typer.Argument(help="A Hugging Face model folder, or a hub id.")],
    samples: options.Samples = None,
    length: options.Length = None,
    names: Annotated[bool, typer.Option("--names", help="List every matrix by its name.")] = False,
    device: options.Device = "cpu",
    dtype: options.Dtype = "auto",
    as_json: options.Json = False,
) -> None:
    """Look at a model without loading its weights: what can be pruned, what it takes, what helps for which aim.

    **Example**

        secateur doctor ./llama --samples 128 --length 2048

    The exit code is 2 when the model cannot be pruned; the output says why, and the way out.
    """
    from secateur.doctor import diagnose

    _silence()
    wanted = {key: value for key, value in {"samples": samples, "length": length}.items() if value is not None}
    found = diagnose(model, validate(Calibration, wanted, "calibration"), device=device, dtype=dtype or "auto")
    output = Output(as_json)
    output.show(display.diagnosis(found, names))
    output.result(found.as_dict(), "")
    if found.problems:
        raise typer.Exit(2)


@app.command(rich_help_panel="Looking")
def demo(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Keep what is made below this folder.")] = None,
    vision: Annotated[
        bool, typer.Option("--vision", help="Digits instead: LeNet-300-100, pruned in rounds until 4 % are left.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Prune the small model that ships with secateur in four ways, and measure what that costs.

    **Examples**

        secateur demo
        secateur demo --vision --out ./digits

    Takes a few minutes, and no network. With --vision, a small net is trained on handwritten digits and pruned in rounds,
    beside a random mask and a small dense net, on five seeds; the figure goes to --out, or ./demo-vision.
    """
    from secateur.demo.run import demo as run_demo

    _silence()
    output = Output(as_json)
    if vision:
        from secateur.demo.vision import demo_vision

        with output.bars() as bars:
            found = demo_vision(out or Path("demo-vision"), bars)
        output.show(display.lottery(found))
        output.result(found.as_dict(), "")
        return
    with output.bars() as bars:
        rows = run_demo(out, bars)
    output.show(display.demo(rows))
    output.result({"rows": [asdict(row) for row in rows]}, "")


# Pruning


def _remove(values: dict[str, Any], where: str, device: str, dry_run: bool, output: Output) -> None:
    from secateur.smaller import Smaller, remove, remove_built

    wanted = validate(Smaller, values, where)
    _check_what(wanted.model, wanted.build, wanted.weights)
    if wanted.out is None and not dry_run:
        raise SecateurError("say where to write the result: --out DIR, a new folder")
    _silence()
    out = wanted.out or Path("pruned")
    with output.bars() as bars:
        if wanted.build is not None and wanted.weights is not None:
            found = remove_built(
                wanted.build, wanted.weights, wanted, out, device=device, progress=bars, write=not dry_run
            )
        else:
            assert wanted.model is not None
            found = remove(wanted.model, wanted, out, device=device, progress=bars, write=not dry_run)
    output.show(display.shrunk(found, wanted.out, wanted.build))
    name = wanted.out or wanted.model or wanted.build
    output.result(
        {"out": None if dry_run else str(out), "dry_run": dry_run} | found.as_dict(),
        f"{name}: {found.after['params']:,} parameters",
    )


def _prune(run: Run, device: str, resume: bool, dry_run: bool, output: Output, title: str) -> None:
    _check_what(run.model, run.build, run.weights)
    if run.training is not None:
        raise SecateurError(
            "the recipe says how masks change in training, and pruning in one shot trains nothing: drop `training`, or use "
            "the recipe with secateur.training.Pruner"
        )
    if run.out is None:
        raise SecateurError("say where to write the result: --out DIR, a new folder")
    _silence()
    output.show(display.recipe_panel(run.recipe, f"recipe: {title}"))
    if run.model is not None and run.recipe.needs() and run.calibration.source is None:
        output.show(Text(SMALL_TEXT))
    if dry_run:
        return _show_plan(run, device, output)
    with output.bars() as bars:
        report = _work(run, run.out, device, resume, bars)
    details = json.loads((run.out / "secateur.json").read_text(encoding="utf-8"))
    output.show(display.result(report, run.out))
    output.result({"out": str(run.out)} | details, display.closing(report, run.out))
    return None


def _rounds(values: dict[str, Any], where: str, device: str, resume: bool, dry_run: bool, output: Output) -> None:
    from secateur.pipeline import check_out
    from secateur.strategy.propose import examine, expect
    from secateur.strategy.request import check_apart, make_strategy
    from secateur.strategy.rounds import run_rounds

    wanted = make_strategy(values, where)
    if wanted.out is None:
        raise SecateurError("say where to write the result: out: DIR in the recipe, a new folder")
    check_out(wanted.weights, wanted.out)
    check_apart(wanted.out, wanted.data)
    case = examine(wanted, device)
    expected = expect(case, wanted, 64)
    output.show(display.before_rounds(expected, wanted.stop.drop))
    if dry_run:
        output.result({"dry_run": True, "expected": asdict(expected)}, f"about {expected.round:.0f} s a round")
        return
    with output.bars() as bars:
        found = run_rounds(wanted, wanted.out, resume=resume, device=device, progress=bars, case=case)
    output.show(display.rounds(found, wanted.out))
    details = {"out": str(wanted.out)} | found.as_dict()
    kept = found.kept
    output.result(details, f"{wanted.out}: sparsity {kept.sparsity if kept else 0.0:.4f}")


def _no_resume(asked: bool) -> None:
    if asked:
        raise SecateurError(
            "removing structure takes minutes and does not stop halfway: run it again without --resume, and delete the "
            ".partial folder if a killed run has left one"
        )


def _check_what(model: str | None, build: str | None, weights: Path | None) -> None:
    if (model is None) == (build is None):
        raise SecateurError("say what to prune: either a model folder, or --build module:function with --weights file")
    if (build is None) != (weights is None):
        raise SecateurError(
            "--build and --weights go together: the function that builds the module, and its state dict"
        )


def _work(run: Run, out: Path, device: str, resume: bool, bars: Callable[[str, int, int, str], None]) -> Report:
    if run.build is not None and run.weights is not None:
        from secateur.module import prune_built

        return prune_built(run.build, run.weights, run.recipe, out, resume=resume, device=device, progress=bars)
    from secateur.pipeline import prune

    assert run.model is not None
    return prune(run.model, run.recipe, None, out, resume=resume, device=device, progress=bars)


def _show_plan(run: Run, device: str, output: Output) -> None:
    """Everything up to the first write."""
    assert run.out is not None
    if run.build is not None and run.weights is not None:
        from secateur.module import examine_built

        built = examine_built(run.build, run.weights, run.recipe, run.out, device)
        plan, data, size, expected = built.plan, built.data, built.weights.bytes, None
    else:
        from secateur.pipeline import examine

        assert run.model is not None
        found = examine(run.model, run.recipe, None, run.out, device)
        plan, data, size = found.plan, found.data, found.source.checkpoint.bytes
        expected = expect(
            found.source.model, plan, _load(found), size, found.source.dtype, rates(device, found.source.dtype)
        )
    free = {"memory": available_memory(), "disk": _disk(run.out)}
    description = "none" if data is None else data.description
    output.show(display.dry_run(plan, description, expected, free, size))
    details = {"dry_run": True, "recipe": run.recipe.model_dump(mode="json"), "calibration": description}
    details |= _plan_details(plan) | {"expected": expected and vars(expected), "free": free, "bytes": size}
    output.result(details, f"{run.out}: {len(plan.settings)} layers can be pruned")


def _plan_details(plan: Plan) -> dict[str, Any]:
    layers = [
        {"name": s.layer.name, "shape": list(s.layer.shape), "sparsity": s.sparsity, "granularity": str(s.granularity)}
        for s in plan.settings
    ]
    return {"layers": layers, "protected": dict(plan.protected)}


def _load(found: Any) -> Load:
    """What will pass through the model."""
    from secateur.doctor import positions

    batches = found.data.batches if found.data is not None else []
    longest = max((batch["input_ids"].numel() for batch in batches if "input_ids" in batch), default=0)
    wanted = longest or positions(found.source.model, found.plan.recipe.calibration.length)
    return Load(len(batches), wanted, len(found.riders))


def _disk(out: Path) -> int:
    place = next(parent for parent in out.resolve().parents if parent.exists())
    return shutil.disk_usage(place).free


if __name__ == "__main__":
    main()

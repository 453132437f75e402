"""What people see: tables and progress, made from results with rich. Nothing is computed here."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from secateur import doctor
from secateur.demo.run import Row
from secateur.demo.vision import NAMES, Lottery, interval
from secateur.estimate import Expected
from secateur.evaluation import Evaluation
from secateur.measure.quality import Estimate
from secateur.memory import anonymous_memory
from secateur.plan import Plan
from secateur.prune import LayerReport, Report
from secateur.recipe import ABOUT, METHODS, Recipe, to_yaml
from secateur.smaller import Shrunk
from secateur.strategy.pages import chance, reach
from secateur.strategy.propose import Expected as ExpectedScan
from secateur.strategy.propose import Proposal
from secateur.strategy.rounds import Outcome
from secateur.structure.survey import Survey

WORST = 5  # layers by error
NOTES = 5  # shown of each kind
QUIET_SECONDS = 10.0  # between lines of progress where there is no terminal
STAGES = {
    "measure": "measuring the dense model",
    "gradients": "gradients of the loss",
    "allocate": "comparing layers",
    "prune": "pruning",
    "verify": "verifying",
    "evaluate": "evaluating",
    "latency": "latency",
    "scan": "testing layers",
    "seeds": "training nets",
    "train": "training",
}
NO_GAIN = (
    "Zeros in a dense tensor give no speed and no smaller file by themselves; "
    "`secateur doctor` says what does, for which aim."
)


class Bars:
    """Progress on stderr: a bar on a terminal, elsewhere a line now and then."""

    def __init__(self, console: Console, shown: bool) -> None:
        self.console, self.shown = console, shown
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.stage, self.said = "", 0.0
        self.started = time.monotonic()

    def __enter__(self) -> Bars:
        if self.shown and self.console.is_terminal:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[detail]}"),
            )
            self.bar = Progress(*columns, console=self.console, transient=True, speed_estimate_period=3600)
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, stage: str, done: int, of: int, detail: str) -> None:
        """As `secateur.prune.Progress` wants it."""
        if not self.shown:
            return
        begins = stage != self.stage
        if begins:
            self.stage, self.started = stage, time.monotonic()
        detail = ", ".join(part for part in (detail, size(anonymous_memory())) if part)
        if self.bar is not None:
            self._draw(begins, done, of, detail)
        elif begins or done == of or time.monotonic() - self.said > QUIET_SECONDS:
            self.said = time.monotonic()
            left = (time.monotonic() - self.started) / done * (of - done) if done else 0
            ends = f", about {duration(left)} left" if 0 < done < of else ""
            self.console.print(Text(f"{STAGES.get(stage, stage)}: {done}/{of}, {detail}{ends}"), soft_wrap=True)

    def _draw(self, begins: bool, done: int, of: int, detail: str) -> None:
        assert self.bar is not None
        if begins:
            if self.task is not None:
                self.bar.remove_task(self.task)
            self.task = self.bar.add_task(STAGES.get(self.stage, self.stage), total=of, detail=detail)
        assert self.task is not None
        self.bar.update(self.task, completed=done, total=of, detail=detail)


# Recipes


def recipe_panel(recipe: Recipe, title: str) -> RenderableType:
    """The recipe as YAML."""
    return Panel(Syntax(to_yaml(recipe).strip(), "yaml", background_color="default"), title=title, title_align="left")


def methods() -> RenderableType:
    """All named methods, a line each."""
    table = _table("method", "what it is, and where it is from")
    for name in METHODS:
        table.add_row(name, ABOUT[name])
    return table


# Pruning


def result(report: Report, out: Path) -> RenderableType:
    """What happened, what it cost, how it was verified."""
    before, after = report.measures.get("before", {}), report.measures.get("after", {})
    table = _table(Text(str(out)), "before", "after", right=(1, 2))
    weights = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
    table.add_row(
        f"zeros in {len(report.layers)} pruned layers", "", f"{report.sparsity:.2%} of {weights / 1e6:,.1f} M weights"
    )
    table.add_row("weights on disk", size(before.get("bytes", 0)), size(after.get("bytes", 0)))
    if "perplexity" in after:
        was, now = before.get("perplexity"), after["perplexity"]
        told = "" if was is None else f"{was:,.2f}"
        table.add_row(f"perplexity, {after['windows']} windows not learned from", told, f"{now:,.2f}")
    return _spaced(table, _costs(report), *_notes(report), _worst(report), Text(NO_GAIN))


def _costs(report: Report) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    stages = ", ".join(
        f"{stage} {duration(spent)}" for stage, spent in report.seconds.items() if stage != "total" and spent >= 0.05
    )
    table.add_row("time", f"{duration(report.seconds.get('total', 0) + report.seconds.get('verify', 0))} ({stages})")
    table.add_row("peak memory", f"{size(report.peak_memory)}, files mapped into memory included")
    table.add_row("calibration", Text(report.calibration))
    how = report.verified
    apart = f", outputs {how['difference']:.1g} apart (at most {how['tolerance']:g})" if how.get("tolerance") else ""
    table.add_row("verified", Text(f"{how.get('how', 'no')}{apart}"))
    return table


def _notes(report: Report) -> list[RenderableType]:
    """Notes of one kind together: experts without tokens, damped Gram matrices."""
    kinds: dict[str, list[str]] = {}
    for layer in report.layers:
        for note in layer.notes:
            kinds.setdefault(note.split(":")[0], []).append(layer.name)
    lines: list[RenderableType] = []
    for kind, names in kinds.items():
        more = f" and {len(names) - NOTES} more" if len(names) > NOTES else ""
        lines.append(Text(f"note: {kind} ({len(names)} layers): {', '.join(names[:NOTES])}{more}", style="yellow"))
    return lines


def _worst(report: Report) -> RenderableType:
    """The layers whose outputs, or weights where nothing passed them, changed most."""
    table = _table("layers that changed most", "shape", "zeros", "relative squared change", right=(1, 2, 3))
    for layer in sorted(report.layers, key=_error, reverse=True)[:WORST]:
        table.add_row(
            Text(layer.name), shape(layer.shape), f"{layer.sparsity:.1%}", f"{layer.error:.3g} of {layer.measured_on}"
        )
    return table


def _error(layer: LayerReport) -> float:
    return layer.error if layer.error == layer.error else float("inf")


def closing(report: Report, out: Path) -> str:
    """The result in one line."""
    before, after = report.measures.get("before", {}), report.measures.get("after", {})
    quality = ""
    if "perplexity" in before and "perplexity" in after:
        quality = f", perplexity {before['perplexity']:,.2f} -> {after['perplexity']:,.2f}"
    verified = (
        "verified" if report.verified.get("tolerance") is not None else report.verified.get("how", "not verified")
    )
    return f"{out}: {report.sparsity:.1%} zeros{quality}, {verified}"


def dry_run(plan: Plan, data: str, expected: Expected | None, free: Mapping[str, int], needed: int) -> RenderableType:
    """The plan, and what it would take. free: bytes of memory and disk; needed: bytes on disk."""
    parts: list[RenderableType] = [layers_to_prune(plan)]
    if plan.protected:
        parts.append(reasons(plan.protected))
    table = Table.grid(padding=(0, 2))
    table.add_row("calibration", Text(data))
    if expected is not None:
        table.add_row("memory expected", f"about {size(expected.memory)}; {size(free['memory'])} are free")
        table.add_row("time expected", f"about {duration(expected.seconds)}, by a measurement of this machine")
    table.add_row("disk", f"{size(needed)}; {size(free['disk'])} are free")
    return _spaced(*parts, table, Text("Dry run: the input was checked, and nothing was written."))


def layers_to_prune(plan: Plan) -> RenderableType:
    """Layers that are alike share a row."""
    rows: dict[tuple[Any, ...], list[float]] = {}
    for s in plan.settings:
        how = f"{s.criterion}, {s.granularity}, {s.update}"
        rows.setdefault((doctor.pattern_of(s.layer.name), s.layer.shape, how, str(s.threshold or "")), []).append(
            s.sparsity
        )
    table = _table("to prune", "layers", "shape", "how", "zeros", right=(1, 2, 4))
    for (name, dims, how, threshold), sparsities in rows.items():
        low, high = min(sparsities), max(sparsities)
        zeros = f"{low:.1%}" if low == high else f"{low:.1%} to {high:.1%}"
        if plan.recipe.allocation != "uniform":
            zeros = f"by {plan.recipe.allocation}"
        table.add_row(Text(name), str(len(sparsities)), shape(dims), how, "by threshold" if threshold else zeros)
    return table


def reasons(protected: Mapping[str, str]) -> RenderableType:
    """Protected matrices, those of one reason together."""
    found: dict[str, dict[str, int]] = {}
    for name, reason in protected.items():
        like = found.setdefault(reason, {})
        like[doctor.pattern_of(name)] = like.get(doctor.pattern_of(name), 0) + 1
    table = _table("protected", "matrices", "names")
    for reason, like in found.items():
        shown = ", ".join(list(like)[:NOTES]) + (" ..." if len(like) > NOTES else "")
        table.add_row(reason, str(sum(like.values())), Text(shown))
    return table


# Evaluating


def shrunk(found: Shrunk, out: Path | None, build: str | None = None) -> RenderableType:
    """What structure went, what that saves, and how the result loads."""
    table = _table("", "before", "after", "", right=(1, 2, 3))
    rows = [("parameters", "params", "{:,}"), ("multiply-accumulates", "macs", "{:,}")]
    rows += [("bytes of the weights", "bytes", "{:,}")]
    rows += [("milliseconds of a forward", "milliseconds", "{:.2f}"), ("perplexity", "perplexity", "{:,.2f}")]
    for title, key, form in rows:
        if key in found.before:
            before, after = found.before[key], found.after.get(key)
            shown = "" if after is None else form.format(after)
            table.add_row(title, form.format(before), shown, "" if not after else f"{after / before:.2f}x")
    cuts = _table("what", "units", "left", right=(1, 2))
    for plan in found.plans:
        for parent, change in plan.layers.items():
            cuts.add_row(f"blocks of {parent}", str(change.before), str(len(change.kept)))
        for name, was in plan.sublayers.items():
            cuts.add_row(name, "1", f"0{' (nothing reads it)' if was.kind == 'unread' else ''}")
        for removal in plan.removals:
            if removal.left < removal.size:
                cuts.add_row(removal.coupling, f"{removal.size:,}", f"{removal.left:,}")
    last = [Text(f"proof: {p.promise}, difference {p.difference:.0e} of the largest output") for p in found.plans]
    if found.loads_with:
        ours = f'secateur.load("{out}"): no config has its shapes'
        if build is not None:
            ours = f'secateur.load("{out}", {build.rpartition(":")[2]}())'
        last.append(Text(f"loads with: {'stock transformers' if found.loads_with == 'stock' else ours}"))
    return _spaced(cuts, table, Group(*last))


def evaluation(found: Evaluation) -> RenderableType:
    """Perplexity; beside a dense model everything that is paired, with intervals."""
    compared = found.comparison
    heading = f"{found.windows} windows of {found.length} tokens of {found.text}"
    if compared is None:
        return Group(Text(heading), Text(f"perplexity of {found.model}: {found.quality.perplexity:,.3f}"))
    table = _table(Text(heading), "value", "95 % interval", right=(1, 2))
    table.add_row(Text(f"perplexity of {found.against}"), f"{compared.dense.perplexity:,.3f}", "")
    table.add_row(Text(f"perplexity of {found.model}"), f"{compared.pruned.perplexity:,.3f}", "")
    for name, estimate, form in (
        ("log of their ratio, nats per token (0 = no loss)", compared.log_ratio, ".4f"),
        ("KL from the dense model, mean, nats per token", compared.kl_mean, ".4f"),
        ("KL from the dense model, 99th percentile", compared.kl_p99, ".4f"),
        ("same first choice of token", compared.agreement, ".2%"),
    ):
        table.add_row(name, f"{estimate.value:{form}}", _interval(estimate, form))
    return table


def _interval(estimate: Estimate, form: str) -> str:
    return f"{estimate.low:{form}} to {estimate.high:{form}}"


def demo(rows: Sequence[Row]) -> RenderableType:
    """The dense model and what became of it, side by side."""
    table = _table("the model that ships", *(row.name for row in rows), right=range(1, len(rows) + 1))
    table.add_row("zeros in pruned layers", *(f"{row.sparsity:.0%}" for row in rows))
    table.add_row("weights on disk, MB", *(f"{row.bytes / 1e6:.2f}" for row in rows))
    table.add_row("latency of a window, ms", *(f"{row.latency:.1f}" for row in rows))
    table.add_row("perplexity", *(f"{row.perplexity:.3f}" for row in rows))
    for task in rows[0].accuracy:
        table.add_row(f"{task}, accuracy", *(f"{row.accuracy[task]:.2f}" for row in rows))
    return _spaced(table, Text(NO_GAIN))


# Doctor


def diagnosis(found: doctor.Diagnosis, names: bool) -> RenderableType:
    """names: every matrix in a line of its own, too."""
    parts: list[RenderableType] = [Text(_headline(found), style="bold")]
    parts += [Text(f"cannot be pruned: {problem}", style="red") for problem in found.problems]
    parts += [Text(remark, style="yellow") for remark in found.remarks]
    if found.layers:
        parts += [_groups("can be pruned", found.layers), _groups("protected", found.protected), *_patterns(found)]
    if found.structure is not None:
        parts += _structure(found.structure)
    elif found.structure_remark:
        parts.append(Text(f"structure: {found.structure_remark}", style="yellow"))
    if found.expected:
        parts.append(_expected(found))
    parts += [_advice(aim, advice) for aim, advice in found.advice.items()]
    if names:
        parts += [Text(f"{name}{'' if reason is None else f'    {reason}'}") for name, reason in found.names.items()]
    return _spaced(*parts)


def _structure(found: Survey) -> list[RenderableType]:
    """What --remove can name, and the reasons for the rest."""
    table = _table(
        "structure, for --remove", "couplings", "units of each", "removed equals", "loads with", right=(1, 2)
    )
    for stack, (count, loads) in found.blocks.items():
        table.add_row(f"layers ({stack})", "1", str(count), "skipped", loads)
    for kind, count in found.sublayers.items():
        table.add_row(kind, "1", str(count), "adding nothing", "secateur.load")
    if found.experts:
        counts = sorted(set(found.experts.values()))
        table.add_row(
            "experts", str(len(found.experts)), " to ".join(map(str, counts)), "never chosen", found.experts_load
        )
    for row in found.removable:
        sizes = f"{row.sizes[0]:,}" if len(row.sizes) == 1 else f"{row.sizes[0]:,} to {row.sizes[-1]:,}"
        promise = "masked" if row.exact else "masked, norms recomputed"
        table.add_row(row.kind, str(row.couplings), sizes, promise, row.loads or "secateur.load")
    reasons = _table("structure that stays", "because")
    for reason, names in found.protected.items():
        more = f" and {len(names) - 3} more" if names[3:] else ""
        reasons.add_row(", ".join(names[:3]) + more, reason)
    return [table, reasons] if found.protected else [table]


def _headline(found: doctor.Diagnosis) -> str:
    line = f"{found.model}: {found.architecture}, {size(found.bytes)}"
    if found.parameters:
        line += f", {found.parameters / 1e6:,.1f} M weights in {found.dtype}, {found.share:.0%} of them can be pruned"
    for block in found.blocks:
        line += f"\n{block.count} blocks {block.pattern} ({block.kind}, {block.shape[1] / 1e6:,.1f} M weights each)"
    return line


def _groups(title: str, found: Sequence[doctor.Group]) -> RenderableType:
    reasons = any(group.reason for group in found)
    table = _table(title, "matrices", "shape", *(["why"] if reasons else []), right=(1, 2))
    for group in found:
        table.add_row(
            Text(group.pattern), str(group.count), shape(group.shape), *([group.reason or ""] if reasons else [])
        )
    return table


def _patterns(found: doctor.Diagnosis) -> list[RenderableType]:
    fits = [pattern for pattern, broken in found.patterns.items() if not broken]
    lines: list[RenderableType] = [
        Text(f"patterns that divide every layer: {', '.join(fits) or 'none of those tried'}")
    ]
    for pattern, broken in found.patterns.items():
        if broken:
            globs = "  ".join(f"--protect '{name}'" for name in broken)
            lines.append(Text(f"pattern {pattern} does not divide all: {globs}", style="yellow"))
    return lines


def _expected(found: doctor.Diagnosis) -> RenderableType:
    assert found.calibration is not None
    windows = f"{found.calibration.windows} windows of {found.calibration.positions}"
    table = _table(f"method ({windows}, in {found.computing})", "memory, about", "time, about", "", right=(1, 2))
    for name, cost in found.expected.items():
        short = f"more than the {size(found.memory)} that are free" if cost.memory > found.memory else ""
        table.add_row(name, size(cost.memory), duration(cost.seconds), short)
    return table


def _advice(aim: str, advice: Iterable[doctor.Advice]) -> RenderableType:
    """A numbered list."""
    lines = Table.grid(padding=(0, 1))
    lines.add_row("", Text(aim, style="bold"))
    for number, entry in enumerate(advice, start=1):
        said = Text.assemble((entry.what, "bold"), f" ({entry.here}): {entry.effect}. How: {entry.how}.")
        lines.add_row(f"{number}.", said)
    return lines


# Words


def _spaced(*parts: RenderableType) -> RenderableType:
    """An empty line between two parts, unless both are lines of text."""
    lines: list[RenderableType] = []
    for before, part in zip((None, *parts), parts, strict=False):
        if before is not None and not (isinstance(before, Text) and isinstance(part, Text)):
            lines.append(Text(""))
        lines.append(part)
    return Group(*lines)


def _table(*columns: str | Text, right: Sequence[int] = ()) -> Table:
    table = Table(show_edge=False, header_style="bold", pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in right else "left", overflow="fold")
    return table


def shape(dims: Sequence[int]) -> str:
    """Out x in."""
    return " x ".join(f"{dim}" for dim in dims)


def size(count: float) -> str:
    """Bytes for people, in powers of 1000 and three digits."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            value = count / scale
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    return f"{count:.0f} bytes"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


# A strategy, and its rounds


def before_strategy(expected: ExpectedScan, tolerance: float) -> RenderableType:
    """What is coming, before it begins. tolerance: of top-1, as a share."""
    return Text(
        f"{expected.cells:,} cuts to be tested, one layer at a time: about {_duration(expected.scan)} and "
        f"{expected.memory / 1e9:.1f} GB. Each of {expected.rounds} rounds later: about {_duration(expected.round)} and "
        f"{expected.round_memory / 1e9:.1f} GB. They may lose {_tolerance(tolerance)}.\n"
    )


def before_rounds(expected: ExpectedScan, tolerance: float) -> RenderableType:
    """Likewise."""
    return Text(
        f"The dense model and up to {expected.rounds} rounds of cutting, training and measuring, about "
        f"{_duration(expected.round)} each; about {expected.round_memory / 1e9:.1f} GB. They may lose "
        f"{_tolerance(tolerance)}.\n"
    )


def _tolerance(share: float) -> str:
    much = ", which is much: 0.5% is half a point" if share > 0.1 else ""
    return f"{100 * share:g} points of top-1{much}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def strategy(found: Proposal, out: Path) -> RenderableType:
    """The baseline, what the layers can lose, and where the page is."""
    table = Table(title="largest threshold that one layer alone hardly feels (KL up to 0.01)")
    for name, right in (("layer", False), ("weights", True), ("threshold", True), ("of its weights", True)):
        table.add_column(name, justify="right" if right else "left")
    for name, size in list(found.sizes.items())[:12]:
        harmless = [p for p in found.probes if p.layer == name and p.by == "sigma" and p.kl <= 0.01]
        most = max(harmless, key=lambda p: p.value, default=None)
        table.add_row(
            name,
            f"{size:,}",
            "none" if most is None else f"{most.value:g} σ",
            "" if most is None else f"{most.sparsity:.0%}",
        )
    more = len(found.sizes) - 12
    dense = found.dense
    return Group(
        f"dense: top-1 {dense['top1']:.1%} ({dense['top1_low']:.1%} to {dense['top1_high']:.1%}) on "
        f"{dense['images']:,} images",
        *([Text(warning, style="bold red")] if (warning := chance(dense)) else []),
        table,
        *([f"and {more} more layers"] if more > 0 else []),
        reach(found),
        f"{len(found.rounds)} rounds to {found.wanted.sparsity:.0%}. Look at {out}/README.md, then: secateur run "
        f"{shlex.quote(str(out / 'recipe.yaml'))}",
    )


def rounds(found: Outcome, out: Path) -> RenderableType:
    """Every round."""
    table = Table(title="rounds")
    for name in ("round", "sparsity", "top-1", "drop, points", "flips", "non-zeros"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for trial in found.trials:
        m = trial.measures
        mark = " *" if trial.number == found.best and trial.progress > 0 else ""
        table.add_row(
            f"{trial.number}{mark}",
            f"{trial.sparsity:.1%}",
            f"{m['top1']:.2%}",
            f"{100 * m['drop']:+.2f} ± {100 * m['noise']:.2f}",
            f"{m['flips']:.1%}",
            f"{trial.costs['nnz']:,}",
            trial.verdict if trial.holds else "no",
        )
    kept = "The best (*) is" if found.kept is not None else "None held: the model as it was given is"
    where = f"{kept} {out}/model.safetensors; look at {out}/README.md."
    return Group(table, f"It ended because {found.ended}.", where)


def lottery(found: Lottery) -> RenderableType:
    """The four kinds of net after the last round."""
    table = Table(title=f"LeNet-300-100 on digits, {found.sparsity:.0%} of its weights gone")
    table.add_column("net, all trained equally")
    table.add_column("accuracy", justify="right")
    table.add_column("the pruned one is ahead by, points", justify="right")
    for kind, label in NAMES.items():
        mean, noise = interval(found.values(kind))
        ahead = "" if kind == "pruned" else "{:+.2f} ± {:.2f}".format(*(100 * v for v in found.ahead(kind)))
        table.add_row(label, f"{100 * mean:.2f} ± {100 * noise:.2f} %", ahead)
    return Group(table, f"Means over {len(found.values('pruned'))} seeds, 95 % intervals. Figure: {found.figure}")

"""Pages to look at: Markdown with tables and plots, of what a strategy found and of what its rounds came to."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.errors import SecateurError

if TYPE_CHECKING:
    from secateur.strategy.propose import Case, Proposal
    from secateur.strategy.rounds import Outcome, Trial

COLOURS = ("#2f6f4f", "#c8553d", "#3d6fa5", "#b08900", "#7a5195")
MANY = 40  # layers in a table; more are in the JSON


def check() -> None:
    """Raises SecateurError where plots cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SecateurError("plots need the package matplotlib: pip install 'secateur[vision]'") from None


# What a strategy found


def strategy(found: Proposal, folder: Path, out: Path) -> None:
    """README.md and its plots."""
    _heat(found, folder / "thresholds.png")
    _allocations(found, folder / "allocations.png")
    dense, wanted = found.dense, found.wanted
    lines = [
        f"# A strategy for {wanted.build}",
        "",
        f"The dense model: top-1 {_between(dense, 'top1')}, top-5 {_between(dense, 'top5')} (95 % intervals) on "
        f"{dense['images']:,} images; "
        f"{found.costs.params:,} parameters, {_short(found.costs.bytes)}B, {_short(found.costs.macs)} MACs, "
        f"{found.latency['p50_1']:.1f} ms an image (median; 95th percentile {found.latency['p95_1']:.1f}), "
        f"{found.latency['p50_32']:.0f} ms for 32.",
        "",
        *([f"**{warning}**", ""] if (warning := chance(dense)) else []),
        *(f"- {what}: {value}" for what, value in found.data.items()),
        "",
        "## Thresholds and sparsities that were tested",
        "",
        "One layer at a time, all others as they are, nothing trained: weights with |w| < q sigma go, where sigma is the "
        "standard deviation of the layer's weights. The colour is the KL divergence of the answers; the number the "
        "share of "
        "the layer's weights that went.",
        "",
        "![thresholds](thresholds.png)",
        "",
        *_layer_table(found),
        "",
        "## How to spread it over the layers",
        "",
        "The whole model at four sparsities, batch norms settled, nothing trained:",
        "",
        "![allocations](allocations.png)",
        "",
        *_table(
            ("allocation", *(f"KL at {_percent(s, 0)}" for s in _targets(found))),
            [(name, *(f"{kl:.3f}" for kl in kls)) for name, kls in _by_allocation(found).items()],
        ),
        "",
        f"Chosen: **{_allocation(found)}**. {reach(found)}",
        "",
        f"Protected: {', '.join(found.protected) or 'nothing'}.",
        "",
        *_proposal(found, out),
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def chance(dense: Mapping[str, Any]) -> str:
    """A word about a model that knows no more than its largest class; nothing about others."""
    if dense["top1_low"] > 1 / max(dense["classes"], 1):
        return ""
    return (
        "The dense model is no better than chance here: these are not its weights or its classes, or the images are "
        "scaled otherwise than in its training (--size, --mean, --std). What follows means nothing then."
    )


def reach(found: Proposal) -> str:
    """How far there is something left for training to begin from: half of the dense model's top-1, before any training."""
    own = sorted((a.sparsity, a.top1) for a in found.allocated if a.allocation == _chosen(found))
    short = next(((s, top1) for s, top1 in own if top1 < found.dense["top1"] / 2), None)
    if short is None:
        return f"Before any training the model keeps more than half of its top-1 up to {_percent(own[-1][0], 0)}."
    kept = [(s, top1) for s, top1 in own if s < short[0]]
    before = f"{_percent(kept[-1][1])} of top-1 at {_percent(kept[-1][0], 0)}, " if kept else ""
    return (
        f"Before any training the model has {before}{_percent(short[1])} at {_percent(short[0], 0)}: from there on little "
        "is left to begin from, and rounds that get there take long training and many images, if they do. A compact net "
        "comes to this point early."
    )


def _chosen(found: Proposal) -> str:
    return "measured" if found.wanted.overrides else found.wanted.allocation


def _allocation(found: Proposal) -> str:
    name = _chosen(found)
    return "measured (a sparsity of its own for every layer)" if name == "measured" else name


def _layer_table(found: Proposal) -> list[str]:
    """Per layer, the largest threshold that costs next to nothing, and what a high sparsity costs."""
    rows = []
    for name, size in list(found.sizes.items())[:MANY]:
        own = [p for p in found.probes if p.layer == name]
        sigmas = sorted((p for p in own if p.by == "sigma"), key=lambda p: p.value)
        harmless = [p for p in sigmas if p.kl <= HARMLESS]
        most = harmless[-1] if harmless else None
        high = [p for p in own if p.by == "sparsity"]
        rows.append(
            (
                name,
                f"{size:,}",
                "none" if most is None else f"{most.value:g} σ ({_percent(most.sparsity, 0)})",
                *(f"{p.kl:.3f} ({100 * p.drop:+.1f})" for p in sorted(high, key=lambda p: p.value)),
            )
        )
    values = sorted({p.value for p in found.probes if p.by == "sparsity"})
    head = (
        "layer",
        "weights",
        f"largest threshold with KL <= {HARMLESS:g}",
        *(f"KL (drop) at {_percent(v, 0)}" for v in values),
    )
    more = len(found.sizes) - len(rows)
    return [*_table(head, rows), *(["", f"{more} more layers are in strategy.json."] if more > 0 else [])]


HARMLESS = 0.01  # nats


def _proposal(found: Proposal, out: Path) -> list[str]:
    wanted, stop = found.wanted, found.wanted.stop
    steps = ", ".join(_percent(share, 0) for share in found.rounds)
    noise = 1.96 * (2 * 0.02 / found.dense["images"]) ** 0.5
    return [
        "## What to do",
        "",
        f"`recipe.yaml` goes in {len(found.rounds)} rounds: {steps} of the weights in all. Each one cuts by magnitude, "
        "settles batch norms (none, half or all of the statistics of the cut model, whichever brings its answers closest), "
        f"trains {_epochs(wanted.finetune.epochs)} with the learning rate rewound to {wanted.finetune.lr:g}, and measures. "
        "The dense model gets one such training, too, to be compared with.",
        "",
        "    " + f"secateur run {shlex.quote(str(out / 'recipe.yaml'))}",
        "",
        "## What to monitor, and when it stops",
        "",
        *_table(
            ("what", "why", "stops when"),
            [
                (
                    "top-1 against the dense model, on the same images",
                    "the quality that is promised",
                    f"it drops by more than {100 * stop.drop:g} points and the noise (about {100 * noise:.1f} points here, "
                    "where 2 % of the answers change each way)",
                ),
                (
                    "top-5, flips, KL",
                    "what top-1 hides: answers that changed, and how sure they are",
                    "never; look at it",
                ),
                (
                    "drop of every class",
                    "pruning takes from rare and hard classes first",
                    f"a class surely loses {stop.worst_class:g} times the mean drop or the tolerance",
                ),
                ("non-zeros, packed bytes", "what a sparse format stores", _goal(stop.packed, "bytes")),
                ("MACs with a weight that is not zero", "what a sparse kernel computes", "never; look at it"),
                (
                    "latency at batch 1 and 32, median and 95th percentile",
                    "zeros in dense tensors give no speed by themselves",
                    _goal(stop.latency, "ms"),
                ),
                ("dead channels", "what can be removed physically afterwards", "never; look at it"),
            ],
        ),
        "",
        f"Then the last step is halved {wanted.rounds.bisect} times between what held and what did not, and the "
        "best is kept.",
    ]


def _goal(value: float | None, unit: str) -> str:
    return "no goal was set" if value is None else f"{value:,} {unit} are reached"


def _epochs(number: int) -> str:
    return "1 epoch" if number == 1 else f"{number} epochs"


def _targets(found: Proposal) -> list[float]:
    from secateur.strategy.propose import TARGETS

    return list(TARGETS)


def _by_allocation(found: Proposal) -> dict[str, list[float]]:
    names = dict.fromkeys(a.allocation for a in found.allocated)
    return {name: [a.kl for a in found.allocated if a.allocation == name] for name in names}


def _heat(found: Proposal, path: Path) -> None:
    """Layers by thresholds."""
    import numpy as np
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    names = list(found.sizes)
    probes = {(p.layer, p.value): p for p in found.probes if p.by == "sigma"}
    values = sorted({value for _, value in probes})
    kls = np.array([[max(probes[name, value].kl, 1e-6) for value in values] for name in names])
    figure = Figure(figsize=(8, max(2.5, 0.24 * len(names) + 1.4)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(kls, aspect="auto", cmap="YlOrRd", norm=LogNorm(1e-4, max(1.0, kls.max())))
    axes.set_xticks(range(len(values)), [f"{value:g} σ" for value in values])
    axes.set_yticks(range(len(names)), names, fontsize=7)
    for row, name in enumerate(names):
        for column, value in enumerate(values):
            dark = kls[row, column] > 0.3
            axes.text(
                column,
                row,
                f"{100 * probes[name, value].sparsity:.0f}",
                ha="center",
                va="center",
                fontsize=6,
                color="white" if dark else "black",
            )
    axes.set_xlabel("threshold: weights below it go (number: % of the layer's weights)")
    figure.colorbar(image, ax=axes, label="KL, nats")
    figure.savefig(path, dpi=130)


def _allocations(found: Proposal, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for colour, name in zip(COLOURS, dict.fromkeys(a.allocation for a in found.allocated), strict=False):
        own = [a for a in found.allocated if a.allocation == name]
        axes.plot([100 * a.sparsity for a in own], [100 * a.top1 for a in own], "o-", color=colour, label=name)
    axes.set_xlabel("sparsity, % of the weights that may go")
    axes.set_ylabel("top-1 before any training, %")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


# What rounds came to


def rounds(found: Outcome, folder: Path, case: Case) -> None:
    """README.md and its plots."""
    _curve(found, folder / "rounds.png")
    kept = found.kept
    _classes(found, case.sets.test.classes, folder / "classes.png")
    dense, costs = found.dense, found.dense_costs
    best = kept if kept is not None and kept.progress > 0 else None
    lines = [
        f"# {found.wanted.build}, pruned in rounds",
        "",
        _headline(found, best),
        "",
        f"It ended because {found.ended}." if found.ended else "",
        *_training_costs(found),
        *_further(found),
        "",
        "![rounds](rounds.png)",
        "",
        *_table(
            (
                "round",
                "sparsity",
                "top-1",
                "drop ± noise",
                "before training",
                "top-5",
                "flips",
                "KL",
                "class that lost most",
                "verdict",
            ),
            [_trial_row(t, case.sets.test.classes, found.best) for t in found.trials],
        ),
        "",
        *_table(
            (
                "round",
                "non-zeros",
                "packed, bytes",
                "MACs with a weight",
                "dead channels",
                "ms, 1: median, 95th",
                "ms, 32",
                "dense beside it, 1 and 32",
            ),
            [
                (
                    "given",
                    f"{costs['nnz']:,}",
                    _short(costs["packed"]),
                    _short(costs["nnz_macs"]),
                    f"{costs['dead_channels']} of {costs['channels']:,}",
                    "",
                    "",
                    "",
                ),
                *(_cost_row(t) for t in found.trials),
            ],
        ),
        "",
        "In brackets: 95 % intervals. Drop: of top-1, in points, against the model that was given, on the same images; "
        "noise: half of its 95 % interval. "
        "Round 0 is the dense model with one round's training. Zeros in dense tensors give no speed and no smaller file by "
        "themselves: packed is what a bit for every weight and the non-zeros would take; dead channels can be removed "
        "physically.",
        "",
        "![classes](classes.png)" if best is not None else "",
        "",
        f"Measured on {case.sets.test.description}, trained on {case.sets.train.description}. The written file was loaded "
        f"into a fresh module: its answers differ by {found.verified:.1e} of the largest.",
        f"Dense: top-1 {_between(dense, 'top1')}, top-5 {_between(dense, 'top5')}.",
        "",
        "## Sparsity of each layer",
        "",
        *_table(("parameter", "sparsity"), [(name, _percent(s)) for name, s in found.layers.items()]),
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _headline(found: Outcome, best: Trial | None) -> str:
    if best is None:
        return "**Nothing held**: the file is the model as it was given."
    loss = best.measures
    trained = found.trials[0].measures["top1"]
    return (
        f"**{_percent(best.sparsity)} of the weights are gone** in the layers that may lose some; top-1 is "
        f"{_percent(loss['top1'])}: {100 * loss['drop']:+.2f} ± {100 * loss['noise']:.2f} points lost against the "
        "dense model "
        f"({_percent(found.dense['top1'])}; {_percent(trained)} with one round's training)."
        + _beyond(found.wanted.stop.drop, loss)
    )


def _beyond(asked: float, loss: Mapping[str, Any]) -> str:
    """Where a round holds only since these images cannot tell."""
    if loss["drop"] <= asked:
        return ""
    return (
        f" **That is more than the {100 * asked:.2f} points that were asked for**: it holds because {loss['images']:,} "
        "images tell no better. Measure on more, or take an earlier round."
    )


def _training_costs(found: Outcome) -> list[str]:
    """Where the training alone loses more than the rounds may, they are not to blame."""
    dense = found.trials[0].measures
    if dense["drop"] <= found.wanted.stop.drop:
        return []
    return [
        "",
        f"**Round 0 says that the training itself costs {100 * dense['drop']:.2f} points**, without any pruning: lower its "
        "learning rate, give it more images, or more of the dense model's answers (finetune: distil), before you "
        "blame what "
        "was cut.",
    ]


def _further(found: Outcome) -> list[str]:
    """What is left to try where rounds ended early."""
    if all(trial.holds for trial in found.trials):
        return []
    settings = found.wanted.finetune
    ways = ["more epochs a round (finetune: epochs)", "smaller steps (rounds: keep)"]
    ways += [] if settings.distil else ["the dense model as a teacher (finetune: distil)"]
    ways += [] if settings.augment else ["augmented images (finetune: augment)"]
    return ["", f"What may take it further: {', '.join(ways)}, more images to train on."]


def _trial_row(trial: Trial, classes: Sequence[str], best: int) -> tuple[str, ...]:
    m = trial.measures
    drop, worst = max((drop, -i) for i, drop in enumerate(m["class_drops"]) if drop is not None)
    name = classes[-worst] if -worst < len(classes) else str(-worst)
    return (
        f"**{trial.number}**" if trial.number == best and trial.progress > 0 else str(trial.number),
        _percent(trial.sparsity),
        _between(m, "top1"),
        f"{100 * m['drop']:+.2f} ± {100 * m['noise']:.2f}",
        "" if trial.cut.get("top1") is None else _percent(trial.cut["top1"]),
        _between(m, "top5"),
        _percent(m["flips"]),
        f"{m['kl']:.3g}",
        f"{name} ({100 * drop:+.1f})",
        trial.verdict,
    )


def _cost_row(trial: Trial) -> tuple[str, ...]:
    c, ms = trial.costs, trial.latency
    return (
        str(trial.number),
        f"{c['nnz']:,}",
        _short(c["packed"]),
        _short(c["nnz_macs"]),
        f"{c['dead_channels']} of {c['channels']:,}",
        f"{ms['p50_1']:.2f}, {ms['p95_1']:.2f}",
        f"{ms['p50_32']:.1f}, {ms['p95_32']:.1f}",
        f"{ms['dense_p50_1']:.2f}, {ms['dense_p50_32']:.1f}",
    )


def _curve(found: Outcome, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.subplots()
    dense = 100 * found.dense["top1"]
    axes.axhline(dense, color="black", linewidth=1, label="dense, as given")
    axes.axhline(dense - 100 * found.wanted.stop.drop, color="black", linewidth=1, linestyle=":", label="tolerance")
    ranked = sorted(found.trials, key=lambda t: t.sparsity)
    x = [100 * t.sparsity for t in ranked]
    y = [100 * t.measures["top1"] for t in ranked]
    axes.errorbar(
        x, y, [100 * t.measures["noise"] for t in ranked], color=COLOURS[0], marker="o", capsize=3, label="trained"
    )
    cut = [t for t in ranked if t.cut.get("top1") is not None]
    axes.plot(
        [100 * t.sparsity for t in cut],
        [100 * t.cut["top1"] for t in cut],
        "x--",
        color=COLOURS[1],
        linewidth=1,
        label="cut, before training",
    )
    if failed := [t for t in ranked if not t.holds]:
        axes.plot(
            [100 * t.sparsity for t in failed],
            [100 * t.measures["top1"] for t in failed],
            "o",
            color=COLOURS[1],
            markersize=9,
            fillstyle="none",
            label="did not hold",
        )
    low = min(y) if y else dense
    axes.set_ylim(max(low - 6, 0), min(max([dense, *y]) + 2, 101))
    axes.set_xlabel("sparsity, %")
    axes.set_ylabel("top-1, %")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def _classes(found: Outcome, names: Sequence[str], path: Path) -> None:
    """The classes that lost and won most."""
    kept = found.kept
    if kept is None or kept.progress == 0:
        return
    from matplotlib.figure import Figure

    drops = [
        (drop, names[i] if i < len(names) else str(i))
        for i, drop in enumerate(kept.measures["class_drops"])
        if drop is not None
    ]
    ranked = sorted(drops, reverse=True)
    chosen = ranked if len(ranked) <= 24 else [*ranked[:12], *ranked[-12:]]
    figure = Figure(figsize=(7, max(2.0, 0.2 * len(chosen) + 1)), layout="constrained")
    axes = figure.subplots()
    values = [-100 * drop for drop, _ in chosen]
    axes.barh(range(len(chosen)), values, color=[COLOURS[0] if v >= 0 else COLOURS[1] for v in values])
    axes.set_yticks(range(len(chosen)), [name.replace("$", r"\$") for _, name in chosen], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("change of a class's accuracy, points")
    axes.set_title(f"round {kept.number}, {100 * kept.sparsity:.1f} % sparse", fontsize=9)
    figure.savefig(path, dpi=130)


# Markdown


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    cells = [[str(cell).replace("|", r"\|") for cell in row] for row in rows]
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in cells)]


def _between(measures: Mapping[str, Any], what: str) -> str:
    """A share with its 95 % interval."""
    low, high = (100 * measures[f"{what}_{end}"] for end in ("low", "high"))
    return f"{_percent(measures[what])} ({low:.1f} to {high:.1f})"


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def _short(number: float) -> str:
    """1.25 M, 340 k, 12; a unit may follow."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"

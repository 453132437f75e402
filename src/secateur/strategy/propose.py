"""Test thresholds and sparsities of a classifier layer by layer, and write a recipe of what was found."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from secateur.card import environment
from secateur.data.images import Epochs
from secateur.errors import SecateurError
from secateur.estimate import PROCESS
from secateur.machine import check_device
from secateur.measure.classify import Answers, answers, lost
from secateur.measure.classify import as_dict as described
from secateur.measure.costs import TIMED, Costs, costs, latency
from secateur.module import find_function, fresh, open_weights
from secateur.pipeline import check_out
from secateur.plan import Plan, make_plan
from secateur.recipe import Override, Recipe, method
from secateur.recover import settle_
from secateur.recover.batchnorm import NORMS
from secateur.recover.finetune import check_tensorboard, optimizer_of
from secateur.state import LOCK, alone, begun, disk
from secateur.strategy import pages
from secateur.strategy.prefix import LIMIT, watch
from secateur.strategy.request import Sets, Source, Strategy, check_apart, make_strategy, read_sets
from secateur.strategy.scan import CUTS, Probe, measured_sparsities, probe
from secateur.training.masks import Masks
from secateur.training.moment import check_reachable, deviations, live
from secateur.training.rewind import KEPT, cut, progresses
from secateur.training.schedules import iterative, one_shot

TARGETS = (0.5, 0.8, 0.9, 0.95)  # of the whole model, by each allocation
ALLOCATIONS = ("uniform", "erdos-renyi", "lamp", "global", "measured")
IMAGES = 256  # that a scan asks about
NORM_BATCHES = 16  # of training images, for batch norms
PROBES, SPREADS = "scan.jsonl", "allocations.jsonl"

Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class Allocated:
    """The whole model at a sparsity, by an allocation, batch norms settled, nothing trained."""

    allocation: str
    sparsity: float
    top1: float
    kl: float


@dataclass
class Proposal:
    """What was found. dense: top-1 and so on; rounds: the sparsity of each; seconds: of each part."""

    wanted: Strategy
    dense: dict[str, Any]
    costs: Costs
    latency: dict[str, float]
    probes: list[Probe]
    allocated: list[Allocated]
    sizes: dict[str, int]
    protected: dict[str, str]
    data: dict[str, str]
    rounds: list[float]
    seconds: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "recipe": self.wanted.model_dump(mode="json"),
            "dense": self.dense,
            "costs": self.costs.as_dict(),
            "latency": self.latency,
            "scan": [asdict(p) for p in self.probes],
            "allocations": [asdict(a) for a in self.allocated],
            "protected": self.protected,
            "data": self.data,
            "rounds": self.rounds,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Expected:
    """What a proposal will take: seconds and bytes of memory of the scan, and of each round of the recipe."""

    scan: float
    round: float
    rounds: int
    memory: int
    round_memory: int
    cells: int


@dataclass
class Case:
    """A model and its images, examined."""

    make: Callable[[], nn.Module]
    model: nn.Module
    plan: Plan
    sets: Sets
    device: str
    weights: Any
    source: Source

    def images_key(self) -> list[Any]:
        """What tells these images from others."""
        sources = [self.source.source, *([self.source.train] if self.source.train else [])]
        found = hashlib.sha256()
        for path in sources:
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                if file.is_file():
                    stat = file.stat()
                    found.update(f"{file.relative_to(path)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return [found.hexdigest(), self.sets.test.description, self.sets.train.description]

    def batches(self, images: int) -> list[tuple[Tensor, Tensor]]:
        """Some images to measure on, drawn, in batches of which everything that the model computes can be kept."""
        drawn = self.sets.test.sample(images, 0)
        one = next(iter(drawn.batches(1, self.device)))[0]
        return list(drawn.batches(max(1, min(64, LIMIT // max(1, watch(self.model, {}, one).all))), self.device))

    @property
    def norm_images(self) -> int:
        """How many images its batch norms are estimated on."""
        norms = any(isinstance(module, NORMS) for module in self.model.modules())
        return min(64 * NORM_BATCHES, len(self.sets.train)) if norms else 0

    def norm_batches(self, size: int) -> list[Tensor]:
        """Training images for batch norms, drawn; none where there are no norms."""
        if not self.norm_images:
            return []
        found = [x for x, _ in self.sets.train.sample(size * NORM_BATCHES, 1).batches(size, self.device)]
        return found[:-1] if len(found) > 1 and len(found[-1]) == 1 else found  # one image has no variance


def examine(wanted: Strategy, device: str) -> Case:
    """Build, load, read the images, see that the model takes them. Raises SecateurError; writes nothing."""
    check_device(device)
    pages.check()
    weights = open_weights(wanted.weights)
    make = find_function(wanted.build)
    model = fresh(make, weights, "auto", device, frozen=False)
    plan = make_plan(model, wanted.recipe)
    _check_reachable(model, plan)
    sets = read_sets(wanted.data)
    Epochs(sets.train, wanted.finetune.batch, augment=wanted.finetune.augment)  # mistakes show now
    optimizer_of(model, wanted.finetune)
    if wanted.rounds.to is not None:
        if not wanted.rounds.to.is_file():
            raise SecateurError(f"rounds.to: there is no file {wanted.rounds.to}; expected an early step's safetensors")
        fresh(make, open_weights(wanted.rounds.to), "auto", device)
    if wanted.rounds.tensorboard:
        check_tensorboard()
    for images in (sets.test, sets.train):
        x, _ = images.batch(range(min(2, len(images))), device)
        try:
            given = answers(model, [(x, images.labels[: len(x)])])
        except SecateurError:
            raise
        except Exception as error:
            raise SecateurError(
                f"the model does not take images {list(x.shape)}: {error}\n  Say what it does take: --size, --mean, --std."
            ) from None
        outside = int(images.labels.max())
        if outside >= given.logits.shape[1]:
            raise SecateurError(
                f"labels go to {outside} in {images.description}; the model has {given.logits.shape[1]} classes, 0 to "
                f"{given.logits.shape[1] - 1}: the data is another model's, or its classes are numbered otherwise"
            )
    return Case(make, model, plan, sets, device, weights, wanted.data)


def _check_reachable(model: nn.Module, plan: Plan) -> None:
    check_reachable(plan, live(model, plan, Masks({}), deviations(model, plan)), one_shot)


def first_request(
    build: str,
    weights: Path,
    data: Source,
    *,
    out: Path,
    tolerance: float,
    target: float,
    finetune: Mapping[str, Any],
    keep: float = KEPT,
    protect: Sequence[str] = (),
) -> Strategy:
    """What is known before anything was measured."""
    values = {
        "build": build,
        "weights": weights,
        "out": out,
        "data": data.model_dump(exclude_none=True),
        "sparsity": target,
        "protect": list(protect),
        "finetune": dict(finetune),
        "rounds": {"keep": keep},
        "stop": {"drop": tolerance},
    }
    return make_strategy(values, "strategy")


def expect(case: Case, wanted: Strategy, images: int) -> Expected:
    """By a few forwards on this machine, before anything begins."""
    model, test, norms = case.model, len(case.sets.test), case.norm_images
    images = min(images, test)
    x = case.batches(min(images, 64))[0][0]
    layers = {s.layer.parameter: model.get_parameter(s.layer.parameter) for s in case.plan.settings}
    watch(model, layers, x)
    seen = watch(model, layers, x)
    one = seen.seconds / len(x)
    each = sum((len(CUTS) + 1) * (1 - begins) + begins for begins in seen.begins.values())
    spread = len(TARGETS) * len(ALLOCATIONS) * (4 * images + norms)
    trained = wanted.finetune.epochs * len(case.sets.train) * (4.5 if wanted.finetune.distil else 3.5)
    stored = sum(p.numel() * p.element_size() for p in model.parameters())
    test_memory = PROCESS + stored + case.sets.kept + 3 * seen.largest * 64 // len(x)
    scores = 20 * sum(p.numel() for p in layers.values())  # each as a float, all of them together, and those sorted
    backward = 3 * seen.all * min(wanted.finetune.batch, len(case.sets.train)) // (2 * len(x))  # with its buffers
    return Expected(
        one * (each * images + spread + test + images + TIMED),
        one * (trained + 2 * test + norms + 4 * IMAGES + 2 * TIMED),
        len(progresses(wanted.recipe, wanted.rounds.keep)) + wanted.rounds.bisect,
        test_memory + max(stored + scores, min(seen.all, LIMIT)),
        test_memory + (5 if wanted.rounds.to else 4) * stored + max(scores, backward),
        len(CUTS) * len(layers),
    )


def propose(
    wanted: Strategy,
    case: Case,
    out: Path,
    *,
    images: int = IMAGES,
    resume: bool = False,
    progress: Progress,
) -> Proposal:
    """Measure, decide, and write out/recipe.yaml, README.md with plots, strategy.json; what was scanned already is not
    scanned again.
    """
    started, seconds = time.perf_counter(), {}
    staging = out.with_name(f"{out.name}.partial")
    check_out(wanted.weights, out)
    check_apart(out, wanted.data)
    _prepare(staging, resume, _key(wanted, case, images))
    with alone(staging):
        batches = case.batches(images)
        dense_sample = answers(case.model, batches)
        progress("measure", 0, 1, "the dense model")
        dense = answers(case.model, case.sets.test.batches(64, case.device))
        case.norm_batches(64)  # an image that cannot be read shows before the scan
        probes = _scan(case, staging, batches, dense_sample, progress)
        seconds["scan"] = time.perf_counter() - started
        sizes = {s.layer.name: s.layer.shape[0] * s.layer.shape[1] for s in case.plan.settings}
        allocated = _allocations(case, wanted, staging, probes, sizes, batches, dense_sample, progress)
        final = _decide(case.model, wanted, allocated, probes, sizes)
        example = batches[0][0][:1]
        proposal = Proposal(
            final,
            described(dense),
            costs(case.model, example),
            latency({"dense": case.model}, example)["dense"],
            probes,
            allocated,
            sizes,
            dict(case.plan.protected),
            {"measured on": case.sets.test.description, "to train on": case.sets.train.description},
            steps(final, sizes),
            seconds,
        )
        seconds["total"] = time.perf_counter() - started
        with disk(staging):
            (staging / "recipe.yaml").write_text(recipe_text(final), encoding="utf-8")
            (staging / "strategy.json").write_text(json.dumps(proposal.as_dict(), indent=2), encoding="utf-8")
            pages.strategy(proposal, staging, out)
            os.replace(staging, out)
            (out / LOCK).unlink(missing_ok=True)
    return proposal


def steps(wanted: Strategy, sizes: Mapping[str, int]) -> list[float]:
    """The sparsity of every round, over all layers."""
    own = {override.match: override.sparsity or 0.0 for override in wanted.overrides}
    found = []
    for progress in progresses(wanted.recipe, wanted.rounds.keep):
        gone = sum(size * iterative(progress, own.get(name, wanted.sparsity or 0.0)) for name, size in sizes.items())
        found.append(gone / sum(sizes.values()))
    return found


def recipe_text(wanted: Strategy) -> str:
    """YAML that `secateur run` takes as it is."""
    head = (
        "# Written from measurements; see README.md beside it. Run it:  secateur run recipe.yaml\n"
        "# Relative paths start at the directory where the command runs.\n"
    )
    unread = {"damp", "calibration", "probes", "dtype", "update", "include"}  # by magnitude, at their defaults
    return head + yaml.safe_dump(wanted.model_dump(mode="json", exclude_none=True, exclude=unread), sort_keys=False)


def _key(wanted: Strategy, case: Case, images: int) -> dict[str, Any]:
    file = case.weights.folder / case.weights.shards[0]
    asked = wanted.model_dump(mode="json", include={"build", "weights", "data", "protect"})
    stat = file.stat()
    weights = [stat.st_size, stat.st_mtime_ns]
    return {"asked": asked, "count": images, "weights": weights, "images": case.images_key(), "versions": environment()}


def _prepare(staging: Path, resume: bool, key: dict[str, Any]) -> None:
    """A folder to work in. Raises SecateurError where there is one already that is not to be gone on with."""
    text = json.dumps(key, sort_keys=True, default=str)
    if staging.exists():
        path = staging / "key.json"
        known = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        if not resume:
            raise SecateurError(f"{staging} is what a run that was stopped has left: go on with --resume, or delete it")
        if not _is_json(known) and begun(staging):
            raise SecateurError(f"{staging} is damaged: key.json, which says what it is of, is not whole. Delete it")
        if known and known != text:
            raise SecateurError(f"{staging} was made with other settings: give the same, or delete it")
        if known:
            return
    with disk(staging):
        staging.mkdir(parents=True, exist_ok=True)
        partial = staging / "key.json.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, staging / "key.json")


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _scan(
    case: Case, staging: Path, batches: list[tuple[Tensor, Tensor]], dense: Answers, progress: Progress
) -> list[Probe]:
    path = staging / PROBES
    found = _rows(path, Probe)
    known = {(p.layer, p.by, p.value) for p in found}
    number, count = 0, len(CUTS) * len(case.plan.settings)
    for setting in case.plan.settings:
        layer = setting.layer.name
        cuts = [(by, value) for by, value in CUTS if (layer, by, value) not in known]
        number += len(CUTS) - len(cuts)
        if not cuts:
            continue

        def tick(share: float, before: int = number, more: int = len(cuts), layer: str = layer) -> None:
            progress("scan", before + int(share * more), count, layer)

        tick(0.0)
        probes = probe(case.model, setting, cuts, batches, dense, tick)
        number += len(cuts)
        found += probes
        _add(path, probes)
    progress("scan", count, count, "done")
    return found


def _rows(path: Path, kind: Callable[..., Any]) -> list[Any]:
    """What an earlier run has written. Half a line, which a killed one may have left, is cut off."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    try:
        found = [kind(**json.loads(line)) for line in whole]
    except (ValueError, TypeError) as error:
        raise _damaged(path, error) from None
    if whole != lines:
        with disk(path.parent):
            partial = path.with_name(f"{path.name}.partial")
            partial.write_bytes(b"".join(whole))
            os.replace(partial, path)
    return found


def _damaged(path: Path, why: Any) -> SecateurError:
    return SecateurError(f"{path} is damaged ({why}): delete {path.parent}, and begin anew")


def _add(path: Path, entries: Sequence[Any]) -> None:
    with disk(path.parent), path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(entry)) + "\n" for entry in entries)


def _allocations(
    case: Case,
    wanted: Strategy,
    staging: Path,
    probes: Sequence[Probe],
    sizes: Mapping[str, int],
    batches: list[tuple[Tensor, Tensor]],
    dense: Answers,
    progress: Progress,
) -> list[Allocated]:
    """The whole model at some sparsities, by every allocation."""
    norms, path = case.norm_batches(64), staging / SPREADS
    grid = list(itertools.product(TARGETS, ALLOCATIONS))
    found = _rows(path, Allocated)
    if [entry.allocation for entry in found] != [name for _, name in grid[: len(found)]]:
        raise _damaged(path, "its lines are not in order")
    for number, (target, allocation) in list(enumerate(grid))[len(found) :]:
        progress("allocate", number, len(grid), f"{allocation} {target:.0%}")
        model = copy.deepcopy(case.model)
        recipe = allocation_recipe(wanted, allocation, target, probes, sizes)
        masks = cut(model, recipe, Masks({}), 1.0)
        masks.apply_(model)
        settle_(model, norms, lambda model=model: lost(dense, answers(model, batches)).kl)
        given = answers(model, batches)
        found.append(Allocated(allocation, masks.sparsity, given.top1.value, lost(dense, given).kl))
        _add(path, found[-1:])
    progress("allocate", len(grid), len(grid), "done")
    return found


def allocation_recipe(
    wanted: Strategy,
    allocation: str,
    target: float,
    probes: Sequence[Probe],
    sizes: Mapping[str, int],
) -> Recipe:
    """A recipe of magnitude for the whole model. The target counts the layers that are pruned."""
    protect = wanted.protect
    if allocation != "measured":
        return method("magnitude", sparsity=target, allocation=allocation, protect=protect)
    shares = measured_sparsities(probes, sizes, target)
    overrides = [Override(match=name, sparsity=round(share, 4)) for name, share in shares.items()]
    return method("magnitude", sparsity=target, overrides=overrides, protect=protect)


def _reaches(model: nn.Module, recipe: Recipe, sizes: Mapping[str, int]) -> bool:
    """Whether an allocation goes as far as the recipe asks."""
    if recipe.overrides:  # measured: of every layer
        gone = sum((override.sparsity or 0.0) * sizes[override.match] for override in recipe.overrides)
        return gone / sum(sizes.values()) > (recipe.sparsity or 0.0) - 0.002
    try:
        _check_reachable(model, make_plan(model, recipe))
    except SecateurError:
        return False
    return True


def _decide(
    model: nn.Module,
    wanted: Strategy,
    allocated: Sequence[Allocated],
    probes: Sequence[Probe],
    sizes: Mapping[str, int],
) -> Strategy:
    """The allocation whose KL has the lowest ranks over the sparsities, of those that reach the target."""
    target = wanted.sparsity if wanted.sparsity is not None else 0.95
    recipes = {name: allocation_recipe(wanted, name, target, probes, sizes) for name in ALLOCATIONS}
    able = [name for name in ALLOCATIONS if _reaches(model, recipes[name], sizes)]
    recipe = recipes[best_allocation(allocated, able)]
    changed = {key: getattr(recipe, key) for key in ("allocation", "overrides", "protect")}
    return wanted.model_copy(update=changed)


def best_allocation(allocated: Sequence[Allocated], able: Sequence[str] = ALLOCATIONS) -> str:
    """By the mean of its ranks; of equals the first one that is able."""
    per_target = [allocated[i : i + len(ALLOCATIONS)] for i in range(0, len(allocated), len(ALLOCATIONS))]
    ranks: dict[str, float] = dict.fromkeys(ALLOCATIONS, 0.0)
    for group in per_target:
        for rank, entry in enumerate(sorted(group, key=lambda a: a.kl)):
            ranks[entry.allocation] += rank
    return min(able, key=lambda name: ranks[name])

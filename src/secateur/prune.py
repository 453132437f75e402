"""The pipeline: what can be pruned, how important it is, how much goes from where, and the change itself.

`prune_` works on a module in memory. A checkpoint goes the same way one block at a time, see `pipeline`.
"""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from secateur.data import Batch, Data, call, from_iterable
from secateur.errors import SecateurError
from secateur.forward import default_loss, no_cache
from secateur.memory import trim
from secateur.plan import Plan, Setting, allocated, make_plan, needs_scores, undivided, with_sparsities
from secateur.recipe import Recipe
from secateur.stream.observe import Watched, collect, make_observable
from secateur.stream.walk import Resident, Stopped, Store, walk
from secateur.weights.allocation import Summary, summarize
from secateur.weights.criteria import CRITERIA
from secateur.weights.gradients import Derivatives, Loss, derivatives
from secateur.weights.layers import Layer, all_layers
from secateur.weights.stats import Inputs, Stats
from secateur.weights.update import UPDATES

Progress = Callable[[str, int, int, str], None]  # stage, done, of, what is at hand
GRADIENTS = frozenset({"gradient", "fisher", "curvature"})


def no_progress(stage: str, done: int, of: int, detail: str) -> None:
    """Report to nobody."""


@dataclass
class LayerReport:
    """What happened to a layer. error: relative squared change of its outputs on some calibration tokens, or of its
    weights where no data was used.
    """

    name: str
    shape: tuple[int, int]
    sparsity: float
    removed: int
    error: float
    measured_on: str = "outputs"
    notes: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What happened to a model."""

    recipe: Recipe
    layers: list[LayerReport] = field(default_factory=list)
    protected: Mapping[str, str] = field(default_factory=dict)
    calibration: str = "none"
    data_digest: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    measures: dict[str, Any] = field(default_factory=dict)
    verified: dict[str, Any] = field(default_factory=dict)
    peak_memory: int = 0

    @property
    def sparsity(self) -> float:
        """Share of zeros over the pruned layers."""
        weights = sum(layer.shape[0] * layer.shape[1] for layer in self.layers)
        return sum(layer.removed for layer in self.layers) / max(weights, 1)

    @property
    def notes(self) -> list[str]:
        """Everything out of the ordinary, with the layer's name."""
        return [f"{layer.name}: {note}" for layer in self.layers for note in layer.notes]


class Keeper(Protocol):
    """What happens to a block once it is pruned. done: the reports of a block that an earlier run pruned."""

    def done(self, block: str) -> list[LayerReport] | None: ...
    def keep(self, block: str, changed: Collection[str], reports: list[LayerReport]) -> None: ...
    def allocation(self, make: Callable[[], dict[str, float]]) -> dict[str, float]: ...
    def stored_dtype(self, parameter: str) -> torch.dtype | None: ...


class InPlace:
    """Nothing but the module's own memory."""

    def done(self, block: str) -> list[LayerReport] | None:
        return None

    def keep(self, block: str, changed: Collection[str], reports: list[LayerReport]) -> None: ...

    def allocation(self, make: Callable[[], dict[str, float]]) -> dict[str, float]:
        return make()

    def stored_dtype(self, parameter: str) -> torch.dtype | None:
        return None


@dataclass
class Job:
    """Everything that a pruning run works on. riders: batches that go along to the end and are not learned from; guesses:
    those of them that the model may not take, whose output then is None.
    dense: where blocks come from before pruning begins; `store` gives those that an earlier run pruned as they now are.
    """

    model: nn.Module
    plan: Plan
    data: Data | None
    store: Store
    keeper: Keeper
    progress: Progress = no_progress
    loss: Loss | None = None
    riders: Sequence[Batch] = ()
    guesses: Sequence[Batch] = ()
    finish: Callable[[int, Any], None] | None = None
    dense: Store | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    chosen: Callable[[Layer, Tensor], None] | None = None

    @property
    def batches(self) -> list[Batch]:
        """Riders first, then what is learned from."""
        return [*self.riders, *(self.data.batches if self.data is not None else ())]

    def forward(self, batch: Batch) -> Any:
        """The model's own forward, without a cache: a block called twice would append to it twice."""
        try:
            with _taking(self.model, batch):
                return call(self.model, batch, **no_cache(self.model))
        except SecateurError:
            if any(batch is guess for guess in self.guesses):
                return None
            raise


@contextlib.contextmanager
def _taking(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Turn what a forward raises on a batch that it does not take into one clear error."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, LookupError, RuntimeError, AttributeError, AssertionError) as error:
        found = ", ".join(f"{key} {list(value.shape)}" for key, value in batch.items())
        wanted = ", ".join(inspect.signature(model.forward).parameters)
        raise SecateurError(
            f"{type(model).__name__} does not run on a batch of {found}: {error}\n"
            f"  A batch holds one tensor for each argument that it needs of: {wanted}."
        ) from error


def prune_(
    model: nn.Module,
    recipe: Recipe,
    data: Iterable[Any] | Data | None = None,
    *,
    loss: Loss | None = None,
    progress: Progress = no_progress,
    chosen: Callable[[Layer, Tensor], None] | None = None,
) -> Report:
    """Prune a module in place: pruned weights become 0, their shapes stay.

    data: batches (mappings of forward arguments, tensors, or (input, label) pairs); needed unless the recipe's
    criterion, update and allocation look at weights alone. loss(model, batch) -> scalar: for the criteria taylor, fisher
    and obd, which sum over batches (fisher as published wants batches of one sample); a language model has one by default.
    chosen: is told each layer and its keep mask [out, in], True = kept.

    Raises SecateurError, before anything changes where it can be known, and leaves the model as it was.
    """
    plan = make_plan(model, recipe)
    if data is not None and not isinstance(data, Data):
        data = from_iterable(data)
    modes, undo = [(module, module.training) for module in model.modules()], make_observable(model)
    before = {s.layer.parameter: model.get_parameter(s.layer.parameter).detach().clone() for s in plan.settings}
    model.eval()
    job = Job(model, plan, data, Resident(), InPlace(), progress, loss, chosen=chosen)
    try:
        return run(job)
    except BaseException:
        with torch.no_grad():
            for name, value in before.items():
                model.get_parameter(name).copy_(value)
        raise
    finally:
        undo()
        for module, training in modes:
            module.training = training


def run(job: Job) -> Report:
    """Prune block by block: each sees the outputs of the pruned ones before it."""
    started = time.perf_counter()
    _check_data(job)
    gradients = _gradients(job)
    if job.plan.recipe.allocation != "uniform":
        made = job.keeper.allocation(lambda: allocated(job.plan, _summaries(job, gradients)))
        job.plan = with_sparsities(job.plan, made)
    reports: dict[str, list[LayerReport]] = {}
    for block, inputs, visited in _blocks(job, "prune", job.plan.needs, job.keeper):
        if inputs is None:
            reports[block] = job.keeper.done(block) or []
            continue
        with _timed(job, "solve"):
            reports[block] = _prune_block(job, block, inputs, gradients, visited)
        with _timed(job, "write"):
            changed = {setting.layer.parameter for setting in job.plan.within(block)}
            job.keeper.keep(block, changed, reports[block])
    data = job.data
    job.seconds["total"] = time.perf_counter() - started
    return Report(
        job.plan.recipe,
        [report for block in job.plan.blocks for report in reports.get(block, [])],
        job.plan.protected,
        "none" if data is None else data.description,
        "" if data is None else data.digest,
        job.seconds,
    )


def _check_data(job: Job) -> None:
    needs = job.plan.recipe.needs()
    if needs and job.data is None:
        raise SecateurError(
            f"the recipe (criterion {job.plan.recipe.criterion}, update {job.plan.recipe.update}) needs calibration data, "
            "and there is none.\n  Give some, or use one that looks at weights alone: --method magnitude."
        )


def _blocks(
    job: Job, stage: str, needs: frozenset[str], keeper: Keeper | None
) -> Iterator[tuple[str, dict[str, Inputs] | None, bool]]:
    """(block, inputs per layer, whether data passed it), with the block's weights in place; inputs None: already done.

    Blocks that no batch enters come last, with no inputs.
    """
    plan, seen, total = job.plan, set(), len(job.plan.blocks)
    watch = bool(needs & {"squares", "gram"})
    batches = job.batches if (watch or job.riders) else []
    riders = set(range(len(job.riders)))
    hooked = {name: module for name, module in plan.blocks.items() if _has_forward(job.model, name)}
    try:
        last = time.perf_counter()
        for visit in walk(job.forward, hooked, batches, job.store, job.finish, riders):
            job.seconds["forward"] = job.seconds.get("forward", 0.0) + time.perf_counter() - last
            seen.add(visit.name)
            job.progress(stage, len(seen) - 1, total, visit.name or "the whole model")
            if keeper is not None and keeper.done(visit.name) is not None:
                yield visit.name, None, True
            else:
                inputs: dict[str, Inputs] = {}
                if watch:
                    with _timed(job, "statistics"):
                        inputs = _collect(job, visit.name, lambda v=visit: v.replay(riders), "gram" in needs)
                yield visit.name, inputs, watch
            last = time.perf_counter()
    except Stopped:
        pass
    for name, module in plan.blocks.items():
        if name in seen:
            continue
        job.progress(stage, len(seen), total, name or "the whole model")
        seen.add(name)
        done = keeper is not None and keeper.done(name) is not None
        job.store.load(name, module)
        yield name, None if done else {}, False
        job.store.free(name, module)
    job.progress(stage, total, total, "done")


def _has_forward(model: nn.Module, name: str) -> bool:
    return not isinstance(model.get_submodule(name), (nn.ModuleList, nn.ModuleDict, nn.ParameterList))


def _collect(job: Job, block: str, replay: Callable[[], Iterable[int]], gram: bool) -> dict[str, Inputs]:
    """What the block's layers were fed. Matrices whose orientation turned out otherwise are turned round in the plan."""
    watched: dict[str, list[str]] = {}
    for setting in job.plan.within(block):
        watched.setdefault(setting.layer.parameter, [])
    for layer, _ in all_layers(job.model.get_submodule(block)):
        full = f"{block}.{layer.parameter}" if block else layer.parameter
        if full in watched:
            watched[full].append(f"{block}.{layer.name}" if block else layer.name)
    targets = [Watched(job.model.get_parameter(name), names) for name, names in watched.items()]
    inputs, transposed = collect(replay, targets, gram)
    _turn(job, block, transposed)
    for s in job.plan.within(block):
        if transposed.get(s.layer.name, s.layer.transposed) != s.layer.transposed:
            inputs.pop(s.layer.name, None)  # used the other way round than its module would
    for name, seen in inputs.items():
        if seen.squares is not None and not bool(torch.isfinite(seen.squares).all()):
            raise SecateurError(
                f"the inputs of {name} have NaN or Inf values during calibration; expected finite activations.\n"
                "  Compute in float32 (--dtype float32), and check that the model itself gives finite outputs."
            )
    return inputs


def _turn(job: Job, block: str, transposed: Mapping[str, bool]) -> None:
    """Correct the orientation of raw matrices, which only their use tells. Raises SecateurError."""
    settings = []
    for s in job.plan.settings:
        flat = job.model.get_parameter(s.layer.parameter).ndim == 2
        bare = s.layer.kind == "expert" or (s.layer.kind == "other" and flat)
        if s.block == block and bare and transposed.get(s.layer.name, s.layer.transposed) != s.layer.transposed:
            shape = (s.layer.shape[1], s.layer.shape[0])
            s = replace(s, layer=replace(s.layer, transposed=not s.layer.transposed, shape=shape))
            if reason := undivided(s):
                raise SecateurError(
                    f"{s.layer.name} is used as {list(shape)}; pattern {s.granularity} needs a {reason}.\n"
                    f"  Protect it with  --protect '{s.layer.name}'."
                )
        settings.append(s)
    job.plan = replace(job.plan, settings=settings)


def _prune_block(
    job: Job, block: str, inputs: Mapping[str, Inputs], gradients: Mapping[str, Derivatives], visited: bool
) -> list[LayerReport]:
    settings = job.plan.within(block)
    last_user = {id(inputs[s.layer.name]): s.layer.name for s in settings if s.layer.name in inputs}
    reports = []
    for setting in settings:
        seen = inputs.get(setting.layer.name)
        trim()
        reports.append(_prune_layer(job, setting, seen, gradients.get(setting.layer.parameter)))
        if seen is not None and last_user[id(seen)] == setting.layer.name:
            seen.release()
    return reports


def _prune_layer(job: Job, setting: Setting, inputs: Inputs | None, derivative: Derivatives | None) -> LayerReport:
    layer = setting.layer
    parameter = job.model.get_parameter(layer.parameter)
    place = layer.matrix(parameter.data)
    weight = place.to(torch.float32, copy=True)
    if not bool(torch.isfinite(weight).all()):
        raise SecateurError(f"{layer.name} has NaN or Inf weights; expected finite ones")
    criterion, update, notes = setting.criterion, setting.update, []
    if setting.needs & {"squares", "gram"} and inputs is None:
        criterion, update = "magnitude", "none"
        notes.append("saw no calibration tokens: pruned by its weights alone")
    stats = _stats(job.plan.recipe, setting, inputs, derivative)
    choose = setting.choose(float(weight.std()) if weight.numel() > 1 else 0.0)
    try:
        new, keep = UPDATES[update].solve(weight, stats, choose, criterion)
    except SecateurError as error:
        raise SecateurError(f"{layer.name}: {error}") from None
    stored = job.keeper.stored_dtype(layer.parameter) or parameter.dtype
    new = place * keep if update == "none" else new.mul_(keep).to(stored)  # what only stays keeps its own precision
    layer.write_(parameter.data, new)
    rounded = new.float()
    if inputs is not None and inputs.damping is not None and inputs.damping > job.plan.recipe.damp:
        notes.append(f"Gram matrix not positive definite: damping raised to {inputs.damping:.3g}")
    error = inputs.output_change(weight, rounded) if inputs is not None else None
    if error is None:
        error, measured = _weight_change(weight, rounded), "weights"
    else:
        measured = "outputs"
    removed = int(weight.numel() - keep.sum())
    if job.chosen is not None:
        job.chosen(layer, keep)
    return LayerReport(layer.name, layer.shape, removed / weight.numel(), removed, error, measured, notes)


def _weight_change(before: Tensor, after: Tensor) -> float:
    return float((after - before).square().sum() / before.square().sum().clamp(min=1e-30))


def _stats(recipe: Recipe, setting: Setting, inputs: Inputs | None, derivative: Derivatives | None) -> Stats:
    layer = setting.layer
    stats = Stats(inputs or Inputs(), seed=setting.seed(recipe.seed), damp=recipe.damp, rows=layer.shape[0])
    if derivative is not None:
        parts = (derivative.gradient, derivative.squares, derivative.curvature)
        stats.samples = derivative.samples
        stats.gradient, stats.gradient_squares, stats.curvature_sum = (
            None if part is None else layer.matrix(part) for part in parts
        )
    return stats


def _gradients(job: Job) -> Mapping[str, Derivatives]:
    """Derivatives of the loss for the layers whose criterion reads them, at the dense weights."""
    wanted = [s for s in job.plan.settings if s.needs & GRADIENTS]
    if not wanted:
        return {}
    assert job.data is not None
    loss = job.loss or default_loss(job.model)

    def checked(model: nn.Module, batch: Batch) -> Tensor:
        with _taking(model, batch):
            return loss(model, batch)

    total = len(job.data.batches)
    names = sorted({s.layer.parameter for s in wanted})
    needs = frozenset().union(*(s.needs for s in wanted)) & GRADIENTS
    store = job.dense or job.store
    with _timed(job, "gradients"):
        for name, module in job.plan.blocks.items():
            store.load(name, module)
        found = derivatives(
            job.model,
            names,
            job.data.batches,
            checked,
            needs,
            job.plan.recipe.probes,
            job.plan.recipe.seed,
            lambda index: job.progress("gradients", index + 1, total, "loss"),
        )
        for name, module in job.plan.blocks.items():
            store.free(name, module)
    return found


def _summaries(job: Job, gradients: Mapping[str, Derivatives]) -> list[Summary]:
    """A first pass over the dense model for allocations that compare layers."""
    plan = job.plan
    if not needs_scores(plan):
        return [_shape_summary(job, s) for s in plan.settings if not s.fixed]
    criterion = "wanda" if plan.recipe.allocation == "owl" else plan.recipe.criterion
    needs = CRITERIA[criterion].needs
    found = []
    store = job.dense or job.store
    first = Job(job.model, plan, job.data, store, InPlace(), job.progress, job.loss, seconds=job.seconds)
    for block, inputs, _ in _blocks(first, "allocate", needs, None):
        for setting in first.plan.within(block):
            if setting.fixed:
                continue
            layer = setting.layer
            seen = (inputs or {}).get(layer.name)
            if seen is None and needs & {"squares", "gram"}:
                continue  # its scores would compare with nobody's: it keeps the target sparsity
            weight = layer.matrix(job.model.get_parameter(layer.parameter).data).float()
            stats = _stats(plan.recipe, setting, seen, gradients.get(layer.parameter))
            scores = CRITERIA[criterion].score(weight, stats)
            shape = _shape_summary(job, setting).shape
            found.append(summarize(layer.name, shape, block, scores, plan.recipe.allocation))
        for seen in (inputs or {}).values():
            seen.release()
    job.plan = first.plan
    return found


def _shape_summary(job: Job, setting: Setting) -> Summary:
    shape = tuple(job.model.get_parameter(setting.layer.parameter).shape)
    shape = shape if setting.layer.index is None else shape[1:]
    return Summary(setting.layer.name, shape, setting.block)


class _timed:
    def __init__(self, job: Job, stage: str) -> None:
        self.job, self.stage = job, stage

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.job.seconds[self.stage] = self.job.seconds.get(self.stage, 0.0) + time.perf_counter() - self.start

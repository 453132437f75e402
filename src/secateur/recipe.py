"""A recipe says how to prune, on independent axes; what can be combined stands in one table, RULES."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from secateur.errors import SecateurError
from secateur.weights.allocation import ALLOCATIONS
from secateur.weights.criteria import CRITERIA
from secateur.weights.granularity import Granularity, parse
from secateur.weights.update import UPDATES


class Part(BaseModel):
    """A part of a recipe: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Threshold(Part):
    """Weights below it go: |w| < absolute, or |w| < sigma standard deviations of the layer's weights."""

    absolute: float | None = Field(None, gt=0)
    sigma: float | None = Field(None, gt=0)


class Calibration(Part):
    """samples windows of length tokens, evenly spaced, or drawn with a seed. source: a text, JSONL or tensor file; None is
    the text that ships.
    """

    source: Path | None = None
    field: str | None = None
    samples: int = Field(default=64, ge=1)
    length: int = Field(default=512, ge=2)
    seed: int | None = None


class Training(Part):
    """How masks change while a model trains; what is None is left to the method. See `secateur.training.Pruner`."""

    method: str = "gradual"
    schedule: str | None = None
    start: float = Field(0.0, ge=0, le=1)
    end: float = Field(0.75, ge=0, le=1)
    every: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Training:
        if self.end < self.start:
            raise ValueError(
                f"it ends at {self.end}, before it starts at {self.start}: shares of the steps, start <= end"
            )
        return self


class Override(Part):
    """Other settings for the layers whose names match a glob; a later override wins."""

    match: str
    sparsity: float | None = Field(None, ge=0, lt=1)
    threshold: Threshold | None = None
    granularity: str | None = None
    criterion: str | None = None
    update: str | None = None


class Recipe(Part):
    """How to prune. Each axis is independent of the others as far as RULES allow.

    sparsity is the share removed, in [0, 1); damp is relative to the mean of the Gram matrix's diagonal.
    """

    criterion: str = "wanda"
    granularity: str = "layer"
    sparsity: float | None = Field(None, ge=0, lt=1)
    threshold: Threshold | None = None
    allocation: str = "uniform"
    update: str = "admm"
    damp: float = Field(0.01, gt=0, le=10)
    protect: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = ()
    calibration: Calibration = Calibration()
    training: Training | None = None
    probes: int = Field(4, ge=1, description="Rademacher probes per batch for the curvature of `obd`")
    seed: int = Field(0, ge=0, lt=2**63)
    dtype: str = "auto"

    @model_validator(mode="wrap")
    @classmethod
    def _one_error(cls, values: Any, handler: ModelWrapValidatorHandler[Recipe], info: ValidationInfo) -> Recipe:
        """Recipe(sparsity=1.2) fails in our words, too, not in pydantic's."""
        try:
            return handler(values)
        except ValidationError as error:
            raise _in_our_words(cls, error, (info.context or {}).get("where", "recipe")) from None

    def model_post_init(self, _context: Any) -> None:
        check(self)

    def needs(self) -> frozenset[str]:
        """Statistics that the recipe reads; empty when it never runs data."""
        axes = [(self.criterion, self.update)] + [
            (o.criterion or self.criterion, o.update or self.update) for o in self.overrides
        ]
        found = frozenset().union(*(CRITERIA[c].needs | UPDATES[u].needs for c, u in axes))
        return found | {"squares"} if self.allocation == "owl" else found


class Rule(NamedTuple):
    """What may not be combined: `broken` tells, `why` explains and names the way out."""

    title: str
    broken: Callable[[Recipe, Granularity], bool]
    why: str


RULES: tuple[Rule, ...] = (
    Rule(
        "how much to remove is said once",
        lambda r, g: g.kind != "n:m" and (r.sparsity is None) == (r.threshold is None),
        "give either a sparsity (--sparsity 0.5), a threshold, or an N:M pattern (--pattern 2:4)",
    ),
    Rule(
        "an N:M pattern fixes the sparsity",
        lambda r, g: g.kind == "n:m" and r.sparsity is not None and abs(r.sparsity - (1 - g.n / g.m)) > 1e-9,
        "the pattern N:M keeps N of every M weights, so its sparsity is 1 - N/M: leave --sparsity out",
    ),
    Rule(
        "an N:M pattern takes no threshold",
        lambda r, g: g.kind == "n:m" and r.threshold is not None,
        "a threshold decides how many weights go, and so does the pattern: drop one of them",
    ),
    Rule(
        "a threshold is on |w|",
        lambda r, g: r.threshold is not None and r.criterion != "magnitude",
        "a threshold compares |w|: use it with the criterion magnitude (--method magnitude)",
    ),
    Rule(
        "a threshold is absolute or in sigmas",
        lambda r, g: r.threshold is not None and (r.threshold.absolute is None) == (r.threshold.sigma is None),
        "a threshold has one of: absolute, sigma",
    ),
    Rule(
        "an allocation needs a sparsity to distribute",
        lambda r, g: r.allocation != "uniform" and (r.sparsity is None or g.kind == "n:m"),
        "a threshold and an N:M pattern already say how much goes from each layer: use the allocation uniform",
    ),
    Rule(
        "allocations by score need scores that compare",
        lambda r, g: r.allocation in ("global", "lamp") and r.criterion == "random",
        "scores of the criterion random do not compare layers: use the allocation uniform",
    ),
)


def check(recipe: Recipe) -> None:
    """Raise SecateurError for a name that does not exist or a combination that RULES exclude."""
    named = [("criterion", recipe.criterion, CRITERIA), ("update", recipe.update, UPDATES)]
    named += [("allocation", recipe.allocation, ALLOCATIONS)]
    for override in recipe.overrides:
        named += [("criterion", override.criterion, CRITERIA), ("update", override.update, UPDATES)]
        if override.granularity is not None:
            parse(override.granularity)
    for axis, value, known in named:
        if value is not None and value not in known:
            raise SecateurError(f"unknown {axis} {value!r}{nearest(value, known)}; known: {', '.join(known)}")
    if recipe.dtype not in DTYPES:
        raise SecateurError(f"unknown dtype {recipe.dtype!r}; known: {', '.join(DTYPES)}")
    granularity = parse(recipe.granularity)
    for rule in RULES:
        if rule.broken(recipe, granularity):
            raise SecateurError(f"recipe: {rule.why}")


DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def nearest(word: str, known: Any) -> str:
    """ " (did you mean 'x'?)" where a known word is close, for messages."""
    close = difflib.get_close_matches(word, list(known), 1, cutoff=0.7)
    return f" (did you mean {close[0]!r}?)" if close else ""


METHODS: dict[str, dict[str, Any]] = {
    "admm": {"criterion": "wanda", "granularity": "layer", "update": "admm"},
    "sparsegpt": {"criterion": "obs", "granularity": "layer", "update": "sparsegpt"},
    "wanda": {"criterion": "wanda", "granularity": "per-row", "update": "none"},
    "wanda-refit": {"criterion": "wanda", "granularity": "per-row", "update": "refit"},
    "ria": {"criterion": "ria", "granularity": "layer", "update": "none"},
    "magnitude": {"criterion": "magnitude", "granularity": "layer", "update": "none"},
    "global-magnitude": {"criterion": "magnitude", "granularity": "layer", "update": "none", "allocation": "global"},
    "lamp": {"criterion": "magnitude", "granularity": "layer", "update": "none", "allocation": "lamp"},
    "owl": {"criterion": "wanda", "granularity": "per-row", "update": "none", "allocation": "owl"},
    "obs": {"criterion": "obs", "granularity": "layer", "update": "none"},
    "obd": {"criterion": "obd", "granularity": "layer", "update": "none"},
    "fisher": {"criterion": "fisher", "granularity": "layer", "update": "none"},
    "taylor": {"criterion": "taylor", "granularity": "layer", "update": "none"},
    "random": {"criterion": "random", "granularity": "layer", "update": "none"},
}
DEFAULT_METHOD, DEFAULT_SPARSITY = "admm", 0.5

ABOUT: dict[str, str] = {
    "admm": "Least squares with the mask as part of the problem. The default. Boza 2024; ALPS, Meng et al. 2024",
    "sparsegpt": "Column by column, the weights that stay make up for those that go. Frantar & Alistarh 2023",
    "wanda": "Weight times input norm, within each row; weights do not change. Sun et al. 2023",
    "wanda-refit": "Wanda's choice, then least-squares values for what stays. Sun et al. 2023",
    "ria": "A weight's share of its row and column, times the input norm. Zhang et al. 2024",
    "magnitude": "The smallest weights of each layer; reads no data. Han et al. 2015",
    "global-magnitude": "The smallest weights of the whole model; reads no data. Han et al. 2015",
    "lamp": "Magnitude, with scores that compare across layers; reads no data. Lee et al. 2021",
    "owl": "Wanda, with less from layers that have more outliers. Yin et al. 2024",
    "obs": "Optimal brain surgeon's choice, layer by layer; weights do not change. Hassibi & Stork 1992",
    "obd": "Curvature of the loss; needs the whole model in memory. LeCun et al. 1989",
    "fisher": "Empirical Fisher information; needs the whole model in memory. Theis et al. 2018",
    "taylor": "Weight times gradient of the loss; needs the whole model in memory. Molchanov et al. 2017",
    "random": "No information at all: the baseline that every method has to beat",
}


def method(name: str, **changes: Any) -> Recipe:
    """A named recipe, with changes: method("sparsegpt", granularity="2:4"). Raises SecateurError."""
    return validate(Recipe, METHODS[known_method(name)] | changes)


def known_method(name: Any) -> str:
    """The name of a method, or a SecateurError."""
    if not isinstance(name, str) or name not in METHODS:
        raise SecateurError(f"unknown method {name!r}{nearest(str(name), METHODS)}; known: {', '.join(METHODS)}")
    return name


class Run(Recipe):
    """A recipe, and what to apply it to: a model folder, or a function that builds a module and its weights."""

    model: str | None = None
    out: Path | None = None
    build: str | None = None
    weights: Path | None = None
    method: str | None = Field(None, description="the named recipe that the other keys change")

    @property
    def recipe(self) -> Recipe:
        """The recipe alone."""
        return Recipe(**{key: getattr(self, key) for key in Recipe.model_fields})


def make_run(values: Mapping[str, Any], where: str = "recipe") -> Run:
    """From the keys of a Run, those of its method filled in; what stands nowhere has a default. Raises SecateurError.

    A threshold without a method takes magnitude. Without a sparsity, threshold or N:M pattern the sparsity is 0.5.
    """
    name = values.get("method")
    if name is None:
        name = "magnitude" if values.get("threshold") and "criterion" not in values else DEFAULT_METHOD
    base = METHODS[known_method(name)] | {key: value for key, value in values.items() if value is not None}
    base["method"] = name
    amounts = ("sparsity" in base, "threshold" in base, ":" in str(base.get("granularity", "")))
    return validate(Run, base if any(amounts) else base | {"sparsity": DEFAULT_SPARSITY}, where)


Model = TypeVar("Model", bound=BaseModel)


def validate(kind: type[Model], values: Mapping[str, Any], where: str = "recipe") -> Model:
    """Build a model of the recipe, or raise one SecateurError that names the key, what was found and what is known."""
    try:
        return kind.model_validate(dict(values), context={"where": where})
    except ValidationError as error:
        raise _in_our_words(kind, error, where) from None


def _in_our_words(kind: type[BaseModel], error: ValidationError, where: str) -> SecateurError:
    return SecateurError("\n  ".join(f"{where}: {_explain(kind, e)}" for e in error.errors()))


def _explain(kind: type[BaseModel], error: Any) -> str:
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "value_error":  # raised by a validator of ours
        return f"{path}: {error['ctx']['error']}".removeprefix(": ")
    if error["type"] == "extra_forbidden":
        known = _fields(kind, error["loc"][:-1])
        return f"unknown key {path!r}{nearest(str(error['loc'][-1]), known)}; known: {', '.join(known)}"
    number = path.endswith("granularity") and isinstance(error["input"], int)
    hint = '; quote it: "2:4" (YAML takes it for a number)' if number else ""
    return f"{path} is {error['input']!r}: {error['msg'].lower()}{hint}"


def _fields(kind: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """The keys that a place in a model has."""
    for step in path:
        if field := kind.model_fields.get(step):
            kind = next((part for part in _models(field.annotation)), kind)
    return list(kind.model_fields)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models within an annotation: of tuples, and of what may be None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises SecateurError when there is none."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SecateurError(f"no recipe at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SecateurError(f"cannot read {path}: {error}") from None
    except yaml.YAMLError as error:
        raise SecateurError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise SecateurError(f"{path}: expected a mapping of keys to values, found {type(values).__name__}")
    return values


def to_yaml(recipe: BaseModel) -> str:
    """The recipe as YAML, defaults included, so that it can be edited and read back."""
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True), sort_keys=False)

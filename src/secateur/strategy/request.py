"""What a strategy's recipe says: what to prune, on which images, in which rounds, and when to stop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from secateur.data.images import IN_MEMORY, Images, load_images, parts
from secateur.errors import SecateurError
from secateur.recipe import METHODS, Part, Recipe, known_method, validate
from secateur.recover import Settings
from secateur.training.rewind import check_rewind


class Source(Part):
    """Images to measure on, and to train on. train: a source of its own; without one, a folder's or data set's training
    part, or else the images of `source` but a share of every class, `holdout`, which is measured on.
    """

    source: Path
    train: Path | None = None
    holdout: float = Field(0.5, gt=0, lt=1)
    size: int | None = Field(None, ge=1)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    images: int | None = Field(None, ge=2, description="measure on so many, drawn")
    train_images: int | None = Field(None, ge=2, description="train on so many, drawn")


class Rounds(Part):
    """keep: share of what is left that each round keeps. rewind: of the learning rate alone, or the weights that are left,
    too, to those of the file `to`, such as an early step's; by default to those that were given. bisect: trials between
    the last round that held and the first that did not. tensorboard: events of every training beside its log.
    """

    keep: float = Field(0.8, gt=0, lt=1)
    rewind: Literal["weights", "learning-rate"] = "learning-rate"
    to: Path | None = None
    bisect: int = Field(2, ge=0)
    tensorboard: bool = False


class Stop(Part):
    """A round fails when its drop of top-1 is beyond `drop` and the noise, or a class surely loses more than `worst_class`
    times as much. packed, latency: goals; rounds end where they are met (bytes; milliseconds of one image, the median).
    """

    drop: float = Field(0.005, ge=0, lt=1)
    worst_class: float = Field(3.0, ge=1)
    packed: int | None = Field(None, ge=1)
    latency: float | None = Field(None, gt=0)


class Strategy(Recipe):
    """A recipe that is reached in rounds."""

    build: str
    weights: Path
    out: Path | None = None
    method: str | None = None
    data: Source
    rounds: Rounds = Rounds.model_validate({})
    finetune: Settings = Settings.model_validate({})
    stop: Stop = Stop.model_validate({})

    @property
    def recipe(self) -> Recipe:
        """What is pruned at the end."""
        return Recipe(**{key: getattr(self, key) for key in Recipe.model_fields})


def make_strategy(values: Mapping[str, Any], where: str = "recipe") -> Strategy:
    """From the keys of a YAML file; what it does not say is magnitude's. Raises SecateurError."""
    given = {key: value for key, value in values.items() if value is not None}
    base = METHODS[known_method(given.get("method", "magnitude"))] | given
    if missing := [key for key in ("build", "weights", "data") if key not in base]:
        raise SecateurError(
            f"{where}: rounds need {missing[0]}: build, weights and data say what is pruned and measured"
        )
    if ":" in str(base.get("granularity", "")):
        raise SecateurError(
            f"{where}: an N:M pattern is there at once, and rounds would have nothing to do: use secateur prune"
        )
    if "sparsity" not in base and "threshold" not in base:
        base["sparsity"] = 0.95
    wanted = validate(Strategy, base, where)
    if wanted.training is not None:
        raise SecateurError(f"{where}: masks stay as they are within a round: drop `training`")
    check_rewind(wanted.rounds.rewind, wanted.rounds.keep, wanted.recipe)
    if wanted.rounds.to is not None and wanted.rounds.rewind != "weights":
        raise SecateurError(f"{where}: rounds.to says what weights go back to, and they stay: set rewind to weights")
    return wanted


@dataclass(frozen=True)
class Sets:
    """What is measured on, and what is trained on."""

    test: Images
    train: Images

    @property
    def kept(self) -> int:
        """Bytes of the pixels that are decoded once and kept."""
        sizes = [len(images) * images.read([0]).nbytes for images in (self.test, self.train)]
        return sum(size for size in sizes if size <= IN_MEMORY)


def read_sets(source: Source) -> Sets:
    """What is measured on and what is trained on, apart. Raises SecateurError."""
    settings: dict[str, Any] = {"size": source.size, "mean": source.mean, "std": source.std}
    own = all(parts(source.source)) if source.source.exists() else False
    saved = (source.source / "dataset_dict.json").is_file()
    if source.train is not None and source.train.resolve() == source.source.resolve() and not (own or saved):
        raise SecateurError(
            f"{source.train} is what is trained on and what is measured on: rounds would be judged by images that they "
            "have seen. Leave --train out, and a half of every class is kept for measuring"
        )
    if source.train is not None:
        test = load_images(source.source, **settings, part="test")
        train = load_images(source.train, **settings, part="train")
    elif own or saved:
        test, train = (load_images(source.source, **settings, part=part) for part in ("test", "train"))
    else:
        train, test = load_images(source.source, **settings).split(source.holdout, seed=0)
    _check_classes(test, train)
    floats = [images for images in (test, train) if images.read([0]).is_floating_point()]
    if len(floats) == 1:
        raise SecateurError(
            f"{floats[0].description} are floats, which go to the model as they are, and the others are pixels of 0 to "
            "255, which are scaled: give both in one way"
        )
    if min(len(test), len(train)) < 2:
        raise SecateurError(f"too few images: {len(train)} to train on, {len(test)} to measure on")
    test = test if source.images is None else test.sample(source.images, 0)
    return Sets(test, train if source.train_images is None else train.sample(source.train_images, 0))


def check_apart(out: Path, source: Source) -> None:
    """Raises SecateurError where what is written would lie among the images, and be read as a class the next time."""
    for path in (source.source, source.train):
        if path is not None and path.is_dir() and path.resolve() in out.resolve().parents:
            raise SecateurError(f"{out} would be in {path}, among the images: say where else (--out)")


def _check_classes(test: Images, train: Images) -> None:
    """Raises SecateurError when a label would be one class here and another one there."""
    if test.named and train.named and test.classes != train.classes:
        only = sorted(set(test.classes) ^ set(train.classes))
        raise SecateurError(
            f"the classes of {test.description} ({len(test.classes)}) and of {train.description} ({len(train.classes)}) "
            f"differ, {'by ' + ', '.join(only[:3]) if only else 'in their order'}"
        )
    for images, other in ((test, train), (train, test)):
        numbered = images.named and all(name.isdecimal() for name in images.classes)
        if numbered and not other.named and images.classes != tuple(map(str, range(len(images.classes)))):
            raise SecateurError(
                f"the folders of {images.description} are numbers, but not 0 to {len(images.classes) - 1}, and "
                f"{other.description} have numbers alone: which class is which cannot be told"
            )

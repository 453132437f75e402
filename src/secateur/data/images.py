"""Labelled images: a folder of class folders, arrays or encoded bytes in an .npz, a data set saved on disk."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from secateur.data.tensors import check_exists, load_numpy
from secateur.errors import SecateurError

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet: what most classifiers were trained with
CROP = 0.875  # share of the shorter side that a crop to the asked size takes, as ImageNet is measured
IN_MEMORY = 2 * 2**30  # bytes of pixels that are decoded once and kept
PARTS = {"train": ("train", "training"), "test": ("val", "valid", "validation", "test")}

LABELS, PIXELS = ("labels", "y", "label"), ("images", "x", "image", "pixels")  # arrays of an .npz

Read = Callable[[Sequence[int]], Tensor]


class How(NamedTuple):
    """How encoded images are read: cropped to a size, in gray."""

    size: int | None
    gray: bool


@dataclass(frozen=True)
class Images:
    """Images and their classes. read: indices -> pixels [n, channels, height, width], uint8 of 0..255, or floats that go to
    the model as they are; labels: [n] int64; mean, std: per channel, of pixels in 0..1; named: whether the source says what
    its classes are called.
    """

    read: Read
    labels: Tensor
    classes: tuple[str, ...]
    description: str
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    named: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Sequence[int], device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
        """What the model is given, and the labels."""
        pixels = self.read(indices).to(device)
        return self.scaled(pixels), self.labels[torch.as_tensor(indices)].to(device)

    def scaled(self, pixels: Tensor) -> Tensor:
        """Pixels as the model takes them."""
        if pixels.is_floating_point():
            return pixels
        channels = pixels.shape[1]
        mean, std = (torch.tensor(v[:channels], device=pixels.device).view(-1, 1, 1) for v in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std

    def batches(self, size: int, device: str | torch.device = "cpu") -> Iterator[tuple[Tensor, Tensor]]:
        """All, in order."""
        for start in range(0, len(self), size):
            yield self.batch(range(start, min(start + size, len(self))), device)

    def subset(self, indices: Sequence[int], what: str) -> Images:
        """Some of them, in that order."""
        chosen = torch.as_tensor(list(indices), dtype=torch.long)
        places = chosen.tolist()
        read = self.read
        return replace(
            self,
            read=lambda asked: read([places[i] for i in asked]),
            labels=self.labels[chosen],
            description=f"{what} of {self.description}",
        )

    def split(self, share: float, seed: int) -> tuple[Images, Images]:
        """Two parts, the second with a share of every class."""
        generator = torch.Generator().manual_seed(seed)
        second: list[int] = []
        due = 0.0  # of all classes so far: those of a single image take turns
        for label in self.labels.unique().tolist():
            own = (self.labels == label).nonzero().flatten()
            order = own[torch.randperm(len(own), generator=generator)]
            due += share * len(own)
            second += order[: round(due - 1e-9) - len(second)].tolist()
        rest = sorted(set(range(len(self))) - set(second))
        return self.subset(rest, f"{len(rest):,}"), self.subset(sorted(second), f"{len(second):,} others")

    def sample(self, count: int, seed: int) -> Images:
        """At most so many, drawn."""
        if count >= len(self):
            return self
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        return self.subset(sorted(chosen.tolist()), f"{count:,}")


def load_images(
    source: str | Path,
    *,
    size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    part: str | None = None,
) -> Images:
    """All labelled images of a source.

    A folder of class folders (classes in the order of their names), an .npz with `images` or `x` [n, h, w, 3], [n, h, w] or
    [n, 3, h, w] and `labels` or `y` [n], or with `jpeg` bytes, `offsets` [n + 1] and `labels`; or a data set that the
    library datasets saved, with an image and a label column. size: crops the middle after the shorter side was scaled;
    needed when images differ in size. mean, std: per channel in 0..1, ImageNet's by default, a single number for gray
    images; floats are taken as they are.
    part: train or test, of a folder or data set that has both.

    Raises SecateurError that names the file for whatever is missing, broken, or out of range.
    """
    path = Path(source)
    if size is not None and size < 1:
        raise SecateurError(f"size is {size}; expected the width of an image in pixels")
    how = How(size, mean is not None and len(mean) == 1)
    if path.is_dir():
        found = _saved(path, how, part) if _is_saved(path) else _folder(_part_of(path, part), how)
    elif path.suffix.lower() == ".npz":
        found = _npz(path, how)
    else:
        kind = "is no folder and no .npz file" if path.exists() else "does not exist"
        raise SecateurError(f"{path} {kind}; images come as a folder of class folders, an .npz, or a saved data set")
    if not len(found):
        raise SecateurError(f"{path} has no images")
    first = found.read([0])
    if first.is_floating_point():
        if mean is not None or std is not None:
            raise SecateurError(f"{path} has floats, which go to the model as they are: leave mean and std out")
        return found
    channels = int(first.shape[1])
    means, stds = tuple(mean or MEAN[:channels]), tuple(std or STD[:channels])
    if min(len(means), len(stds)) < channels:
        raise SecateurError(f"mean {means} and std {stds}: expected {channels} numbers each, one for every channel")
    if not all(value > 0 for value in stds):
        raise SecateurError(f"std {stds}: expected numbers above 0")
    if max((*means, *stds)) > 1:
        raise SecateurError(f"mean {means}, std {stds}: expected those of pixels in 0..1; divide by 255")
    return replace(found, mean=means, std=stds)


def from_tensors(pixels: Tensor, labels: Tensor, description: str, classes: Sequence[str] = ()) -> Images:
    """Images that are in memory. pixels: [n, ..], uint8 of 0..255 with channels first, or floats that the model takes."""
    names = tuple(classes) or tuple(str(i) for i in range(int(labels.max()) + 1))
    return Images(_of_tensor(pixels), labels.long().cpu(), names, description)


def parts(path: Path) -> tuple[bool, bool]:
    """Whether a source has a training part and a test part of its own."""
    if not path.is_dir():
        return False, False
    names = {entry.name for entry in path.iterdir() if entry.is_dir()}
    found = tuple(any(name in names for name in PARTS[part]) for part in ("train", "test"))
    return found[0], found[1]


def _part_of(path: Path, part: str | None) -> Path:
    train, test = parts(path)
    if part is None or not (train and test):
        return path
    return next(path / name for name in PARTS[part] if (path / name).is_dir())


# A folder of class folders


def _folder(path: Path, how: How) -> Images:
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    numbered = all(folder.name.isdecimal() for folder in folders)
    folders = sorted(folders, key=lambda folder: int(folder.name)) if numbered else folders
    if not folders:
        raise SecateurError(f"{path} has no class folders: expected {path}/<class>/<image>.jpg")
    known = [name for names in PARTS.values() for name in names]
    if part := next((folder.name for folder in folders if folder.name in known), None):
        raise SecateurError(
            f"{path} has a folder {part}, which is no class: name one with train and val in it, or the folder of "
            "the classes"
        )
    files: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        own = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES and not _hidden(f, folder))
        if not own:
            raise SecateurError(
                f"{folder} has no images ({', '.join(sorted(SUFFIXES)[:4])}, ..): every folder is a class.\n"
                "  Put some in, or take the folder away if the model does not know the class."
            )
        files += own
        labels += [label] * len(own)
    _same_size(files, how)

    def read(indices: Sequence[int]) -> Tensor:
        return _stack([(str(files[i]), files[i]) for i in indices], how)

    classes = tuple(folder.name for folder in folders)
    return _kept(Images(read, torch.tensor(labels), classes, f"{len(files):,} images of {path}", named=True))


def _hidden(file: Path, folder: Path) -> bool:
    """What systems and editors leave behind: .ipynb_checkpoints, ._photo.png."""
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _same_size(files: Sequence[Path], how: How) -> None:
    """Headers of all images are read: what is broken shows before any work. Raises SecateurError."""
    image = _pillow()
    first: tuple[Any, Path] | None = None
    for file in files:
        try:
            with image.open(file) as opened:
                found = opened.size
        except Exception as error:
            raise _broken(str(file), error) from None
        if first is None:
            first = found, file
        if how.size is None and found != first[0]:
            raise SecateurError(
                f"images differ in size: {first[1]} has {first[0]}, {file} has {found}: say what the model takes "
                "(--size 224)"
            )


def _broken(name: str, error: Exception) -> SecateurError:
    return SecateurError(f"{name} is no image that can be read ({error}): take it away or replace it")


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise SecateurError("encoded images need the package pillow: pip install 'secateur[vision]'") from None
    return Image


def _decoded(name: str, opened: Any, how: How) -> np.ndarray:
    image = _pillow()
    try:
        with image.open(opened) as found:
            picture = _bytes(found).convert("L" if how.gray else "RGB")
    except Exception as error:
        raise _broken(name, error) from None
    size = how.size
    if size is not None and picture.size != (size, size):
        scale = size / CROP / min(picture.size)
        width, height = (max(size, round(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), image.Resampling.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        picture = picture.crop((left, top, left + size, top + size))
    return np.asarray(picture).reshape(picture.size[1], picture.size[0], -1)


def _bytes(found: Any) -> Any:
    """An image of 16 bits with the upper eight of each pixel; others as they are."""
    if found.mode == "F":
        raise ValueError("its pixels are floats")
    if not found.mode.startswith("I"):
        return found
    values = np.asarray(found)
    if int(values.max()) > 65535 or int(values.min()) < 0:
        raise ValueError("its pixels have 32 bits")
    return _pillow().fromarray((values // 257).astype(np.uint8))


def _stack(items: Sequence[tuple[str, Any]], how: How) -> Tensor:
    """[n, 3, height, width] uint8."""
    if len(items) < 8:
        pixels = [_decoded(name, opened, how) for name, opened in items]
    else:
        with ThreadPoolExecutor(4) as pool:
            pixels = list(pool.map(lambda item: _decoded(item[0], item[1], how), items))
    shapes = {array.shape for array in pixels}
    if len(shapes) > 1:
        raise SecateurError(f"images differ in size ({sorted(shapes)}): say what the model takes (--size 224)")
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


def _kept(images: Images) -> Images:
    """With its pixels in memory, where they are few."""
    if not len(images):
        return images
    one = images.read([0])
    if one.numel() * len(images) > IN_MEMORY:
        return images
    pixels = torch.cat([images.read(range(i, min(i + 1000, len(images)))) for i in range(0, len(images), 1000)])
    return replace(images, read=_of_tensor(pixels))


def _of_tensor(pixels: Tensor) -> Read:
    def read(indices: Sequence[int]) -> Tensor:
        if isinstance(indices, range) and indices.step == 1:
            return pixels[indices.start : indices.stop]
        return pixels[torch.as_tensor(indices)]

    return read


# Arrays


def _npz(path: Path, how: How) -> Images:
    check_exists(path)
    arrays = load_numpy(
        path, {*LABELS, *PIXELS, "jpeg", "offsets"}
    )  # names of classes and the like may lie beside them
    labels = next((arrays[name] for name in LABELS if name in arrays), None)
    if labels is None or labels.ndim != 1 or labels.is_floating_point():
        found = ", ".join(f"{name} {list(value.shape)}" for name, value in arrays.items())
        raise SecateurError(f"{path}: expected integer `labels` [n]; it has {found}")
    labels = labels.long()
    if "jpeg" in arrays and "offsets" in arrays:
        read, count = _encoded(path, arrays, how)
    else:
        pixels = next((arrays[name] for name in PIXELS if name in arrays), None)
        if pixels is None:
            raise SecateurError(
                f"{path}: expected `images` [n, height, width, 3], or `jpeg` bytes and `offsets`; it has "
                f"{', '.join(arrays)}"
            )
        read, count = _of_tensor(_channels_first(path, pixels)), len(pixels)
    if count != len(labels):
        raise SecateurError(f"{path} has {count} images and {len(labels)} labels")
    if len(labels) and int(labels.min()) < 0:
        raise SecateurError(f"{path}: labels are classes from 0 on; found {int(labels.min())}")
    classes = tuple(str(i) for i in range(int(labels.max()) + 1 if len(labels) else 0))
    return _kept(Images(read, labels, classes, f"{count:,} images of {path.name}"))


def _channels_first(path: Path, pixels: Tensor) -> Tensor:
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    elif pixels.ndim == 4 and pixels.shape[-1] in (1, 3) and pixels.shape[1] not in (1, 3):
        pixels = pixels.permute(0, 3, 1, 2).contiguous()
    if pixels.ndim == 2 and pixels.is_floating_point():
        return pixels  # vectors: as they are
    if pixels.ndim == 4 and pixels.shape[-1] in (2, 4) and pixels.shape[1] not in (1, 3):
        raise SecateurError(f"{path}: images have {pixels.shape[-1]} channels; expected 1 or 3, without transparency")
    if pixels.ndim != 4 or (pixels.dtype != torch.uint8 and not pixels.is_floating_point()):
        raise SecateurError(
            f"{path}: images are {str(pixels.dtype).removeprefix('torch.')} {list(pixels.shape)}; expected uint8 or "
            "floats, [n, height, width, 3], [n, 3, height, width] or [n, height, width]"
        )
    if pixels.is_floating_point() and not bool(torch.isfinite(pixels).all()):
        raise SecateurError(f"{path}: images have NaN or infinity")
    return pixels.float() if pixels.is_floating_point() else pixels


def _encoded(path: Path, arrays: dict[str, Tensor], how: How) -> tuple[Read, int]:
    raw, offsets = arrays["jpeg"].numpy(), arrays["offsets"].tolist()
    if arrays["offsets"].is_floating_point() or raw.dtype != np.uint8:
        raise SecateurError(f"{path}: expected jpeg as bytes (uint8) and offsets as whole numbers")
    if sorted(offsets) != offsets or not offsets or offsets[0] < 0 or offsets[-1] > len(raw):
        raise SecateurError(f"{path}: offsets do not rise within the {len(raw):,} bytes of jpeg")

    def read(indices: Sequence[int]) -> Tensor:
        items = [(f"image {i} of {path}", io.BytesIO(raw[offsets[i] : offsets[i + 1]].tobytes())) for i in indices]
        return _stack(items, how)

    return read, len(offsets) - 1


# Data sets that the library datasets saved


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json"))


def _saved(path: Path, how: How, part: str | None) -> Images:
    try:
        import datasets
    except ImportError:
        raise SecateurError(f"{path} was saved by the package datasets: pip install 'secateur[vision]'") from None
    try:
        found: Any = datasets.load_from_disk(str(path))
    except Exception as error:
        raise SecateurError(f"{path} is no data set that can be read: {error}") from None
    which = ""
    if isinstance(found, datasets.DatasetDict):
        names = PARTS[part or "test"]
        chosen = next((name for name in names if name in found), None)
        if chosen is None:
            raise SecateurError(
                f"{path} has the parts {', '.join(map(str, found))}; expected one of {', '.join(names)}"
            )
        found, which = found[chosen], f", {chosen}"
    pictures = next((n for n, f in found.features.items() if isinstance(f, datasets.Image)), None)
    label = next((n for n in ("label", "labels", "y", "fine_label") if n in found.features), None)
    if pictures is None or label is None:
        columns = ", ".join(f"{n} ({type(f).__name__})" for n, f in found.features.items())
        raise SecateurError(f"{path}: expected a column of images and one named label; it has {columns}")
    feature = found.features[label]
    names = tuple(getattr(feature, "names", None) or ())
    try:
        labels = torch.tensor(found[label], dtype=torch.long)
    except (TypeError, ValueError, RuntimeError):
        odd = next(((i, v) for i, v in enumerate(found[label]) if not isinstance(v, int)), (0, None))
        raise SecateurError(
            f"{path}: row {odd[0]} of the column {label} is {odd[1]!r}; expected the number of a class "
            f"(data.class_encode_column({label!r}) makes numbers of names)"
        ) from None
    if len(labels) and int(labels.min()) < 0:
        raise SecateurError(f"{path}: labels are classes from 0 on; found {int(labels.min())}")
    encoded = found.cast_column(pictures, datasets.Image(decode=False))

    def read(indices: Sequence[int]) -> Tensor:
        rows = encoded[list(indices)][pictures]
        if None in rows:
            raise SecateurError(f"{path}: row {indices[rows.index(None)]} of the column {pictures} has no image")
        items = [
            (f"image {i} of {path}", io.BytesIO(row["bytes"]) if row["bytes"] else row["path"])
            for i, row in zip(indices, rows, strict=True)
        ]
        return _stack(items, how)

    classes = names or tuple(str(i) for i in range(int(labels.max()) + 1 if len(labels) else 0))
    return _kept(Images(read, labels, classes, f"{len(labels):,} images of {path}{which}", named=bool(names)))


# Epochs of training


@dataclass(frozen=True)
class Epochs:
    """Batches in a new order each epoch, the same for the same seed: what a resumed run sees is what it would have seen.

    augment: flip (left to right, half of them) and crop (an eighth of the size padded, then cut at random).
    """

    images: Images
    size: int
    seed: int = 0
    augment: tuple[str, ...] = ()
    device: str = "cpu"

    def __post_init__(self) -> None:
        unknown = [name for name in self.augment if name not in AUGMENT]
        if unknown:
            raise SecateurError(f"unknown augmentation {unknown[0]!r}; known: {', '.join(AUGMENT)}")
        if self.augment and not len(self.images.read([0]).shape) == 4:
            raise SecateurError("vectors are not augmented: leave augment empty")
        if self.size < 1:
            raise SecateurError(f"batch is {self.size}; expected 1 image or more")

    def __len__(self) -> int:
        """Steps of an epoch; the last batch may be smaller, but not a single image: batch norms need two."""
        whole, rest = divmod(len(self.images), self.size)
        return whole + (rest > 1 or whole == 0)

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch."""
        generator = torch.Generator().manual_seed((self.seed * 1000003 + number) % 2**63)
        order = torch.randperm(len(self.images), generator=generator).tolist()
        for step in range(len(self)):
            chosen = order[step * self.size : (step + 1) * self.size]
            pixels = self.images.read(chosen).to(self.device)
            for name in self.augment:
                pixels = AUGMENT[name](pixels, generator)
            yield self.images.scaled(pixels), self.images.labels[torch.tensor(chosen)].to(self.device)


def _flip(pixels: Tensor, generator: torch.Generator) -> Tensor:
    flipped = (torch.rand(len(pixels), generator=generator) < 0.5).to(pixels.device)
    return torch.where(flipped.view(-1, 1, 1, 1), pixels.flip(-1), pixels)


def _crop(pixels: Tensor, generator: torch.Generator) -> Tensor:
    _, _, height, width = pixels.shape
    pad = max(height, width) // 8
    padded = F.pad(pixels, (pad, pad, pad, pad))
    top, left = (torch.randint(2 * pad + 1, (len(pixels),), generator=generator).to(pixels.device) for _ in range(2))
    rows = top[:, None] + torch.arange(height, device=pixels.device)  # [n, height]
    columns = left[:, None] + torch.arange(width, device=pixels.device)
    image = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


AUGMENT: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {"flip": _flip, "crop": _crop}

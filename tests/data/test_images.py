"""Labelled images from folders, arrays and saved data sets; what is broken is named before any work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from secateur.data.images import Epochs, from_tensors, load_images, parts
from secateur.errors import SecateurError
from secateur.strategy.request import Source, read_sets

Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")


def picture(value: int, size: tuple[int, int] = (8, 8)) -> np.ndarray:
    return np.full((size[1], size[0], 3), value, np.uint8)


def class_folders(root: Path, count: int = 3, size: tuple[int, int] = (8, 8)) -> Path:
    for label, name in enumerate(("ape", "bee")):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(picture(100 * label + i, size)).save(root / name / f"{i}.png")
    return root


def test_a_folder_of_class_folders_gives_pixels_and_labels_in_the_order_of_names(tmp_path):
    found = load_images(class_folders(tmp_path / "d"), mean=[0, 0, 0], std=[1, 1, 1])
    assert found.classes == ("ape", "bee")
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1]
    x, y = found.batch([1, 4])
    assert y.tolist() == [0, 1]
    assert torch.equal(x[0], torch.full((3, 8, 8), 1 / 255))
    assert torch.equal(x[1], torch.full((3, 8, 8), 101 / 255))


def test_pixels_are_scaled_by_the_mean_and_deviation_of_each_channel(tmp_path):
    found = load_images(class_folders(tmp_path / "d"), mean=[0.1, 0.2, 0.3], std=[0.5, 0.25, 0.75])
    x, _ = found.batch([3])
    want = (100 / 255 - np.array([0.1, 0.2, 0.3])) / np.array([0.5, 0.25, 0.75])
    assert np.allclose(x[0, :, 0, 0].numpy(), want)


def test_a_size_takes_the_middle_after_the_shorter_side_was_scaled(tmp_path):
    root = tmp_path / "d"
    (root / "a").mkdir(parents=True)
    wide = np.zeros((16, 32, 3), np.uint8)
    wide[:, 12:20] = 255  # a stripe in the middle
    Image.fromarray(wide).save(root / "a/0.png")
    Image.fromarray(np.zeros((40, 20, 3), np.uint8)).save(root / "a/1.png")
    found = load_images(root, size=14, mean=[0, 0, 0], std=[1, 1, 1])
    x, _ = found.batch([0, 1])
    assert x.shape == (2, 3, 14, 14)
    assert torch.equal(x[0, 0, 7], torch.tensor([0.0] * 3 + [1.0] * 8 + [0.0] * 3))  # 16 -> 14 / 0.875 = 16: as it was


@pytest.mark.parametrize("layout", ["n h w 3", "n 3 h w", "n h w", "jpeg"])
def test_arrays_in_every_layout_are_the_same_images(tmp_path, layout):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (5, 8, 8, 3), dtype=np.uint8)
    labels = np.array([0, 1, 2, 1, 0])
    if layout == "jpeg":
        import io

        raw = []
        for image in pixels:
            stream = io.BytesIO()
            Image.fromarray(image).save(stream, "PNG")  # whatever pillow reads
            raw.append(stream.getvalue())
        offsets = np.cumsum([0, *map(len, raw)])
        np.savez(tmp_path / "d.npz", jpeg=np.frombuffer(b"".join(raw), np.uint8), offsets=offsets, labels=labels)
    else:
        if layout == "n h w":
            pixels = pixels[..., :1].repeat(3, -1)
        given = {"n h w 3": pixels, "n 3 h w": pixels.transpose(0, 3, 1, 2), "n h w": pixels[..., 0]}[layout]
        np.savez(tmp_path / "d.npz", images=given, y=labels)
    found = load_images(tmp_path / "d.npz", mean=[0.5] * 3, std=[0.5] * 3)
    want = (pixels.transpose(0, 3, 1, 2) / 255 - 0.5) / 0.5
    x, y = found.batch(range(5))
    assert np.allclose(x.numpy(), want[:, : x.shape[1]], atol=1e-6)
    assert y.tolist() == labels.tolist()


def test_a_saved_data_set_is_read_with_its_parts(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
    rows = {"image": [Image.fromarray(picture(i)) for i in range(4)], "label": [0, 1, 0, 1]}
    one = datasets.Dataset.from_dict(rows, features=features)
    both = datasets.DatasetDict({"train": one, "validation": one.select([3, 0])})
    both.save_to_disk(tmp_path / "set")
    train, test = (load_images(tmp_path / "set", part=part, mean=[0] * 3, std=[1] * 3) for part in ("train", "test"))
    assert len(train) == 4
    assert test.classes == ("x", "y")
    assert test.labels.tolist() == [1, 0]
    assert torch.equal(test.batch([0])[0], torch.full((1, 3, 8, 8), 3 / 255))


def test_a_folder_with_train_and_val_has_both_parts(tmp_path):
    class_folders(tmp_path / "d/train", 4)
    class_folders(tmp_path / "d/val", 2)
    assert parts(tmp_path / "d") == (True, True)
    assert [len(load_images(tmp_path / "d", part=part)) for part in ("train", "test")] == [8, 4]


def broken(root: Path) -> Path:
    (class_folders(root) / "bee/1.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    return root


def empty_class(root: Path) -> Path:
    (class_folders(root) / "cat").mkdir()
    return root


def two_sizes(root: Path) -> Path:
    Image.fromarray(picture(0, (9, 8))).save(class_folders(root) / "bee/9.png")
    return root


def saved(root: Path, **arrays) -> Path:
    np.savez(root.with_suffix(".npz"), **arrays)
    return root.with_suffix(".npz")


ONE = np.zeros((2, 8, 8, 3), np.uint8)
BAD = {
    "bee/1.png is no image that can be read": broken,
    "cat has no images": empty_class,
    "images differ in size: .*--size 224": two_sizes,
    "does not exist": lambda root: root,
    "a folder train, which is no class": lambda root: class_folders(root / "train").parent,
    "has no images": lambda root: saved(root, images=ONE[:0], labels=np.arange(0)),
    "has no class folders": lambda root: root.mkdir() or root,
    "expected integer `labels`": lambda root: saved(root, images=ONE),
    "2 images and 3 labels": lambda root: saved(root, images=ONE, labels=np.arange(3)),
    "from 0 on; found -1": lambda root: saved(root, images=ONE, labels=np.array([0, -1])),
    "expected `images`": lambda root: saved(root, labels=np.arange(2)),
    "expected uint8 or floats": lambda root: saved(root, images=ONE.astype(np.int64), labels=np.arange(2)),
    "NaN or infinity": lambda root: saved(root, images=np.full((2, 8, 8, 3), np.nan), labels=np.arange(2)),
    "offsets do not rise": lambda root: saved(
        root, jpeg=np.zeros(4, np.uint8), offsets=np.array([0, 9]), labels=np.arange(1)
    ),
    "pickled": lambda root: saved(root, images=np.array([{}], dtype=object), labels=np.arange(1)),
}


@pytest.mark.parametrize("says", BAD)
def test_what_is_wrong_is_said_once_and_with_its_name(tmp_path, says):
    with pytest.raises(SecateurError, match=says):
        load_images(BAD[says](tmp_path / "data"))


def test_a_broken_image_among_encoded_ones_is_named(tmp_path):
    path = saved(tmp_path / "d", jpeg=np.zeros(8, np.uint8), offsets=np.array([0, 4, 8]), labels=np.arange(2))
    with pytest.raises(SecateurError, match=r"image 0 of .*d\.npz is no image"):
        load_images(path)


def test_a_single_mean_reads_gray_images(tmp_path):
    found = load_images(class_folders(tmp_path / "d"), mean=[0.0], std=[1.0])
    x, _ = found.batch([4])
    assert torch.equal(x, torch.full((1, 1, 8, 8), 101 / 255))


def test_floats_and_vectors_go_to_the_model_as_they_are(tmp_path):
    rows = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    found = load_images(saved(tmp_path / "d", x=rows, y=np.arange(5)))
    assert np.array_equal(found.batch(range(5))[0].numpy(), rows)


def test_a_split_takes_a_share_of_every_class_and_leaves_nothing_out():
    labels = torch.arange(100) % 4
    images = from_tensors(torch.arange(100.0)[:, None], labels, "numbers")
    one, other = images.split(0.2, seed=3)
    assert torch.bincount(other.labels).tolist() == [5] * 4
    seen = torch.cat([one.read(range(len(one))), other.read(range(len(other)))]).flatten()
    assert sorted(seen.tolist()) == list(range(100))
    assert torch.equal(other.labels, (other.read(range(20)).flatten() % 4).long())


def test_an_epoch_has_every_image_once_and_is_the_same_again():
    images = from_tensors(torch.arange(53.0)[:, None], torch.zeros(53), "numbers")
    epochs = Epochs(images, 8, seed=1)
    first, again, other = ([x.flatten().tolist() for x, _ in epochs.epoch(n)] for n in (0, 0, 1))
    assert sorted(value for batch in first for value in batch) == list(range(53))
    assert first == again != other
    assert len(first) == len(epochs) == 7


def test_a_last_batch_of_one_image_is_left_out():
    images = from_tensors(torch.arange(17.0)[:, None], torch.zeros(17), "numbers")
    assert [len(x) for x, _ in Epochs(images, 8).epoch(0)] == [8, 8]


def test_flips_turn_half_of_the_images_and_crops_move_all_of_them():
    pixels = torch.zeros(400, 1, 16, 16, dtype=torch.uint8)
    pixels[:, 0, 5, 3] = 255
    images = from_tensors(pixels, torch.zeros(400), "points")
    found = torch.cat([x for x, _ in Epochs(images, 100, augment=("flip",)).epoch(0)])
    columns = found[:, 0, 5].argmax(1)
    assert set(columns.tolist()) == {3, 12}
    assert 150 < int((columns == 12).sum()) < 250
    moved = torch.cat([x for x, _ in Epochs(images, 100, augment=("crop",)).epoch(0)])
    places = {(int(i) // 16, int(i) % 16) for i in moved.flatten(1).argmax(1)}
    assert places == {(row, column) for row in range(3, 8) for column in range(1, 6)}  # two pixels each way
    with pytest.raises(SecateurError, match="unknown augmentation 'turn'"):
        Epochs(images, 8, augment=("turn",))


def test_classes_of_a_single_image_take_turns():
    images = from_tensors(torch.arange(100.0)[:, None], torch.arange(100), "numbers")
    one, other = images.split(0.5, seed=0)
    assert (len(one), len(other)) == (50, 50)


def numbered(root: Path, names: str) -> Path:
    for name in names.split():
        (root / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(picture(10 * int(name) + i)).save(root / name / f"{i}.png")
    return root


def test_images_of_sixteen_bits_are_those_of_eight(tmp_path):
    """Pillow's own conversion makes nearly all of their pixels white."""
    eight = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    for folder, values in (("8/a", eight), ("16/a", eight.astype(np.uint16) * 257)):
        (tmp_path / folder).mkdir(parents=True)
        Image.fromarray(values).save(tmp_path / folder / "0.png")
    one, other = (load_images(tmp_path / name).read([0]) for name in ("8", "16"))
    assert torch.equal(one, other)
    Image.fromarray(eight.astype(np.float32)).save(tmp_path / "8/a/1.tif")
    with pytest.raises(SecateurError, match=r"1\.tif is no image that can be read .its pixels are floats"):
        load_images(tmp_path / "8")


def test_what_systems_leave_behind_is_no_image(tmp_path):
    root = class_folders(tmp_path / "d")
    (root / "ape/.ipynb_checkpoints").mkdir()
    Image.fromarray(picture(1)).save(root / "ape/.ipynb_checkpoints/0.png")
    (root / "bee/._0.png").write_bytes(b"resource fork")
    assert load_images(root).labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_folders_that_are_numbers_are_in_the_order_of_the_numbers(tmp_path):
    assert load_images(numbered(tmp_path / "n", "0 1 2 10 11")).classes == ("0", "1", "2", "10", "11")


def test_classes_that_are_numbered_otherwise_are_refused(tmp_path):
    full, gap = numbered(tmp_path / "full", "0 1 2 3"), numbered(tmp_path / "gap", "0 2 3")
    for one, other in ((full, gap), (gap, full)):
        with pytest.raises(SecateurError, match="differ, by 1"):
            read_sets(Source(source=one, train=other))
    pixels = np.zeros((8, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "x.npz", images=pixels, labels=np.arange(8) % 4)
    assert len(read_sets(Source(source=full, train=tmp_path / "x.npz")).train) == 8
    with pytest.raises(SecateurError, match="which class is which cannot be told"):
        read_sets(Source(source=gap, train=tmp_path / "x.npz"))
    np.savez(tmp_path / "f.npz", images=pixels.astype(np.float32), labels=np.arange(8) % 4)
    with pytest.raises(SecateurError, match="give both in one way"):
        read_sets(Source(source=full, train=tmp_path / "f.npz"))


def test_scales_that_say_nothing_are_refused(tmp_path):
    root = class_folders(tmp_path / "d")
    with pytest.raises(SecateurError, match="divide by 255"):
        load_images(root, mean=[123.7, 116.3, 103.5], std=[58.4, 57.1, 57.4])
    np.savez(tmp_path / "f.npz", images=np.zeros((4, 8, 8, 3), np.float32), labels=np.arange(4))
    with pytest.raises(SecateurError, match="leave mean and std out"):
        load_images(tmp_path / "f.npz", mean=[0.5, 0.5, 0.5])
    np.savez(tmp_path / "rgba.npz", images=np.zeros((9, 8, 8, 4), np.uint8), labels=np.arange(9))
    with pytest.raises(SecateurError, match="4 channels"):
        load_images(tmp_path / "rgba.npz")


def test_rows_of_a_saved_data_set_that_are_nothing_are_named(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    images = [Image.fromarray(picture(i)) for i in range(3)]
    for name, columns, message in (
        ("words", {"image": images, "label": ["a", "b", "a"]}, "row 0 of the column label is 'a'"),
        ("gap", {"image": images, "label": [0, None, 1]}, "row 1 of the column label is None"),
        ("hole", {"image": [images[0], None, images[2]], "label": [0, 1, 1]}, "row 1 of the column image has no image"),
    ):
        saved = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
        saved.save_to_disk(tmp_path / name)
        with pytest.raises(SecateurError, match=message):
            load_images(tmp_path / name)


def test_what_lies_beside_images_in_an_npz_is_let_alone(tmp_path):
    images, labels = np.zeros((4, 8, 8, 3), np.uint8), np.arange(4, dtype=np.int16)
    np.savez(tmp_path / "x.npz", images=images, labels=labels, wnids=np.array(["n01", "n02", "n03", "n04"]))
    assert load_images(tmp_path / "x.npz").labels.tolist() == [0, 1, 2, 3]

"""Checkpoints against the bytes of their files, and against files that lie."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import fingerprint
from secateur import SecateurError
from secateur.stream.checkpoint import DTYPES, INDEX, SINGLE, open_checkpoint, read_json, to_bytes

quickly = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8).filter(
    lambda name: name != "__metadata__"
)


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    found = {}
    for name in draw(st.lists(NAMES, min_size=1, max_size=4, unique=True)):
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        found[name] = torch.randint(0, 2, shape).to(draw(st.sampled_from(list(DTYPES.values()))))
    return found


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@settings(quickly, max_examples=20)
@given(tensors())
def test_every_tensor_lies_where_the_checkpoint_says(tmp_path: Path, stored: dict[str, Tensor]) -> None:
    save_file(stored, tmp_path / SINGLE)
    content = (tmp_path / SINGLE).read_bytes()
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.entries) == set(stored)
    assert checkpoint.bytes == len(content)
    for name, entry in checkpoint.entries.items():
        assert content[entry.start : entry.stop] == raw(stored[name]) == bytes(to_bytes(stored[name], entry.dtype))
        assert entry.shape == tuple(stored[name].shape)
        assert DTYPES[entry.dtype] == stored[name].dtype
        read = checkpoint.read(name)
        assert read.dtype == stored[name].dtype
        assert torch.equal(read, stored[name])


@given(st.sampled_from(["F32", "BF16", "F16", "F64"]))
def test_bytes_are_rounded_to_the_stored_dtype(dtype: str) -> None:
    tensor = torch.randn(3, 5).t()
    assert bytes(to_bytes(tensor, dtype)) == raw(tensor.to(DTYPES[dtype]))


def sharded(folder: Path) -> dict[str, Tensor]:
    stored = {f"layer.{index}.weight": torch.randn(2, 3) for index in range(4)}
    shards = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(stored)}
    for shard in set(shards.values()):
        save_file({name: stored[name] for name in stored if shards[name] == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"weight_map": shards}))
    return stored


def test_shards(tmp_path: Path) -> None:
    stored = sharded(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.shards == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in stored.items())


def test_a_single_file_counts_when_there_is_an_index_too(tmp_path: Path) -> None:
    """As in stock transformers."""
    sharded(tmp_path)
    save_file({"new": torch.ones(1)}, tmp_path / SINGLE)
    assert set(open_checkpoint(tmp_path).entries) == {"new"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_tensor_that_is_not_finite(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    weight = torch.zeros(5_000_000 if dtype == torch.float16 else 50, dtype=dtype)
    weight[-1] = value
    save_file({"a.weight": weight, "good": torch.ones(1)}, tmp_path / SINGLE)
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.read("good")
    with pytest.raises(SecateurError, match=r"a\.weight.*model\.safetensors.*NaN or Inf.*expected finite"):
        checkpoint.read("a.weight")


# Files that lie


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(st.data())
def test_damaged_bytes_end_in_one_error_or_none(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever happens to a file, it is refused or read within its bounds; nothing else is raised."""
    stored = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.arange(4)}
    save_file(stored, tmp_path / SINGLE, metadata={"format": "pt"})
    content = bytearray((tmp_path / SINGLE).read_bytes())
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=4)
    ):
        content[place] = value
    content = content[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))]
    (tmp_path / SINGLE).write_bytes(content + data.draw(st.sampled_from([b"", b"\0", b"more than there was"])))
    try:
        checkpoint = open_checkpoint(tmp_path)
        for name in checkpoint.entries:
            if checkpoint.entries[name].dtype in DTYPES:
                checkpoint.read(name)
    except SecateurError:
        return
    size = (tmp_path / SINGLE).stat().st_size
    assert all(0 <= entry.start <= entry.stop <= size for entry in checkpoint.entries.values())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=6,
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "F3", "", 3]) | JSON,
        "shape": st.lists(st.integers(-3, 10) | st.just(1 << 70), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-3, 40) | st.just(1 << 70), max_size=3) | JSON,
        "more": JSON,
    },
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(
    st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), ENTRY | JSON, max_size=3) | JSON, st.integers(0, 40)
)
def test_hostile_headers_end_in_one_error_or_none(tmp_path: Path, header: Any, size: int) -> None:
    text = json.dumps(header).encode()
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    try:
        checkpoint = open_checkpoint(tmp_path)
    except SecateurError:
        return
    assert all(0 <= e.start <= e.stop <= 8 + len(text) + size for e in checkpoint.entries.values())


SHARD = "model-00001-of-00002.safetensors"
PLACES = [SHARD, "../x.safetensors", "/etc/x.safetensors", "/etc/passwd", "", ".", "..", "sub/x.safetensors", "a\0"]


@quickly
@given(
    JSON
    | st.fixed_dictionaries(
        {
            "weight_map": JSON
            | st.dictionaries(
                st.sampled_from(["layer.0.weight", "layer.1.weight", "other"]),
                st.sampled_from([SHARD, "../x.safetensors", "/etc/passwd", "", ".", "..", "sub/x.safetensors", "a\0"])
                | JSON,
                max_size=3,
            )
        }
    )
)
def test_hostile_indexes_end_in_one_error_or_none(tmp_path: Path, index: Any) -> None:
    sharded(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps(index))
    try:
        checkpoint = open_checkpoint(tmp_path)
    except SecateurError:
        return
    assert set(checkpoint.entries) <= {f"layer.{number}.weight" for number in range(4)}
    assert all((tmp_path / shard).is_file() and "/" not in shard for shard in checkpoint.shards)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b"\xff\xfe", b"[" * 100_000])
def test_json_that_is_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(SecateurError, match=r"config\.json"):
        read_json(tmp_path / "config.json")


# The fingerprint


def test_the_fingerprint_tells_changes(tmp_path: Path) -> None:
    stored = sharded(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    prints = [open_checkpoint(tmp_path).fingerprint()]
    before = fingerprint(tmp_path)
    assert open_checkpoint(tmp_path).fingerprint() == prints[0], "it is the same when nothing changed"
    assert fingerprint(tmp_path) == before, "looking changes nothing"
    (tmp_path / "config.json").write_text('{"a": 1}')
    prints.append(open_checkpoint(tmp_path).fingerprint())
    save_file(load_file(tmp_path / SHARD), tmp_path / SHARD, metadata={"format": "pt"})
    prints.append(open_checkpoint(tmp_path).fingerprint())
    os.utime(tmp_path / SHARD, (1, 1))
    prints.append(open_checkpoint(tmp_path).fingerprint())
    assert len(set(prints)) == 4
    assert len(stored) == 4

"""The staged result against the same done in memory, and the order in which it reaches the disk."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur import SecateurError
from secateur.stream.checkpoint import INDEX, Checkpoint, open_checkpoint
from secateur.stream.staging import JOURNAL, UNFINISHED, Staging, _differences, staging_folder

STORED = {"a": torch.float32, "b": torch.bfloat16, "c": torch.float16, "d": torch.float32}
SHARDS = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors", "d": "two.safetensors"}


def source(folder: Path) -> Checkpoint:
    folder.mkdir()
    torch.manual_seed(0)
    for shard in ("one.safetensors", "two.safetensors"):
        parts = {name: torch.randn(3, 4).to(STORED[name]) for name in STORED if SHARDS[name] == shard}
        save_file(parts, folder / shard, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"weight_map": SHARDS}))
    (folder / "config.json").write_text('{"size": 4}')
    return open_checkpoint(folder)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return source(tmp_path / "in")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "new" / "out"


def finished(staging: Staging, files: dict[str, bytes]) -> Path:
    staging.assemble(files, [INDEX, "config.json"])
    staging.finish()
    return staging.out


@given(st.lists(st.dictionaries(st.sampled_from(list(STORED)), st.integers(0, 1000), max_size=4), max_size=4))
def test_the_same_as_in_memory(tmp_path_factory: pytest.TempPathFactory, blocks: list[dict[str, int]]) -> None:
    """Shards keep their header; the tensors that were saved last are in them, the others are untouched."""
    tmp_path = tmp_path_factory.mktemp("staging")
    checkpoint, out = source(tmp_path / "in"), tmp_path / "out"
    staging = Staging(checkpoint, out, {}, resume=False)
    expected: dict[str, Tensor] = {}
    for number, block in enumerate(blocks):
        tensors = {name: torch.full((3, 4), float(value)) for name, value in block.items()}
        staging.save(f"block {number}", tensors, {"number": number})
        expected |= tensors
    finished(staging, {"README.md": b"read me"})
    for shard in ("one.safetensors", "two.safetensors"):
        mine, theirs = load_file(out / shard), load_file(tmp_path / "in" / shard)
        for name, tensor in theirs.items():
            assert torch.equal(mine[name], expected.get(name, tensor).to(STORED[name]))
            assert mine[name].dtype == STORED[name]
        first = min(entry.start for entry in checkpoint.entries.values() if entry.shard == shard)
        assert (out / shard).read_bytes()[:first] == (tmp_path / "in" / shard).read_bytes()[:first]
    names = {"one.safetensors", "two.safetensors", INDEX, "config.json", "README.md"}
    assert {path.name for path in out.iterdir()} == names
    assert (out / "README.md").read_bytes() == b"read me"
    assert (out / "config.json").read_bytes() == (tmp_path / "in" / "config.json").read_bytes()
    assert not staging_folder(out).exists()


def test_what_the_journal_says_is_found_again(checkpoint: Checkpoint, out: Path) -> None:
    staging = Staging(checkpoint, out, {"size": (1, 2)}, resume=False)
    staging.note({"before": 1, "measures": {"perplexity": 0.1 + 0.2}})
    staging.save("first", {"a": torch.ones(3, 4)}, {"layers": [1.5]})
    staging.close()
    again = Staging(checkpoint, out, {"size": (1, 2)}, resume=True)
    assert again.record("before") == {"before": 1, "measures": {"perplexity": 0.1 + 0.2}}
    assert again.record("block", "first") == {"block": "first", "layers": [1.5]}
    assert again.record("block", "second") is None
    assert again.record("allocation") is None
    assert torch.equal(load_file(again.read("a"))["a"], torch.ones(3, 4))
    again.close()


def test_nothing_looks_whole_before_the_end(checkpoint: Checkpoint, out: Path) -> None:
    staging = Staging(checkpoint, out, {}, resume=False)
    for step in (
        lambda: staging.save("first", {"a": torch.ones(3, 4)}, {}),
        lambda: staging.assemble({}, ["config.json"]),
    ):
        step()
        assert not out.exists()
        assert not [path for path in staging.folder.iterdir() if path.suffix in (".safetensors", ".json")]
    staging.close()
    assert sorted(path.name for path in staging.folder.iterdir()) == sorted(
        [JOURNAL, "one.safetensors" + UNFINISHED, "two.safetensors" + UNFINISHED]
    )


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """What reaches the disk, in order: ("write", file), ("sync", file), ("rename", to)."""
    order: list[tuple[str, str]] = []
    write, replace = Staging._write, os.replace

    def record_write(file: IO[bytes], data: memoryview) -> None:
        order.append(("write", Path(file.name).name))
        write(file, data)

    def record_sync(descriptor: int) -> None:
        order.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))

    def record_replace(old: Any, new: Any) -> None:
        order.append(("rename", Path(new).name))
        replace(old, new)

    monkeypatch.setattr(Staging, "_write", staticmethod(record_write))
    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_replace)
    return order


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc to tell files apart")
def test_the_order_in_which_things_reach_the_disk(
    checkpoint: Checkpoint, out: Path, disk: list[tuple[str, str]]
) -> None:
    staging = Staging(checkpoint, out, {}, resume=False)
    disk.clear()
    staging.save("first", {"a": torch.ones(3, 4), "d": torch.ones(3, 4), "b": torch.ones(3, 4)}, {})
    one, two = "one.safetensors.partial", "two.safetensors.partial"
    data, journal = disk[: disk.index(("write", JOURNAL))], disk[disk.index(("write", JOURNAL)) :]
    assert journal == [("write", JOURNAL), ("sync", JOURNAL)], "the journal comes last"
    for shard in (one, two):
        assert max(i for i, step in enumerate(data) if step == ("write", shard)) < data.index(("sync", shard))
    disk.clear()
    finished(staging, {"README.md": b"read me"})
    assert disk[-2:] == [("rename", "out"), ("sync", "new")], "the name comes last"
    for index, (what, name) in enumerate(disk):
        assert what != "write" or ("sync", name) in disk[index:], f"{name} is on the disk before the name is given"


def test_a_file_may_take_less_than_it_is_given() -> None:
    class Slow:
        def __init__(self) -> None:
            self.content = b""

        def write(self, data: memoryview) -> int:
            self.content += bytes(data[:7])
            return min(7, len(data))

    file = Slow()
    Staging._write(file, memoryview(b"root stem leaf bud twig"))  # type: ignore[arg-type]
    assert file.content == b"root stem leaf bud twig"


def test_a_tensor_of_another_size(checkpoint: Checkpoint, out: Path) -> None:
    staging = Staging(checkpoint, out, {}, resume=False)
    with pytest.raises(SecateurError, match="a: has 16 bytes, its place has 48"):
        staging.save("first", {"a": torch.ones(4)}, {})
    staging.close()


def test_too_little_room(checkpoint: Checkpoint, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out.parent.mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, checkpoint.bytes))
    with pytest.raises(SecateurError, match=r"out\.partial has .* GB free, the result needs .* GB"):
        Staging(checkpoint, out, {}, resume=False)
    assert list(out.parent.iterdir()) == []


def test_a_refused_run_touches_nothing(checkpoint: Checkpoint, out: Path, tmp_path: Path) -> None:
    """Another model, resumed by mistake over a run that was killed while its result was verified."""
    Staging(checkpoint, out, {"model": "large"}, resume=False).assemble({}, ["config.json"])
    before = {str(path): path.read_bytes() for path in staging_folder(out).rglob("*") if path.is_file()}
    (tmp_path / "small").mkdir()
    save_file({"a": torch.ones(2, 2)}, tmp_path / "small/model.safetensors")
    with pytest.raises(SecateurError, match="begun with other settings"):
        Staging(open_checkpoint(tmp_path / "small"), out, {"model": "small"}, resume=True)
    assert {str(path): path.read_bytes() for path in staging_folder(out).rglob("*") if path.is_file()} == before


HOLD = """
import fcntl, sys
journal = open(sys.argv[1], "ab")
fcntl.flock(journal, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("resume", [False, True])
def test_another_process_has_it(resume: bool, checkpoint: Checkpoint, out: Path) -> None:
    Staging(checkpoint, out, {}, resume=False).close()
    journal = staging_folder(out) / JOURNAL
    before = journal.read_bytes()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(journal)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(SecateurError, match="another run is writing"):
            Staging(checkpoint, out, {}, resume)
        assert journal.read_bytes() == before
        other.kill()
    Staging(checkpoint, out, {}, resume=True).close()


def test_a_run_that_finishes_in_between(checkpoint: Checkpoint, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other run is over, and its folder gone, after this one opened the journal and before it had the lock."""
    import secateur.stream.staging as module

    first = Staging(checkpoint, out, {}, resume=False)
    lock = module.locked

    def late(file: IO[bytes]) -> bool:
        if not out.exists():
            finished(first, {})
        return lock(file)

    monkeypatch.setattr(module, "locked", late)
    with pytest.raises(SecateurError, match="another run is writing"):
        Staging(checkpoint, out, {}, resume=True)
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]


@given(
    st.recursive(st.integers() | st.text(), lambda inner: st.dictionaries(st.sampled_from("abc"), inner), max_leaves=8)
)
def test_settings_do_not_differ_from_themselves(settings: Any) -> None:
    assert _differences(settings, json.loads(json.dumps(settings))) == []


def test_differences_are_named() -> None:
    then = {"recipe": {"sparsity": 0.5, "seed": 0}, "model": "a" * 64, "gone": 1}
    now = {"recipe": {"sparsity": 0.6, "seed": 0}, "model": "b" * 64, "come": [2]}
    assert _differences(then, now) == [
        "come: null then, [2] now",
        "gone: 1 then, null now",
        f'model: "{"a" * 19}... then, "{"b" * 19}... now',
        "recipe.sparsity: 0.5 then, 0.6 now",
    ]

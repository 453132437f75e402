"""Killed, out of disk or interrupted at any moment: nothing looks whole, and the resumed run gives the same bytes.

A SIGKILL leaves the disk as it is and runs nothing more. So one run is watched, and before every change that it makes to
the disk, and in the middle of every write, the disk is copied: each copy is what a kill at that moment leaves behind.
Errors and interrupts do run clean-up code; they are raised at every change instead. benchmarks/kill.py kills for real.
"""

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from conftest import Watch, batches, contents, save_llama, save_tokenizer, text
from secateur import SecateurError, method, prune
from secateur.module import prune_built
from secateur.recipe import Recipe
from secateur.stream.staging import JOURNAL, Staging

CHANGES = ("replace", "fsync", "truncate", "mkdir", "unlink", "rmdir")  # of the module os; writes go through Staging
REAL = {name: getattr(os, name) for name in CHANGES}


@dataclass(frozen=True)
class Case:
    """A recipe, on batches or on the folder's text; a model with tied embeddings or not, in several shards or one."""

    method: str
    given: bool = True
    tied: bool = True
    shards: bool = True
    every: int = 1  # of the moments: this one in so many is tried
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.method

    def recipe(self, source: Path) -> Recipe:
        calibration = {"source": source / "calibration.txt", "samples": 2, "length": 8}
        return method(self.method, sparsity=0.5, calibration=calibration, **self.options)

    def make(self, folder: Path) -> Path:
        save_llama(folder, tied=self.tied, shards=self.shards)
        if not self.given:
            save_tokenizer(folder)
            (folder / "calibration.txt").write_text(text())
        return folder


SPARSEGPT = Case("sparsegpt")
CASES = [
    SPARSEGPT,
    Case("wanda", given=False, tied=False, every=5),
    Case("magnitude", given=False, shards=False, every=5),
    Case("owl", every=7),  # looks at the dense model before it begins
    Case("taylor", every=7),  # needs gradients at the dense weights
]


def run(source: Path, out: Path, case: Case = SPARSEGPT, **options: Any) -> Any:
    return prune(source, case.recipe(source), batches() if case.given else None, out, **options)


@contextmanager
def disk(at: Callable[[str, bool], None]) -> Iterator[None]:
    """Call at(what, torn) before every change on the disk; torn: half of the bytes are written."""
    write = Staging._write

    def torn(file: Any, data: memoryview) -> None:
        at("write", False)
        write(file, data[: len(data) // 2])
        at("write", True)
        write(file, data[len(data) // 2 :])

    def before(name: str) -> Callable[..., Any]:
        def change(*args: Any, **kwargs: Any) -> Any:
            at(name, False)
            return None if name == "fsync" else REAL[name](*args, **kwargs)  # syncing takes most of the test's time

        return change

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Staging, "_write", staticmethod(torn))
        for name in CHANGES:
            patch.setattr(os, name, before(name))
        yield


def state(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(f"{path.relative_to(folder)}:".encode() + (path.read_bytes() if path.is_file() else b""))
    return digest.hexdigest()


def images(run: Callable[[Path], Any], work: Path, keep: Path) -> list[Path]:
    """Every state of the disk that a kill of run(out) could leave, once."""
    found: dict[str, Path] = {}

    def at(what: str, torn: bool) -> None:
        now = state(work)
        if now not in found:
            found[now] = keep / str(len(found))
            with pytest.MonkeyPatch.context() as patch:  # the copy is no change of the run's
                for name, real in REAL.items():
                    patch.setattr(os, name, real)
                shutil.copytree(work, found[now])

    work.mkdir()
    with disk(at):
        run(work / "out")
    return list(found.values())


def looks_whole(folder: Path) -> bool:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except (OSError, ValueError):
        return False
    return True


@pytest.mark.parametrize("case", CASES, ids=str)
def test_killed_at_any_moment(case: Case, tmp_path: Path, unchanged: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    source = unchanged(case.make(tmp_path / "source"))
    left = images(lambda out: run(source, out, case), tmp_path / "work", tmp_path / "images")
    expected = contents(tmp_path / "work" / "out")
    monkeypatch.setattr(os, "fsync", lambda _: None)
    assert len(left) > 50
    for image in left[:: case.every]:
        out = image / "out"
        if out.exists():  # killed after the last step
            assert contents(out) == expected
            with pytest.raises(SecateurError, match="exists already"):
                run(source, out, case, resume=True)
            shutil.rmtree(out)
        assert not looks_whole(image / "out.partial")
        run(source, out, case, resume=True)
        assert contents(out) == expected, image.name
        assert os.listdir(image) == ["out"]


def own_net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def test_a_module_of_one_s_own_killed_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is pruned in memory, so a resumed run begins again; the result is whole or absent all the same."""
    save_file(own_net().state_dict(), tmp_path / "own.safetensors")

    def run(out: Path, resume: bool = False) -> Any:
        recipe = method("magnitude", sparsity=0.5)
        return prune_built(f"{__name__}:own_net", tmp_path / "own.safetensors", recipe, out, resume=resume)

    left = images(run, tmp_path / "work", tmp_path / "images")
    expected = contents(tmp_path / "work" / "out")
    monkeypatch.setattr(os, "fsync", lambda _: None)
    assert len(left) > 15
    for image in left:
        if (image / "out").exists():
            assert contents(image / "out") == expected
            shutil.rmtree(image / "out")
        run(image / "out", resume=True)
        assert contents(image / "out") == expected
        assert os.listdir(image) == ["out"]


@pytest.mark.parametrize(
    ("code", "changes", "every"),
    [(errno.ENOSPC, ("write", "replace", "truncate", "mkdir"), 1), (errno.EIO, ("fsync",), 4)],
    ids=["full", "broken"],
)
def test_no_disk_at_any_moment(
    code: int, changes: tuple[str, ...], every: int, tmp_path: Path, unchanged: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = unchanged(SPARSEGPT.make(tmp_path / "source"))
    run(source, tmp_path / "expected")
    expected = contents(tmp_path / "expected")
    seen: set[str] = set()
    for moment in range(0, 1000, every):
        work = tmp_path / str(moment)
        work.mkdir()
        if not fails(source, work, changes, moment, OSError(code, os.strerror(code))):
            break
        if state(work) not in seen:  # another moment has left the same, and its resumption is tested
            seen.add(state(work))
            assert not looks_whole(work / "out.partial")
            run(source, work / "out", resume=True)
            assert contents(work / "out") == expected, moment
    assert contents(work / "out") == expected
    assert moment >= 20


def fails(source: Path, work: Path, changes: tuple[str, ...], moment: int, error: OSError) -> bool:
    """Whether the run ended in an error; either way nothing but the whole result may have the name. From the moment on
    all of the changes fail; the clean-up, too, has to do without them.
    """
    clock = iter(range(10_000))

    def at(what: str, torn: bool) -> None:
        if what in changes and torn == (what == "write") and next(clock) >= moment:
            raise error  # in the middle of a write: a full disk takes a part of it

    found = None
    try:
        with disk(at):
            run(source, work / "out")
    except SecateurError as caught:
        found = str(caught)
    assert (work / "out").exists() == (found is None)
    assert found is None or "--resume" in found
    assert found is None or ("the disk is full" in found) == (error.errno == errno.ENOSPC)
    return found is not None


class Interrupt(BaseException):
    """Like KeyboardInterrupt: nothing may take it for an error."""


@pytest.mark.parametrize("moment", [0, 1, 5, 20, 40, 70, 84])
def test_interrupted(moment: int, tmp_path: Path, llama: Path, unchanged: Watch) -> None:
    run(unchanged(llama), tmp_path / "expected")
    clock = iter(range(10_000))

    def at(what: str, torn: bool) -> None:
        if next(clock) == moment:
            raise Interrupt

    with pytest.raises(Interrupt), disk(at):
        run(llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not looks_whole(tmp_path / "out.partial")
    run(llama, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


class Stop(Exception):
    """Raised by the progress callback: the program around has had enough."""


def unfinished(source: Path, out: Path, case: Case = SPARSEGPT, stage: str = "prune", done: int = 1) -> Path:
    """A run that stopped after its first block. Returns the staging folder."""

    def progress(at: str, finished: int, of: int, detail: str) -> None:
        if at == stage and finished == done:
            raise Stop

    with pytest.raises(Stop):
        run(source, out, case, progress=progress)
    return out.with_name(out.name + ".partial")


def test_resume_with_nothing_to_resume_starts_afresh(llama: Path, tmp_path: Path) -> None:
    run(llama, tmp_path / "expected")
    run(llama, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_without_resume_an_unfinished_run_is_in_the_way(llama: Path, tmp_path: Path) -> None:
    partial = unfinished(llama, tmp_path / "out")
    before = state(partial)
    with pytest.raises(SecateurError, match=r"out\.partial.*unfinished run.*--resume.*delete"):
        run(llama, tmp_path / "out")
    assert state(partial) == before


def test_a_stranger_s_folder_is_left_alone(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("years of work")
    with pytest.raises(SecateurError, match=r"--resume.*delete"):
        run(llama, tmp_path / "out")
    unfinished(llama, tmp_path / "other")
    run(llama, tmp_path / "out", resume=True)
    assert os.listdir(tmp_path / "out.partial") == ["thesis.txt"]
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "years of work"


def test_an_error_before_the_first_block_leaves_nothing(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        run(llama, tmp_path / "out", progress=lambda *_: (_ for _ in ()).throw(Stop()))
    assert os.listdir(tmp_path) == []


def change_sparsity(source: Path, case: Case) -> dict[str, Any]:
    return {"recipe": method("sparsegpt", sparsity=0.6)}


def change_data(source: Path, case: Case) -> dict[str, Any]:
    return {"data": batches(seed=5)}


def change_weights(source: Path, case: Case) -> dict[str, Any]:
    save_llama(source, seed=9)
    return {}


def change_config(source: Path, case: Case) -> dict[str, Any]:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    return {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (change_sparsity, ["recipe.sparsity", "0.5 then", "0.6 now"]),
        (change_data, ["data"]),
        (change_weights, ["model"]),
        (change_config, ["model"]),
    ],
)
def test_a_resume_with_changed_settings_is_refused(
    change: Callable[[Path, Case], dict[str, Any]], words: list[str], tmp_path: Path
) -> None:
    source = SPARSEGPT.make(tmp_path / "source")
    recipe = method("sparsegpt", sparsity=0.5)
    with pytest.raises(Stop):
        prune(source, recipe, batches(), tmp_path / "out", progress=stop_at_block(1))
    before = state(tmp_path / "out.partial")
    options = {"recipe": recipe, "data": batches()} | change(source, SPARSEGPT)
    with pytest.raises(SecateurError) as error:
        prune(source, out=tmp_path / "out", resume=True, **options)
    for word in [*words, "other settings", "delete"]:
        assert word in str(error.value)
    assert str(error.value).count(" then, ") == 1, "only what differs is named"
    assert state(tmp_path / "out.partial") == before


def stop_at_block(number: int) -> Callable[[str, int, int, str], None]:
    def progress(stage: str, done: int, of: int, detail: str) -> None:
        if stage == "prune" and done == number:
            raise Stop

    return progress


@pytest.mark.parametrize("resume", [False, True])
def test_two_runs_on_one_folder(resume: bool, llama: Path, tmp_path: Path) -> None:
    refused = []

    def meanwhile(stage: str, done: int, of: int, detail: str) -> None:
        with pytest.raises(SecateurError, match="another run is writing"):
            run(llama, tmp_path / "out", resume=resume)
        refused.append(stage)

    run(llama, tmp_path / "out", progress=lambda *at: meanwhile(*at) if at != ("verify", 1, 1, "done") else None)
    assert set(refused) == {"prune", "verify"}
    run(llama, tmp_path / "expected")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_the_result_never_overwrites_what_came_into_being(llama: Path, tmp_path: Path) -> None:
    def meanwhile(stage: str, done: int, of: int, detail: str) -> None:
        if (stage, done) == ("verify", 0):
            (tmp_path / "out").mkdir()

    with pytest.raises(SecateurError, match=r"came into being.*\n.*--resume"):
        run(llama, tmp_path / "out", progress=meanwhile)
    assert not looks_whole(tmp_path / "out.partial")
    (tmp_path / "out").rmdir()
    run(llama, tmp_path / "out", resume=True)
    run(llama, tmp_path / "expected")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def tear(journal: Path) -> None:
    content = journal.read_bytes()
    journal.write_bytes(content[: content.rfind(b"\n", 0, -1) + 1 + 20])


def zeros_at_the_end(journal: Path) -> None:
    journal.write_bytes(journal.read_bytes() + bytes(4096))


def garbage_in_the_middle(journal: Path) -> None:
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:2], b"\xff{]\n", *lines[2:]]))


def garbage_at_the_start(journal: Path) -> None:
    journal.write_bytes(b"null\n" + journal.read_bytes())


def empty(journal: Path) -> None:
    journal.write_bytes(b"")


def without(journal: Path) -> None:
    journal.unlink()


def without_a_shard(journal: Path) -> None:
    next(journal.parent.glob("*.safetensors.partial")).unlink()


def with_a_short_shard(journal: Path) -> None:
    os.truncate(next(journal.parent.glob("*.safetensors.partial")), 100)


@pytest.mark.parametrize(
    "damage",
    [
        tear,
        zeros_at_the_end,
        garbage_in_the_middle,
        garbage_at_the_start,
        empty,
        without,
        without_a_shard,
        with_a_short_shard,
    ],
)
def test_a_damaged_staging_folder(damage: Callable[[Path], None], llama: Path, tmp_path: Path) -> None:
    """What the journal does not say for sure is done again."""
    partial = unfinished(llama, tmp_path / "out")
    damage(partial / JOURNAL)
    run(llama, tmp_path / "out", resume=True)
    run(llama, tmp_path / "expected")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_blocks_that_are_done_are_not_pruned_again(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished(llama, tmp_path / "out")
    pruned = []
    module = sys.modules["secateur.prune"]  # `secateur.prune` is the function
    real = module._prune_block

    def watched(job: Any, block: str, *rest: Any) -> Any:
        pruned.append(block)
        return real(job, block, *rest)

    monkeypatch.setattr(module, "_prune_block", watched)
    run(llama, tmp_path / "out", resume=True)
    assert pruned == ["model.layers.1"]


def test_tied_weights_stay_tied(llama: Path, tmp_path: Path) -> None:
    run(llama, tmp_path / "out")
    stored = {name for shard in (tmp_path / "out").glob("*.safetensors") for name in load_file(shard)}
    assert "lm_head.weight" not in stored
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()

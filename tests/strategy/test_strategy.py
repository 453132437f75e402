"""A strategy from the command line to the pruned file: what is measured is what is said, and a killed run goes on."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file, save_model
from torch import nn
from typer.testing import CliRunner

from conftest import fingerprint
from secateur.cli import app
from secateur.data.images import Epochs, load_images
from secateur.errors import SecateurError
from secateur.measure.classify import Answers, Loss, Share, answers, lost
from secateur.plan import make_plan
from secateur.recipe import method
from secateur.recover import Settings, finetune_
from secateur.strategy import make_strategy, pages, propose, rounds, run_rounds
from secateur.strategy.propose import ALLOCATIONS, TARGETS, Allocated, Expected, best_allocation, examine
from secateur.strategy.scan import CUTS, Probe, measured_sparsities, probe

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

proposing = sys.modules[propose.__module__]  # the module, whose name is its function's

SOURCE = """
from torch import nn

def conv():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 4),
    )
"""


def stripes(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise with a bright row or column: four classes that a small net tells apart."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 120, (count, 8, 8), dtype=np.uint8)
    labels = rng.integers(0, 4, count)
    for image, label in zip(images, labels, strict=True):
        place = 1 + 4 * (label % 2) + rng.integers(0, 2)
        if label < 2:
            image[place] += 100
        else:
            image[:, place] += 100
    return images, labels


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A package, weights that were trained, and images."""
    root = tmp_path_factory.mktemp("home")
    (root / "pack").mkdir()
    (root / "pack/__init__.py").write_text("")
    (root / "pack/nets.py").write_text(SOURCE)
    for name, count, seed in (("train", 600, 0), ("val", 400, 1)):
        images, labels = stripes(count, seed)
        np.savez(root / f"{name}.npz", images=images, labels=labels)
    space: dict = {}
    exec(SOURCE, space)
    torch.manual_seed(0)
    model = space["conv"]()
    train = load_images(root / "train.npz", mean=[0.5], std=[0.5])
    finetune_(model, Epochs(train, 50), Settings(epochs=8, lr=0.05))
    assert answers(model, load_images(root / "val.npz", mean=[0.5], std=[0.5]).batches(100)).top1.value > 0.95
    save_model(model, str(root / "w.safetensors"))
    return root


def values(home: Path, **more) -> dict:
    found = {
        "build": "pack.nets:conv",
        "weights": str(home / "w.safetensors"),
        "data": {"source": str(home / "val.npz"), "train": str(home / "train.npz"), "mean": [0.5], "std": [0.5]},
        "sparsity": 0.9,
        "rounds": {"keep": 0.5},
        "finetune": {"epochs": 2, "lr": 0.02, "batch": 50},
        "stop": {"drop": 0.05},
    }
    return found | more


def quiet(*_) -> None: ...


def secateur(home: Path, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "secateur.cli", *words], cwd=home, capture_output=True, text=True)


SCAN = ("--build", "pack.nets:conv", "--weights", "w.safetensors", "--mean", "0.5", "--std", "0.5")


def test_what_a_strategy_writes_runs_as_it_is(home):
    """The whole way, through the command line."""
    done = secateur(
        home, "strategy", *SCAN, "--data", "val.npz", "--train", "train.npz", "--images", "100", "--epochs", "2",
        "--target", "0.9", "--keep", "0.5", "--tolerance", "5%", "--out", "look", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["scan"]) == 2 * 12  # the first and the last layer are protected
    assert {a["allocation"] for a in found["allocations"]} == set(ALLOCATIONS)
    page = (home / "look/README.md").read_text()
    assert "sigma" in page
    assert all((home / "look" / name).stat().st_size > 5000 for name in ("thresholds.png", "allocations.png"))
    assert yaml.safe_load((home / "look/recipe.yaml").read_text())["stop"]["drop"] == 0.05
    done = secateur(home, "run", "look/recipe.yaml", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["sparsity"] == pytest.approx(0.9, abs=0.01)
    sparsities = [trial["sparsity"] for trial in result["trials"]]
    assert sparsities == pytest.approx([0, 0.5, 0.75, 0.875, 0.9], abs=0.01)
    # the file is what was measured
    space: dict = {}
    exec(SOURCE, space)
    model = space["conv"]()
    model.load_state_dict(load_file(home / "look-pruned/model.safetensors"))
    kept = next(t for t in result["trials"] if t["number"] == result["best"])
    top1 = answers(model, load_images(home / "val.npz", mean=[0.5], std=[0.5]).batches(64)).top1.value
    assert top1 == pytest.approx(kept["measures"]["top1"])
    pruned = [model[i].weight for i in (2, 5)]
    zeros = sum(int((w == 0).sum()) for w in pruned) / sum(w.numel() for w in pruned)
    assert zeros == pytest.approx(result["sparsity"], abs=1e-6)
    assert kept["costs"]["nnz"] == sum(int((p != 0).sum()) for p in model.parameters())
    assert sorted(p.name for p in (home / "look-pruned").iterdir()) == [
        "README.md", "classes.png", "logs", "model.safetensors", "rounds.png", "secateur.json",
    ]  # fmt: skip


@pytest.fixture
def here(home, monkeypatch) -> Path:
    monkeypatch.chdir(home)
    return home


def test_a_probe_says_what_pruning_that_layer_alone_does(here):
    case = examine(make_strategy(values(here)), "cpu")
    batches = case.batches(200)
    dense = answers(case.model, batches)
    before = {n: p.clone() for n, p in case.model.named_parameters()}
    setting = make_plan(case.model, method("magnitude", sparsity=0.5)).settings[1]
    found, whole = probe(case.model, setting, [("sigma", 1.0), ("sparsity", 0.95)], batches, dense)
    assert all(torch.equal(p, before[n]) for n, p in case.model.named_parameters())
    weight = case.model[5].weight
    with torch.no_grad():
        gone = weight.abs() < weight.std()
        weight.mul_(~gone)
    assert found.sparsity == pytest.approx(float(gone.float().mean()))
    changed = answers(case.model, batches)
    assert found.flips == pytest.approx(float((changed.logits.argmax(1) != dense.logits.argmax(1)).float().mean()))
    assert found.drop == pytest.approx(dense.top1.value - changed.top1.value)
    assert (whole.by, whole.sparsity) == ("sparsity", pytest.approx(0.95, abs=0.01))


# A strategy that was stopped

IMAGES = 100  # of a scan: two batches, so that a layer can be stopped in its midst


class Killed(BaseException):
    """What comes at any time, and nobody catches."""


def kill_at(where: str, number: int):
    """Progress that is killed when a stage has done more than a number."""

    def progress(stage, done, of, detail):
        if stage == where and done > number:
            raise Killed

    return progress


@pytest.fixture(scope="module")
def looked(home, tmp_path_factory) -> SimpleNamespace:
    """A strategy that nobody stopped, and what was there of one that was, after 7 of its 20 allocations."""
    found = SimpleNamespace(root=tmp_path_factory.mktemp("looked"))
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(home)
        data = values(home)["data"] | {"images": 200, "train_images": 100}
        found.wanted = make_strategy(values(home, data=data))
        found.case = examine(found.wanted, "cpu")
        propose(found.wanted, found.case, found.root / "whole", images=IMAGES, progress=quiet)
        with pytest.raises(Killed):
            go_on(found, found.root / "stopped", progress=kill_at("allocate", 6))
    return found


def go_on(looked: SimpleNamespace, out: Path, images: int = IMAGES, resume: bool = True, progress=quiet) -> None:
    propose(looked.wanted, looked.case, out, images=images, resume=resume, progress=progress)


def figures(folder: Path) -> dict:
    """All that no clock says."""
    found = json.loads((folder / "strategy.json").read_text())
    return {key: value for key, value in found.items() if key not in ("latency", "seconds")}


@pytest.fixture
def work(monkeypatch) -> SimpleNamespace:
    """What is really done: (layer, cuts) of every probe, and how often the whole model is cut."""
    found = SimpleNamespace(probes=[], spreads=0)
    probes, cut = proposing.probe, proposing.cut

    def noted_probe(model, setting, cuts, *args):
        found.probes.append((setting.layer.name, len(cuts)))
        return probes(model, setting, cuts, *args)

    def noted_cut(*args):
        found.spreads += 1
        return cut(*args)

    monkeypatch.setattr(proposing, "probe", noted_probe)
    monkeypatch.setattr(proposing, "cut", noted_cut)
    return found


def test_a_strategy_that_was_killed_goes_on_to_the_same_figures(looked, work, tmp_path):
    out = tmp_path / "out"
    for stage, number in (("scan", 12), ("allocate", 6)):
        with pytest.raises(Killed):
            go_on(looked, out, progress=kill_at(stage, number))
        assert not out.exists()
    assert work.spreads == 7
    go_on(looked, out)
    assert work.probes == [("2", 12), ("5", 12), ("5", 12)]  # the second was killed in its midst
    assert work.spreads == 20
    assert figures(out) == figures(looked.root / "whole")
    assert (out / "recipe.yaml").read_bytes() == (looked.root / "whole/recipe.yaml").read_bytes()


def test_half_a_line_that_a_killed_strategy_left_is_done_again(looked, work, tmp_path):
    staging = shutil.copytree(looked.root / "stopped.partial", tmp_path / "out.partial")
    for name in ("scan.jsonl", "allocations.jsonl"):
        (staging / name).write_bytes((staging / name).read_bytes()[:-20])
    with pytest.raises(Killed):  # once more: what was added to half a line would be lost
        go_on(looked, tmp_path / "out", progress=kill_at("allocate", 9))
    go_on(looked, tmp_path / "out")
    assert (work.probes, work.spreads) == ([("5", 1)], 14)
    assert figures(tmp_path / "out") == figures(looked.root / "whole")


ALLOCATED = '{{"allocation": "{}", "sparsity": 0.5, "top1": 0.3, "kl": 1.0}}\n'
LEFT = {
    "go on with --resume, or delete it": {"resume": False},
    "made with other settings": {"images": IMAGES + 1},
    "damaged: key.json": {"damage": ("key.json", '{"asked": ')},
    "scan.jsonl is damaged": {"damage": ("scan.jsonl", '{"layer": "2", "by": "sigma"}\n')},
    "allocations.jsonl is damaged": {"damage": ("allocations.jsonl", '{"allocation": \n')},
    "its lines are not in order": {"damage": ("allocations.jsonl", ALLOCATED.format("lamp"))},
    "not in order": {"damage": ("allocations.jsonl", ALLOCATED.format("uniform") * 21)},
    "damaged: key": {"damage": ("key.json", b"\xff\xfe\x00garbage")},
    "scan.jsonl is": {"damage": ("scan.jsonl", b"\xff\xfe\x00garbage\n")},
    "allocations.jsonl is": {"damage": ("allocations.jsonl", b"\xff\xfe\x00garbage\n")},
}


@pytest.mark.parametrize("says", LEFT)
def test_a_strategy_that_is_not_to_be_gone_on_with_is_left_as_it_is(looked, tmp_path, says):
    options = dict(LEFT[says])
    staging = shutil.copytree(looked.root / "stopped.partial", tmp_path / "out.partial")
    name, text = options.pop("damage", ("", ""))
    if name:
        (staging / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    before = fingerprint(tmp_path)
    with pytest.raises(SecateurError, match=says):
        go_on(looked, tmp_path / "out", **options)
    assert fingerprint(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "writes", "probes", "spreads"),
    [("scan.jsonl", 2, [12, 12, 12], 20), ("allocations.jsonl", 2, [12, 12], 21), ("strategy.json", 1, [12, 12], 20)],
)
def test_a_full_disk_stops_a_strategy_and_nothing_is_lost(
    looked, work, monkeypatch, tmp_path, name, writes, probes, spreads
):
    real, seen = Path.open, []

    def full(path, mode="r", *args, **more):
        seen.extend([1] if path.name == name and mode != "r" else [])
        if path.name != name or mode == "r" or len(seen) != writes:
            return real(path, mode, *args, **more)
        with real(path, mode, *args, **more) as file:
            file.write('{"half a li')
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", full)
        with pytest.raises(SecateurError, match="the disk is full"):
            go_on(looked, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    go_on(looked, tmp_path / "out")
    assert ([count for _, count in work.probes], work.spreads) == (probes, spreads)  # what was not written, once more
    assert figures(tmp_path / "out") == figures(looked.root / "whole")
    assert not (tmp_path / "out.partial").exists()


class Beside(nn.Module):
    """Its first layer also leaves something that its last one needs, by the way that `how` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.left = how, []
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        plain = self.first.forward
        self.first.forward = lambda x: self.leave(plain(x))

    def leave(self, x):
        self.left.append(x.sin())
        return x

    def forward(self, x):
        self.left = []
        x = self.first(x)
        return self.last(x + (self.left[0] if self.how == "error" else sum(self.left)))


@pytest.mark.parametrize("how", ["error", "other"])
def test_a_probe_of_a_model_that_does_more_than_its_modules_say_is_right(how):
    torch.manual_seed(0)
    model = Beside(how).eval()
    batches = [(torch.randn(50, 6), torch.randint(3, (50,))) for _ in range(2)]
    dense = answers(model, batches)
    setting = make_plan(model, method("magnitude", sparsity=0.5)).settings[1]
    (found,) = probe(model, setting, [("sparsity", 0.5)], batches, dense)
    with torch.no_grad():
        weight = model.last.weight
        weight.mul_(weight.abs() > weight.abs().flatten().kthvalue(9).values)
    assert found.kl == pytest.approx(lost(dense, answers(model, batches)).kl, rel=1e-4)


def test_measured_sparsities_meet_the_target_and_spare_what_feels_it():
    grid = [0.5, 0.8, 0.9, 0.95]
    probes = [Probe("a", "sparsity", s, s, 0, 0, 0.001 * 10 ** (3 * s)) for s in grid]
    probes += [Probe("b", "sparsity", s, s, 0, 0, 0.1 * 10 ** (3 * s)) for s in grid]
    sizes = {"a": 1000, "b": 3000}
    for target in (0.5, 0.8, 0.9):
        found = measured_sparsities(probes, sizes, target)
        assert (1000 * found["a"] + 3000 * found["b"]) / 4000 == pytest.approx(target, abs=1e-3)
        assert found["a"] > found["b"]


def test_the_allocation_that_hurts_least_is_chosen():
    rows = [
        Allocated(name, s, 0.0, kl + s)
        for s in (0.5, 0.8)
        for name, kl in zip(ALLOCATIONS, (3, 2, 0.1, 1, 4), strict=True)
    ]
    assert best_allocation(rows) == ALLOCATIONS[2]


def loss(drop=0.0, noise=0.0, sure=-1.0) -> Loss:
    return Loss(drop, noise, 0.0, 0.0, 2, sure, ())


def test_a_page_says_how_far_there_is_something_to_begin_from():
    found = SimpleNamespace(wanted=SimpleNamespace(overrides=[], allocation="lamp"), dense={"top1": 0.9})
    found.allocated = [Allocated("global", s, 0.9, 0.0) for s in (0.5, 0.8, 0.9)]
    found.allocated += [Allocated("lamp", s, top1, 0.0) for s, top1 in ((0.5, 0.8), (0.8, 0.46), (0.9, 0.44))]
    assert pages.reach(found).startswith("Before any training the model has 46.0 % of top-1 at 80 %, 44.0 % at 90 %: ")
    found.dense["top1"] = 0.8
    assert pages.reach(found) == "Before any training the model keeps more than half of its top-1 up to 90 %."
    found.dense["top1"] = 2.0
    assert pages.reach(found).startswith("Before any training the model has 80.0 % at 50 %: ")


def test_stop_rules(home):
    wanted = make_strategy(values(home, stop={"drop": 0.01, "worst_class": 3}))
    assert rounds._verdict(wanted, loss(0.01, 0.015)) == "holds"
    assert rounds._verdict(wanted, loss(0.02, 0.015)) == "holds within the noise"  # and the tolerance
    assert "top-1 drops by 3.00 points" in rounds._verdict(wanted, loss(0.03, 0.015))
    assert rounds._verdict(wanted, loss(0.0, 0.0, 0.029)) == "holds"
    assert "class 2 surely loses 3.1 points" in rounds._verdict(wanted, loss(0.0, 0.0, 0.031))
    assert rounds._verdict(wanted, loss(0.02, 0.02, 0.059)).startswith("holds")  # three times the mean


def test_what_does_not_hold_is_halved_and_the_best_is_kept(here, monkeypatch):
    """Rounds above 70 % are made to fail: bisection ends between what held and what did not."""
    real = rounds._cut
    now: list[float] = []

    def noted(work, place):
        model, masks = real(work, place)
        now.append(masks.sparsity)
        return model, masks

    monkeypatch.setattr(rounds, "_cut", noted)
    monkeypatch.setattr(rounds, "_verdict", lambda *_: "holds" if now[-1] < 0.7 else "made to fail")
    outcome = run_rounds(make_strategy(values(here, sparsity=0.95)), here / "bisected", progress=quiet)
    sparsities = [t.sparsity for t in outcome.trials]
    middle = 1 - 0.5 * 0.5**0.5
    later = 1 - 0.5 ** (1.5 + 0.25) if middle < 0.7 else 1 - 0.5**1.25
    assert sparsities == pytest.approx([0, 0.5, 0.75, middle, later], abs=0.01)
    held = [t for t in outcome.trials if t.holds and t.progress > 0]
    assert outcome.best == max(held, key=lambda t: t.sparsity).number
    assert "did not hold: made to fail" in outcome.ended
    kept = load_file(here / "bisected/model.safetensors")
    zeros = sum(int((kept[f"{i}.weight"] == 0).sum()) for i in (2, 5)) / sum(
        kept[f"{i}.weight"].numel() for i in (2, 5)
    )
    assert zeros == pytest.approx(outcome.kept.sparsity, abs=1e-6)


def test_nothing_held_gives_the_model_back_and_says_so(here, monkeypatch):
    monkeypatch.setattr(rounds, "_verdict", lambda *_: "made to fail")
    outcome = run_rounds(make_strategy(values(here, rounds={"bisect": 1})), here / "nothing", progress=quiet)
    assert outcome.best == -1
    assert outcome.kept is None
    given, kept = load_file(here / "w.safetensors"), load_file(here / "nothing/model.safetensors")
    assert all(torch.equal(given[name], kept[name]) for name in given)
    page = (here / "nothing/README.md").read_text()
    assert "Nothing held" in page
    assert "What may take it further: more epochs a round" in page


@pytest.mark.parametrize("rewind", ["learning-rate", "weights"])
def test_a_run_that_was_killed_goes_on_to_the_same_file(here, rewind):
    """Stopped in the training of every round in turn, and resumed: the file is that of a run that was never stopped."""
    wanted = make_strategy(values(here, rounds={"keep": 0.4, "rewind": rewind}, finetune={"epochs": 2, "batch": 50}))
    whole = run_rounds(wanted, here / f"whole-{rewind}", progress=quiet)

    class Killed(BaseException):
        pass

    count = 0
    while True:
        steps = 0

        def kill(stage, done, of, detail):
            nonlocal steps
            steps += stage == "train"
            if steps > 3:
                raise Killed

        count += 1
        try:
            again = run_rounds(wanted, here / f"killed-{rewind}", resume=True, progress=kill)
            break
        except Killed:
            assert not (here / f"killed-{rewind}").exists()
        assert count < 30
    assert count > 3
    assert [t.measures for t in again.trials] == [t.measures for t in whole.trials]
    one, other = ((here / f"{name}-{rewind}/model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert one == other


def test_rounds_end_where_a_goal_is_met(here):
    wanted = make_strategy(values(here, stop={"drop": 0.2, "packed": 9000}, rounds={"keep": 0.7}))
    outcome = run_rounds(wanted, here / "goal", progress=quiet)
    assert outcome.kept.costs["packed"] <= 9000 < outcome.trials[-2].costs["packed"]
    assert "within 9,000" in outcome.ended


def milliseconds(models, example) -> dict[str, dict[str, float]]:
    """One for a hundred weights; the other percentiles and batches say something else."""
    weights = {name: sum(int((p != 0).sum()) for p in model.parameters()) for name, model in models.items()}
    return {
        name: {"p50_1": n / 100, "p95_1": n / 10, "p50_32": n / 1000, "p95_32": n / 500} for name, n in weights.items()
    }


@pytest.mark.parametrize("breaks", [1.0, 0.7])
def test_rounds_end_where_a_latency_is_met(here, monkeypatch, tmp_path, breaks):
    """Also while the last step is halved, where rounds above a sparsity are made to fail."""
    monkeypatch.setattr(rounds, "latency", milliseconds)
    if breaks < 1:
        real, now = rounds._cut, []

        def noted(work, place):
            found = real(work, place)
            now.append(found[1].sparsity)
            return found

        monkeypatch.setattr(rounds, "_cut", noted)
        monkeypatch.setattr(rounds, "_verdict", lambda *_: "holds" if now[-1] < breaks else "made to fail")
    given = values(here, stop={"drop": 0.9, "worst_class": 100, "latency": 28}, rounds={"keep": 0.5, "bisect": 4})
    outcome = run_rounds(make_strategy(given), tmp_path / "fast", progress=quiet)
    last = outcome.trials[-1]
    assert outcome.best == last.number
    assert last.latency["p50_1"] <= 28 < min(t.latency["p50_1"] for t in outcome.trials if t.holds and t is not last)
    assert outcome.ended == f"an image takes {last.latency['p50_1']:.2f} ms, within 28"
    assert len(outcome.trials) == (3 if breaks == 1 else 4)  # of 5 and of 7
    state = load_file(tmp_path / "fast/model.safetensors")
    kept = sum(int((v != 0).sum()) for name, v in state.items() if name.endswith(("weight", "bias")))
    assert kept / 100 == last.latency["p50_1"]
    assert outcome.ended in (tmp_path / "fast/README.md").read_text()


def test_an_unfinished_run_is_neither_overwritten_nor_mixed_up(here):
    wanted = make_strategy(values(here))

    def kill(stage, done, of, detail):
        if stage == "train":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_rounds(wanted, here / "left", progress=kill)
    with pytest.raises(SecateurError, match="go on with --resume, or delete it"):
        run_rounds(wanted, here / "left", progress=quiet)
    with pytest.raises(KeyboardInterrupt):
        run_rounds(wanted, here / "left", progress=kill, resume=True)


SCALED = {"mean": [0.5], "std": [0.5]}
BAD = {
    "what is trained on and what is measured on": {"data": "same"},
    "the model has 4 classes": {"data": "labels"},
    "did you mean 'drop'": {"stop": {"dropp": 0.1}},
    "did you mean 'epochs'": {"finetune": {"epoch": 3}},
    "by weights alone": {"criterion": "wanda"},
    "does not take images": {"data": "size"},
    "unknown augmentation": {"finetune": {"augment": ["turn"]}},
    "masks stay as they are within a round": {"training": {"method": "rigl"}},
    "rounds.keep is 1.5": {"rounds": {"keep": 1.5}},
    "an N:M pattern is there at once": {"granularity": "2:4"},
    "unknown method 'wandda'": {"method": "wandda"},
    "it ends at 0.2, before it starts at 0.5": {"training": {"start": 0.5, "end": 0.2}},
    "at most 0.98": {"sparsity": 0.99, "allocation": "lamp"},
}


DAMAGE = {
    "state.json cut": lambda folder: (folder / "state.json").write_text('{"key": '),
    "state.json of nothing": lambda folder: (folder / "state.json").write_text("{}"),
    "no state.json": lambda folder: (folder / "state.json").unlink(),
    "no best": lambda folder: next(folder.glob("best-*.safetensors")).unlink(),
    "best cut": lambda folder: next(folder.glob("best-*.safetensors")).write_bytes(b"1234"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_one_clear_error(here, monkeypatch, damage):
    wanted = make_strategy(values(here, sparsity=0.75, rounds={"keep": 0.5, "bisect": 0}))
    out = here / f"damaged {damage}"

    def stop(work, outcome, out):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(rounds, "_finish", stop)
        with pytest.raises(KeyboardInterrupt):
            run_rounds(wanted, out, progress=quiet)
    DAMAGE[damage](out.with_name(f"{out.name}.partial"))
    with pytest.raises(SecateurError, match="is damaged, and cannot be gone on with"):
        run_rounds(wanted, out, resume=True, progress=quiet)


def test_images_that_changed_are_other_images(here, tmp_path):
    from PIL import Image

    for name in "abcd":
        (tmp_path / "val" / name).mkdir(parents=True)
        for number in range(4):
            Image.fromarray(np.full((8, 8), 40 * number, np.uint8)).save(tmp_path / f"val/{name}/{number}.png")
    wanted = make_strategy(values(here, data={"source": str(tmp_path / "val"), **SCALED}))
    before = examine(wanted, "cpu").images_key()
    assert examine(wanted, "cpu").images_key() == before
    Image.fromarray(np.full((8, 8), 7, np.uint8)).save(tmp_path / "val/b/2.png")
    assert examine(wanted, "cpu").images_key() != before


@pytest.mark.parametrize("says", BAD)
def test_mistakes_are_said_before_any_work(here, says):
    changes = dict(BAD[says])
    given = values(here)
    if changes.get("data") == "labels":
        images, labels = stripes(40, 0)
        np.savez(here / "bad.npz", images=images, labels=labels + 3)
        changes["data"] = {"source": str(here / "bad.npz"), **SCALED}
    if changes.get("data") == "size":
        np.savez(here / "odd.npz", images=np.zeros((8, 13, 13), np.uint8), labels=np.arange(8) % 4)
        changes["data"] = {"source": str(here / "odd.npz"), **SCALED}
    if changes.get("data") == "same":
        changes["data"] = given["data"] | {"train": given["data"]["source"]}
    with pytest.raises(SecateurError, match=says):
        run_rounds(make_strategy(given | changes), here / "bad", progress=quiet)
    assert not (here / "bad").exists()
    assert not (here / "bad.partial").exists()


def test_the_command_line_says_mistakes_in_one_line(home):
    for words, says in (
        (("strategy", *SCAN, "--data", "nowhere"), "nowhere does not exist"),
        (("strategy", *SCAN, "--data", "val.npz", "--tolerance", "much"), "--tolerance much: expected a share"),
        (("strategy", *SCAN[:4], "--data", "val.npz", "--mean", "a,b"), "expected numbers with commas"),
        (("strategy", *SCAN, "--data", "val.npz", "--target", "1.5"), "sparsity is 1.5"),
    ):
        done = secateur(home, *words)
        assert done.returncode == 2
        assert says in done.stderr
        assert "Traceback" not in done.stderr


def call(*words: str) -> str:
    """The command line in this process, which must succeed; returns what it prints."""
    done = CliRunner().invoke(app, [*words], prog_name="secateur", env={"COLUMNS": "200"})
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    return done.stdout


def test_a_dry_run_says_how_long_and_how_much_memory_and_writes_nothing(here, monkeypatch):
    words = ("strategy", *SCAN, "--data", "val.npz", "--out", "dry", "--dry-run")
    before = fingerprint(here)
    expected = json.loads(call(*words, "--json"))["expected"]
    assert expected["cells"] == 24
    assert 0 < expected["scan"] < 600
    assert min(expected["memory"], expected["round_memory"]) > 100e6  # torch alone
    told = Expected(scan=123.4, round=45.6, rounds=7, memory=15 * 10**8, round_memory=26 * 10**8, cells=24)
    monkeypatch.setattr(proposing, "expect", lambda *_: told)
    assert " ".join(call(*words).split()) == (
        "24 cuts to be tested, one layer at a time: about 2 min and 1.5 GB. Each of 7 rounds later: about 46 s and 2.6 GB. "
        "They may lose 0.5 points of top-1."
    )
    assert fingerprint(here) == before


def test_a_full_disk_stops_a_round_and_nothing_is_lost(here, monkeypatch):
    wanted = make_strategy(values(here, rounds={"keep": 0.4}))
    real, calls = rounds.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half a file")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(rounds, "save_file", full)
    with pytest.raises(SecateurError, match="the disk is full"):
        run_rounds(wanted, here / "full", progress=quiet)
    assert not (here / "full").exists()
    assert run_rounds(wanted, here / "full", progress=quiet, resume=True).kept.sparsity == pytest.approx(0.9, abs=0.01)


def test_rounds_by_a_threshold_rise_to_it(here):
    given = values(here, threshold={"sigma": 1.6}, stop={"drop": 0.9, "worst_class": 100})
    del given["sparsity"]
    outcome = run_rounds(make_strategy(given), here / "sigmas", progress=quiet)
    assert len(outcome.trials) == 9
    sparsities = [t.sparsity for t in outcome.trials]
    assert sparsities == sorted(sparsities)
    assert sparsities[-1] > 0.6


@pytest.mark.parametrize("cut_holds", [True, False])
def test_a_round_that_diverges_is_left_as_it_was_cut_or_has_failed(here, tmp_path, monkeypatch, cut_holds):
    real, calls = rounds.finetune_, []

    def diverges(model, *args, **more):
        calls.append(1)
        if len(calls) > 2:
            torch.nn.init.constant_(model[0].weight, torch.nan)
            raise rounds.Diverged("the loss is nan in step 1 of epoch 1: ..\n  Lower lr")
        return real(model, *args, **more)

    monkeypatch.setattr(rounds, "finetune_", diverges)
    more = {} if cut_holds else {"sparsity": 0.995, "stop": {"drop": 0.0}}
    wanted = values(here, **({"rounds": {"keep": 0.5 if cut_holds else 0.1, "bisect": 1}} | more))
    outcome = run_rounds(make_strategy(wanted), tmp_path / "out", progress=quiet)
    last = outcome.trials[2]
    assert [t.holds for t in outcome.trials[:3]] == [True, True, cut_holds]
    assert "training diverged: the loss is nan" in last.verdict
    assert last.measures["top1"] == last.cut["top1"] > 0.9
    assert ("left as it was cut" in last.verdict) == cut_holds
    assert all(bool(torch.isfinite(v).all()) for v in load_file(tmp_path / "out/model.safetensors").values())
    assert last.verdict in (tmp_path / "out/README.md").read_text()


def test_a_loss_that_is_no_number_ends_a_round_and_not_the_rounds(here, monkeypatch, tmp_path):
    """Trained at a rate that no model stands, from the second cut on; the cuts alone do not hold either."""
    real, calls = rounds.finetune_, []

    def absurd(model, batches, settings, **more):
        calls.append(1)
        return real(model, batches, settings.model_copy(update={"lr": 1e20} if len(calls) > 2 else {}), **more)

    monkeypatch.setattr(rounds, "finetune_", absurd)
    wanted = values(here, sparsity=0.9984, rounds={"keep": 0.04, "bisect": 1}, stop={"drop": 0.005})
    found = run_rounds(make_strategy(wanted), tmp_path / "out", progress=quiet)
    assert [t.holds for t in found.trials] == [True, True, False, False]
    failed = found.trials[2:]
    assert all(t.verdict.startswith("training diverged: the loss is nan in step") for t in failed)
    assert all(t.measures["top1"] == t.cut["top1"] for t in failed)
    kept = [1 - t.sparsity for t in found.trials]
    assert kept == pytest.approx([1, 0.04, 0.0016, 0.04 * 0.04**0.5], abs=0.001)
    assert found.best == 1
    written = load_file(tmp_path / "out/model.safetensors")
    assert all(bool(v.isfinite().all()) for v in written.values())
    assert sum(int((written[f"{i}.weight"] != 0).sum()) for i in (2, 5)) == round(kept[1] * (8 + 16) * 16 * 9)
    assert "the loss is nan" in found.ended
    json.loads((tmp_path / "out/secateur.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON


def test_a_dense_model_that_diverges_in_training_is_one_clear_error(here, tmp_path):
    wanted = make_strategy(values(here, finetune={"lr": 1e20, "epochs": 1, "batch": 50}))
    with pytest.raises(SecateurError, match=r"the loss is nan in step .*\n  Lower lr"):
        run_rounds(wanted, tmp_path / "out", progress=quiet)
    assert not (tmp_path / "out").exists()


def test_a_round_whose_training_breaks_what_the_cut_held_is_left_as_it_was_cut(here, tmp_path):
    with np.load(here / "train.npz") as train:
        np.savez(tmp_path / "train.npz", images=train["images"], labels=(train["labels"] + 1) % 4)  # all of them wrong
    wanted = values(here, sparsity=0.5, rounds={"keep": 0.5})
    wanted["data"] = wanted["data"] | {"train": str(tmp_path / "train.npz")}
    found = run_rounds(make_strategy(wanted), tmp_path / "out", progress=quiet)
    assert found.trials[0].measures["drop"] > 0.5
    assert "left as it was cut: once trained, top-1 drops by" in found.trials[1].verdict
    assert (found.best, found.kept.measures["top1"]) == (1, found.kept.cut["top1"])
    assert sum(int((p == 0).sum()) for p in load_file(tmp_path / "out/model.safetensors").values()) > 1500


def test_weights_in_half_precision_are_measured_as_they_are_written(here):
    state = {name: value.to(torch.bfloat16) for name, value in load_file(here / "w.safetensors").items() if value.ndim}
    rest = {name: value for name, value in load_file(here / "w.safetensors").items() if not value.ndim}
    save_file(state | rest, here / "half.safetensors")
    given = values(here, weights=str(here / "half.safetensors"), rounds={"keep": 0.3}, stop={"drop": 0.5})
    outcome = run_rounds(make_strategy(given), here / "half", progress=quiet)
    assert outcome.verified == 0
    written = load_file(here / "half/model.safetensors")
    assert written["2.weight"].dtype == torch.bfloat16


def test_training_in_bfloat16_writes_the_dtypes_that_were_given(here, monkeypatch, tmp_path):
    """It is computed in bfloat16, and weights keep the bits that bfloat16 has not."""
    given = load_file(here / "w.safetensors")
    save_file(given | {"5.weight": given["5.weight"].half()}, tmp_path / "mixed.safetensors")
    real, seen = nn.Linear.forward, set()

    def noted(module, x):
        out = real(module, x)
        seen.add((torch.is_grad_enabled(), out.dtype))
        return out

    monkeypatch.setattr(nn.Linear, "forward", noted)
    wanted = values(here, sparsity=0.5, weights=str(tmp_path / "mixed.safetensors"), rounds={"keep": 0.5})
    wanted["finetune"] = {"epochs": 2, "lr": 0.02, "batch": 50, "precision": "bfloat16", "distil": 0.5}
    found = run_rounds(make_strategy(wanted), tmp_path / "out", progress=quiet)
    assert seen == {(True, torch.bfloat16), (False, torch.float32), (False, torch.bfloat16)}  # the teacher without grad
    written = load_file(tmp_path / "out/model.safetensors")
    assert {n: v.dtype for n, v in written.items()} == {n: v.dtype for n, v in load_file(wanted["weights"]).items()}
    assert not torch.equal(written["2.weight"], written["2.weight"].bfloat16().float())
    assert not torch.equal(written["8.weight"], given["8.weight"])
    assert found.trials[1].verdict == "holds"
    space: dict = {}
    exec(SOURCE, space)
    model = space["conv"]()
    model.load_state_dict(written)
    top1 = answers(model, load_images(here / "val.npz", mean=[0.5], std=[0.5]).batches(64)).top1.value
    assert found.kept.measures["top1"] == pytest.approx(top1)
    assert found.verified == 0


def test_other_weights_under_the_same_name_are_not_mixed_with_what_was_done(here):
    given = values(here, weights=str(here / "moving.safetensors"))
    (here / "moving.safetensors").write_bytes((here / "w.safetensors").read_bytes())

    def kill(stage, done, of, detail):
        if stage == "train":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_rounds(make_strategy(given), here / "moved", progress=kill)
    (here / "moving.safetensors").write_bytes((here / "w.safetensors").read_bytes())
    with pytest.raises(SecateurError, match=r"other settings \(weights\)"):
        run_rounds(make_strategy(given), here / "moved", progress=quiet, resume=True)


def test_what_the_builder_froze_stays_as_it_was(here):
    (here / "pack/frozen.py").write_text(
        "from pack import nets\n\n"
        "def conv():\n    model = nets.conv()\n    model[2].requires_grad_(False)\n    return model\n"
    )
    wanted = values(here, build="pack.frozen:conv", sparsity=0.5, finetune={"epochs": 1, "lr": 0.05, "batch": 50})
    run_rounds(make_strategy(wanted), here / "frozen", progress=quiet)
    given, found = load_file(here / "w.safetensors"), load_file(here / "frozen/model.safetensors")
    kept = found["2.weight"] != 0
    assert 0 < int(kept.sum()) < kept.numel()
    assert torch.equal(found["2.weight"][kept], given["2.weight"][kept])
    assert not torch.equal(found["8.bias"], given["8.bias"])


def test_weights_are_rewound_to_those_of_an_early_step(here):
    """Hardly trained: what is kept by its size once trained has the early value."""
    torch.manual_seed(3)
    early = examine(make_strategy(values(here)), "cpu").make().state_dict()
    save_file(early, here / "early.safetensors")
    ways = {"keep": 0.5, "rewind": "weights", "to": str(here / "early.safetensors")}
    settings = {"epochs": 1, "lr": 1e-9, "batch": 50, "weight_decay": 0.0}
    wanted = values(here, sparsity=0.5, rounds=ways, finetune=settings, stop={"drop": 0.99, "worst_class": 1000.0})
    outcome = run_rounds(make_strategy(wanted), here / "rewound", progress=quiet)
    given, found = load_file(here / "w.safetensors"), load_file(here / "rewound/model.safetensors")
    for name in ("2.weight", "5.weight"):
        size = given[name].abs().flatten()
        keep = torch.zeros_like(size)
        keep[size.argsort()[size.numel() - size.numel() // 2 :]] = 1
        torch.testing.assert_close(found[name], early[name] * keep.reshape(found[name].shape), atol=1e-6, rtol=0)
    torch.testing.assert_close(found["0.weight"], early["0.weight"], atol=1e-6, rtol=0)  # protected
    assert outcome.trials[0].measures["top1"] < 0.6  # trained as little, from the same step


@pytest.mark.parametrize("frozen", ["model[:8]", "model"])
def test_a_frozen_backbone_is_cut_and_a_model_that_is_frozen_whole_is_trained(here, tmp_path, frozen):
    name = f"backbone{len(frozen)}"
    (here / f"pack/{name}.py").write_text(
        "from pack import nets\n\n"
        f"def conv():\n    model = nets.conv()\n    {frozen}.requires_grad_(False)\n    return model\n"
    )
    wanted = values(here, build=f"pack.{name}:conv", sparsity=0.5, rounds={"keep": 0.5})
    outcome = run_rounds(make_strategy(wanted), tmp_path / "out", progress=quiet)
    given, found = load_file(here / "w.safetensors"), load_file(tmp_path / "out/model.safetensors")
    kept = found["2.weight"] != 0
    assert outcome.kept.sparsity == pytest.approx(0.5, abs=0.01)
    assert torch.equal(found["2.weight"][kept], given["2.weight"][kept]) == (frozen != "model")
    assert not torch.equal(found["8.bias"], given["8.bias"])


def test_an_image_that_cannot_be_read_is_no_divergence(here, tmp_path, monkeypatch):
    real = rounds._train

    def unreadable(work, model, masks, number):
        real(work, model, masks, number)
        if number == 1:
            monkeypatch.setattr(rounds, "_answers", broken)

    def broken(work, model):
        raise SecateurError("a.png is no image that can be read")

    monkeypatch.setattr(rounds, "_train", unreadable)
    with pytest.raises(SecateurError, match="no image that can be read"):
        run_rounds(make_strategy(values(here, sparsity=0.5)), tmp_path / "out", progress=quiet)
    assert len(json.loads((tmp_path / "out.partial/state.json").read_text())["trials"]) == 1


def test_to_without_weights_that_are_rewound_is_a_mistake(here):
    with pytest.raises(SecateurError, match=r"rounds\.to says what weights go back to, and they stay"):
        make_strategy(values(here, rounds={"to": "early.safetensors"}))


def test_a_last_batch_of_one_image_settles_no_norm(here):
    images, labels = stripes(65, 2)
    np.savez(here / "odd65.npz", images=images, labels=labels)
    wanted = values(here)
    wanted["data"] = wanted["data"] | {"train": str(here / "odd65.npz")}
    assert [len(batch) for batch in examine(make_strategy(wanted), "cpu").norm_batches(64)] == [64]


def test_what_is_written_does_not_lie_among_the_images(here, tmp_path):
    from PIL import Image

    for name in "abcd":
        (tmp_path / name).mkdir()
        for number in range(4):
            Image.fromarray(np.full((8, 8), 40 * number, np.uint8)).save(tmp_path / f"{name}/{number}.png")
    wanted = make_strategy(values(here, data={"source": str(tmp_path), **SCALED}))
    with pytest.raises(SecateurError, match="among the images"):
        run_rounds(wanted, tmp_path / "pruned", progress=quiet)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == list("abcd")


def test_events_of_every_round_are_kept_for_tensorboard(here):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    wanted = values(here, sparsity=0.5, rounds={"keep": 0.5, "tensorboard": True})
    run_rounds(make_strategy(wanted), here / "events", progress=quiet)
    found = sorted(path.parent.name for path in (here / "events/logs").rglob("events.out.tfevents.*"))
    assert found == ["round-0", "round-1"]


KINDS = ("across, high", "across, low", "down, left", "down, right")


def class_folders(home: Path, root: Path, count: int) -> Path:
    """The first of the arrays' images as PNGs: root/val/across, high/0.png"""
    from PIL import Image

    for part in ("train", "val"):
        with np.load(home / f"{part}.npz") as arrays:
            images, labels = arrays["images"][:count], arrays["labels"][:count]
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder = root / part / KINDS[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{number}.png")
    return root


def test_class_folders_give_a_recipe_that_runs_as_it_is(here, tmp_path):
    pictures = class_folders(here, tmp_path / "pictures", 200)
    call(
        "strategy", *SCAN, "--data", str(pictures), "--images", "50", "--epochs", "2", "--lr", "1e-3", "--batch", "50",
        "--target", "0.98", "--keep", "0.1", "--tolerance", "50%", "--out", str(tmp_path / "look"), "--quiet",
    )  # fmt: skip
    result = json.loads(call("run", str(tmp_path / "look/recipe.yaml"), "--json"))
    with np.load(here / "val.npz") as arrays:
        x = (torch.from_numpy(arrays["images"][:200]).float()[:, None] / 255 - 0.5) / 0.5
        y = torch.from_numpy(arrays["labels"][:200])
    space: dict = {}
    exec(SOURCE, space)
    model = space["conv"]().eval()
    right = []
    for path, measured in (
        (here / "w.safetensors", json.loads((tmp_path / "look/strategy.json").read_text())["dense"]),
        (tmp_path / "look-pruned/model.safetensors", result["trials"][result["best"]]["measures"]),
    ):
        model.load_state_dict(load_file(path))
        right.append((model(x).argmax(1) == y).float())
        assert measured["top1"] == pytest.approx(float(right[-1].mean()))
    assert result["best"] == 2
    assert result["sparsity"] == pytest.approx(0.98, abs=0.01)
    page = (tmp_path / "look-pruned/README.md").read_text()
    assert f"200 images of {pictures / 'train'}" in page
    drops = [100 * float((right[0] - right[1])[y == label].mean()) for label in range(4)]
    assert tables(page)[0][2]["class that lost most"] == f"{KINDS[drops.index(max(drops))]} ({max(drops):+.1f})"


def tables(page: str) -> list[list[dict[str, str]]]:
    """Of Markdown: rows with the names of the columns."""
    found: list[list[list[str]]] = [[]]
    for line in page.splitlines():
        if line.startswith("| "):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif not line.startswith("|") and found[-1]:
            found.append([])
    return [[dict(zip(rows[0], row, strict=True)) for row in rows[1:]] for rows in found if rows]


def numbers(cell: str) -> list[float]:
    return [float(n.replace(",", "")) for n in re.findall(r"-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?", cell)]


def test_the_page_says_what_the_figures_say(here, monkeypatch, tmp_path):
    """And the figures of the round that was kept are those of its file. A third of the labels is wrong."""
    images, labels = stripes(400, 1)
    np.savez(tmp_path / "val.npz", images=images, labels=np.where(np.arange(400) % 3, labels, (labels + 1) % 4))
    monkeypatch.setattr(Answers, "top5", property(lambda a: Share.of(int(a.within(2).sum()), len(a.labels))))  # of 4
    monkeypatch.setattr(rounds, "latency", milliseconds)
    wanted = values(here, sparsity=0.98, allocation="global", rounds={"keep": 0.1}, finetune={"epochs": 1, "lr": 1e-3})
    wanted["data"] = wanted["data"] | {"source": str(tmp_path / "val.npz")}
    wanted["stop"] = {"drop": 0.9, "worst_class": 100}
    run_rounds(make_strategy(wanted), tmp_path / "out", progress=quiet)
    result = json.loads((tmp_path / "out/secateur.json").read_text())
    quality, cost, *_ = tables((tmp_path / "out/README.md").read_text())
    given = cost.pop(0)
    assert numbers(given["dead channels"]) == [result["dense_costs"]["dead_channels"], 8 + 16 + 16 + 4]
    for trial, row, spent in zip(result["trials"], quality, cost, strict=True):
        m, c, ms = trial["measures"], trial["costs"], trial["latency"]
        assert numbers(row["round"]) == numbers(spent["round"]) == [trial["number"]]
        for name, key in (("top-1", "top1"), ("top-5", "top5")):
            shares = [100 * m[key], 100 * m[f"{key}_low"], 100 * m[f"{key}_high"]]
            assert numbers(row[name]) == pytest.approx(shares, abs=0.051)
        assert numbers(row["flips"]) == pytest.approx([100 * m["flips"]], abs=0.051)
        assert numbers(row["KL"]) == pytest.approx([m["kl"]], rel=0.006)
        assert numbers(spent["dead channels"]) == [c["dead_channels"], c["channels"]]
        assert numbers(spent["non-zeros"]) == [c["nnz"]]
        assert numbers(spent["ms, 1: median, 95th"]) == pytest.approx([ms["p50_1"], ms["p95_1"]], abs=0.0051)
        assert numbers(spent["ms, 32"]) == pytest.approx([ms["p50_32"], ms["p95_32"]], abs=0.051)
        beside = [ms["dense_p50_1"], ms["dense_p50_32"]]
        assert numbers(spent["dense beside it, 1 and 32"]) == pytest.approx(beside, abs=0.051)
    kept = result["trials"][-1]
    assert result["best"] == kept["number"] == 2
    space: dict = {}
    exec(SOURCE, space)
    logits = []
    x, y = load_images(tmp_path / "val.npz", mean=[0.5], std=[0.5]).batch(range(400))
    for path in (here / "w.safetensors", tmp_path / "out/model.safetensors"):
        model = space["conv"]().eval()
        model.load_state_dict(load_file(path))
        logits.append(model(x).detach().double())
    dense, pruned = logits
    p, q = dense.log_softmax(1), pruned.log_softmax(1)
    assert kept["measures"]["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-3)
    assert kept["measures"]["flips"] == pytest.approx(float((dense.argmax(1) != pruned.argmax(1)).float().mean()))
    second = pruned.argsort(1, descending=True)[:, :2]
    assert kept["measures"]["top5"] == pytest.approx(float((second == y[:, None]).any(1).float().mean()))
    dead = sum(int((model[i].weight.flatten(1) == 0).all(1).sum()) for i in (0, 2, 5, 8))
    assert kept["costs"]["dead_channels"] == dead > 0


def test_a_killed_process_goes_on_within_the_round_it_was_killed_in(here, tmp_path):
    """SIGKILL in the training of round 1; gone on with in this process, it ends as if nobody had."""
    data = values(here)["data"] | {"images": 100, "train_images": 100}
    wanted = values(here, data=data, sparsity=0.5, finetune={"epochs": 50, "lr": 0.02, "batch": 50})
    wanted["out"] = str(tmp_path / "killed")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(wanted))
    staging = tmp_path / "killed.partial"
    command = [sys.executable, "-m", "secateur.cli", "run", str(tmp_path / "recipe.yaml"), "--json"]
    quietly = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=here, env=os.environ | {"OMP_NUM_THREADS": "1"}, **quietly)
    try:
        until = time.monotonic() + 120
        while not (staging / "round-1/log.jsonl").exists() and time.monotonic() < until and process.poll() is None:
            time.sleep(0.005)
    finally:
        process.kill()
    assert process.wait() == -9
    assert len(json.loads((staging / "state.json").read_text())["trials"]) == 1
    logged = (staging / "round-1/log.jsonl").read_text().count("\n")
    trained = []

    def progress(stage, done, of, detail):
        if stage == "train":
            trained.append(detail)

    again = run_rounds(make_strategy(wanted), tmp_path / "killed", resume=True, progress=progress)
    number, epoch = map(int, re.fullmatch(r"round (\d+), epoch (\d+)", trained[0]).groups())
    assert number == 1
    assert 1 <= logged < epoch <= 50  # at most the epoch that was killed is trained again
    whole = run_rounds(make_strategy(wanted), tmp_path / "whole", progress=quiet)
    assert [(t.sparsity, t.measures) for t in again.trials] == [(t.sparsity, t.measures) for t in whole.trials]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in other)
    logs = [(tmp_path / name / "logs/round-1.jsonl").read_text().splitlines() for name in ("killed", "whole")]
    assert [json.loads(line)["loss"] for line in logs[0]] == [json.loads(line)["loss"] for line in logs[1]]


def test_two_runs_do_not_write_to_one_folder(here, tmp_path):
    """While one is under way, another one that goes on in the same folder is refused; its result has no lock."""
    wanted = make_strategy(values(here, sparsity=0.5, rounds={"keep": 0.5}))
    refused = []

    def second(stage, *_):
        if stage == "train" and not refused:
            with pytest.raises(SecateurError, match="another run is writing to"):
                run_rounds(wanted, tmp_path / "out", resume=True, progress=quiet)
            refused.append(stage)

    run_rounds(wanted, tmp_path / "out", progress=second)
    assert refused
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("first", [True, False])
def test_answers_that_are_no_number_though_every_loss_was_are_a_divergence(here, monkeypatch, tmp_path, first):
    """The last step of all blows the weights up: no loss is computed of them."""
    real, calls = rounds.finetune_, []

    def last_step(model, *args, **more):
        calls.append(1)
        found = real(model, *args, **more)
        if first or len(calls) > 2:
            with torch.no_grad():
                model[8].weight.mul_(3e38).mul_(1e3).clamp_(-3e38, 3e38)
        return found

    monkeypatch.setattr(rounds, "finetune_", last_step)
    wanted = values(here, sparsity=0.995, rounds={"keep": 0.1, "bisect": 1}, stop={"drop": 0.0})
    if first:
        with pytest.raises(SecateurError, match="NaN or infinity on these images: lower lr"):
            run_rounds(make_strategy(wanted), tmp_path / "out", progress=quiet)
        return
    found = run_rounds(make_strategy(wanted), tmp_path / "out", progress=quiet)
    assert found.trials[1].holds
    assert "training diverged: the model answers with NaN or infinity" in found.trials[2].verdict
    assert (tmp_path / "out/model.safetensors").exists()


def test_an_allocation_that_does_not_reach_the_target_is_not_chosen(home, looked):
    """LAMP is the best at every sparsity here, and keeps 2 % of each layer."""
    order = ("lamp", "global", "measured", "uniform", "erdos-renyi")
    allocated = [Allocated(name, s, 0.5, order.index(name) + s) for s in TARGETS for name in ALLOCATIONS]
    case = looked.case
    probes = [Probe(s.layer.name, by, v, 0.9, v, 0.0, 0.0) for s in case.plan.settings for by, v in CUTS]
    sizes = {s.layer.name: s.layer.shape[0] * s.layer.shape[1] for s in case.plan.settings}
    for target, chosen in ((0.9, "lamp"), (0.99, "measured"), (0.995, "uniform")):
        wanted = make_strategy(values(home, sparsity=target))
        found = proposing._decide(case.model, wanted, allocated, probes, sizes)
        assert ("measured" if found.overrides else found.allocation) == chosen


@pytest.mark.parametrize("name", ["key.json.partial", "state.json.partial"])
def test_a_disk_that_is_full_at_once_leaves_something_to_go_on_from(here, monkeypatch, tmp_path, name):
    wanted = make_strategy(values(here, sparsity=0.5, rounds={"keep": 0.5}))
    real = Path.write_text

    def full(path, text, **more):
        if path.name == name:
            real(path, text[:1], **more)
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, text, **more)

    def go(resume: bool) -> None:
        if name.startswith("key"):
            propose(wanted, examine(wanted, "cpu"), tmp_path / "out", images=50, resume=resume, progress=quiet)
        else:
            run_rounds(wanted, tmp_path / "out", resume=resume, progress=quiet)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(SecateurError, match=r"the disk is full.*go on with resume"):
            go(resume=False)
    go(resume=True)
    assert (tmp_path / "out/README.md").exists()

"""A strategy from the command line to the pruned file: what is measured is what is said, and a killed run goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file, save_model
from torch import nn

from secateur.data.images import Epochs, load_images
from secateur.errors import SecateurError
from secateur.measure.classify import Loss, answers, lost
from secateur.plan import make_plan
from secateur.recipe import method
from secateur.recover import Settings, finetune_
from secateur.strategy import make_strategy, pages, rounds, run_rounds
from secateur.strategy.propose import ALLOCATIONS, Allocated, best_allocation, examine
from secateur.strategy.scan import Probe, measured_sparsities, probe

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

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


def test_a_dry_run_says_how_long_and_writes_nothing(home):
    done = secateur(home, "strategy", *SCAN, "--data", "val.npz", "--out", "dry", "--dry-run", "--json")
    assert json.loads(done.stdout)["expected"]["cells"] == 24
    assert not (home / "dry").exists()
    assert not (home / "dry.partial").exists()


def test_a_full_disk_stops_a_round_and_nothing_is_lost(here, monkeypatch):
    import errno

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


def test_a_round_that_diverges_has_failed_and_the_best_is_kept(here, monkeypatch):
    real, calls = rounds.finetune_, []

    def diverges(model, *args, **more):
        calls.append(1)
        if len(calls) > 2:
            raise rounds.Diverged("the loss is nan in step 1 of epoch 1: ..\n  Lower lr")
        return real(model, *args, **more)

    monkeypatch.setattr(rounds, "finetune_", diverges)
    outcome = run_rounds(
        make_strategy(values(here, rounds={"keep": 0.5, "bisect": 1})), here / "diverged", progress=quiet
    )
    assert [t.holds for t in outcome.trials] == [True, True, False, False]
    assert outcome.best == 1
    assert "training diverged" in (here / "diverged/README.md").read_text()


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

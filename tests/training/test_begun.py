"""Trainings that begin with masks, with sigmas, in half precision, with several optimizers, one after another."""

from __future__ import annotations

import copy
import errno
import pickle

import pytest
import torch
from test_holding import X, net, revived, sgd, step
from torch import nn

import secateur
from secateur import state
from secateur.errors import SecateurError
from secateur.training import METHODS, Masks, Pruner, iterate_
from secateur.training.at_init import synflow
from secateur.training.thresholds import LearnedThresholds

RECIPE = secateur.method("magnitude", sparsity=0.8, protect=("4",))


def given(share: float) -> tuple[nn.Sequential, Masks]:
    """A net whose first two layers have lost a random share, and the masks of what is left."""
    model, draw = net(), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.mul_(torch.rand(20, 20, generator=draw) >= share)
    return model, Masks.of_zeros(model)


@pytest.mark.parametrize("method", ["gradual", "movement", "ac-dc"])
def test_what_given_masks_removed_never_comes_back(method):
    model, masks = given(0.5)
    gone = {name: ~keep for name, keep in masks.keep.items()}
    optimizer = sgd(model)
    pruner = Pruner(model, RECIPE, optimizer, 60, method=method, masks=masks, every=1)
    seen = []
    for _ in range(60):
        step(model, optimizer)
        seen.append(pruner.report().sparsity)
        for name, away in gone.items():
            assert bool((model.get_parameter(name)[away] == 0).all())
    assert min(seen) >= masks.sparsity - 1e-9
    assert seen[-1] == pytest.approx(0.8)
    if method == "gradual":
        assert seen == sorted(seen)


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_sparse_training_goes_on_from_given_masks(method):
    """As many stay in each layer as were given, and most of them are the same after one choice."""
    model, masks = given(0.65)
    optimizer = sgd(model)
    pruner = Pruner(model, RECIPE, optimizer, 60, method=method, masks=masks, every=10)
    for name, keep in masks.keep.items():
        there = int((pruner.masks.keep[name] & keep).sum())
        assert 0.69 * int(keep.sum()) <= there <= int(keep.sum())
        assert int(pruner.masks.keep[name].sum()) == int(keep.sum())
    for _ in range(60):
        step(model, optimizer)
    assert pruner.report().sparsity == pytest.approx(masks.sparsity)


def test_given_masks_are_part_of_what_a_run_goes_on_from(tmp_path):
    model, masks = given(0.5)
    optimizer = sgd(model)
    pruner = Pruner(model, RECIPE, optimizer, 40, method="ac-dc", masks=masks)
    for _ in range(4):
        step(model, optimizer)
    pruner.save(tmp_path / "new folder/held")
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    other = net()
    other.load_state_dict(weights)
    again = sgd(other)
    again.load_state_dict(state)
    resumed = Pruner(other, RECIPE, again, 40, method="ac-dc", resume=tmp_path / "new folder/held")
    for _ in range(30):
        step(model, optimizer)
        step(other, again)
        assert revived(other, masks) == 0
    assert resumed.masks.digest() == pruner.masks.digest()


def test_masks_of_another_model_are_refused_at_once():
    model = net()
    for masks in ({"body.0.weight": torch.ones(20, 20)}, {"0.weight": torch.ones(20, 30)}):
        with pytest.raises(SecateurError, match="the masks are another model's"):
            Pruner(model, RECIPE, sgd(model), 10, masks=Masks(masks))


@pytest.mark.parametrize("method", ["gradual", "static", "ac-dc"])
def test_a_threshold_counts_in_the_sigma_of_the_dense_layer(method):
    """With a learning rate of 0 all ways end where one cut does; what is left has a larger sigma, which is not asked."""
    dense = nn.Sequential(nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 4))
    recipe = secateur.method("magnitude", threshold={"sigma": 1.0}, protect=("2",))
    once = copy.deepcopy(dense)
    secateur.prune_(once, recipe)
    model = copy.deepcopy(dense)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    Pruner(model, recipe, optimizer, 40, method=method, end=1.0, every=1)
    for _ in range(40):
        optimizer.zero_grad()
        model(torch.ones(2, 100)).sum().backward()
        optimizer.step()
    assert torch.equal(model[0].weight != 0, once[0].weight != 0)
    model = copy.deepcopy(dense)
    *_, last = iterate_(model, recipe, lambda model, masks: None, rewind="learning-rate")
    assert torch.equal(last.masks.keep["0.weight"], once[0].weight != 0)


@pytest.mark.parametrize("granularity", ["layer", "per-row", "2:4", "row"])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_is_scored_in_float32(method, granularity):
    """The masks of a model in bfloat16 are those of the same weights in float32."""
    amount = {} if ":" in granularity else {"sparsity": 0.5}
    recipe = secateur.method("magnitude", granularity=granularity, protect=("4",), **amount)
    digests = []
    for dtype in (torch.bfloat16, torch.float32):
        model = net().bfloat16().to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        pruner = Pruner(model, recipe, optimizer, 60, method=method, every=1)
        for parameter in model.parameters():
            draw = torch.Generator().manual_seed(parameter.numel())
            parameter.grad = torch.randn(parameter.shape, generator=draw).bfloat16().to(dtype)
        for _ in range(60):
            optimizer.step()
        assert pruner.report().violations == 0
        digests.append(pruner.masks.digest())
        assert all(value.dtype == torch.float32 for own in pruner._memory.values() for value in own.values())
    assert digests[0] == digests[1]


def test_steps_of_several_optimizers_are_one_step():
    model, whole = net(), net()
    one = torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9)
    two = torch.optim.SGD([*model[2].parameters(), *model[4].parameters()], lr=0.1, momentum=0.9)
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1, momentum=0.9)
    pruner = Pruner(model, RECIPE, one, 40, method="set", every=4)
    reference = Pruner(whole, RECIPE, optimizer, 40, method="set", every=4)
    grown = 0
    for number in range(1, 41):
        step(whole, optimizer)
        two.zero_grad()
        before = pruner.masks.keep["2.weight"]
        one.zero_grad()
        nn.functional.cross_entropy(model(X), X[:, :4].argmax(1)).backward()
        one.step()
        if number % 4 == 0 and number <= 30:
            new = pruner.masks.keep["2.weight"] & ~before
            momentum = two.state[model[2].weight].get("momentum_buffer")
            grown += int(new.sum())
            assert momentum is None or bool((momentum[new] == 0).all())
        two.step()
        assert pruner.step == reference.step == number
        assert revived(model, pruner.masks) == 0
    assert grown > 50
    assert pruner.report().sparsity == pytest.approx(0.8)


def test_a_new_pruner_takes_the_place_of_the_one_before():
    model = net()
    dense = copy.deepcopy(model.state_dict())
    kept = []
    for seed in (0, 1):
        model.load_state_dict(dense)
        optimizer = sgd(model)
        recipe = secateur.method("random", sparsity=0.5, seed=seed, protect=("4",))
        kept.append(Pruner(model, recipe, optimizer, 20, method="static"))
        for _ in range(20):
            step(model, optimizer)
        assert float((model[0].weight == 0).float().mean()) == 0.5
    assert [pruner.step for pruner in kept] == [20, 20]
    phase = Pruner(model, RECIPE, optimizer, 20, method="rigl")
    for _ in range(20):
        step(model, optimizer)
    assert float((model[0].weight != 0).float().mean()) == pytest.approx(0.2, abs=0.01)
    phase.detach()
    step(model, optimizer)
    assert revived(model, phase.masks) > 100
    assert phase.step == 20


def test_pruners_of_different_layers_live_side_by_side():
    model = net()
    optimizer = sgd(model)
    one = Pruner(model, secateur.method("magnitude", sparsity=0.5, protect=("2", "4")), optimizer, 10, end=0.0)
    two = Pruner(model, secateur.method("magnitude", granularity="2:4", protect=("0", "4")), optimizer, 10, end=0.0)
    for _ in range(5):
        step(model, optimizer)
        assert revived(model, one.masks) == revived(model, two.masks) == 0
    assert one.step == two.step == 5


def test_movement_with_a_global_allocation_takes_the_lowest_of_all():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = secateur.method("magnitude", sparsity=0.5, allocation="global", protect=("4",))
    pruner = Pruner(model, recipe, optimizer, 10, method="movement", every=10, end=1.0)
    for _ in range(10):
        step(model, optimizer)
    scores = torch.cat([pruner._memory[name]["score"].flatten() for name in ("0", "2")])
    keep = torch.cat([pruner.masks.keep[f"{name}.weight"].flatten() for name in ("0", "2")])
    assert int(keep.sum()) == pytest.approx(400, abs=2)
    best = torch.zeros_like(keep).index_fill_(0, scores.topk(int(keep.sum())).indices, True)
    assert int((best != keep).sum()) <= 8  # of 800: the edge is found in a histogram


MISTAKES = {
    "way": ({"total_steps": 20}, "total_steps was 40, here it is 20"),
    "recipe": ({"recipe": secateur.method("magnitude", sparsity=0.8, protect=("2", "4"))}, "another recipe's"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_another_training_does_not_go_on(case, tmp_path):
    model = net()
    Pruner(model, RECIPE, sgd(model), 40, method="movement").save(tmp_path / "held")
    changed, message = MISTAKES[case]
    words = {"recipe": RECIPE, "total_steps": 40} | changed
    with pytest.raises(SecateurError, match=message):
        Pruner(model, words["recipe"], sgd(model), words["total_steps"], method="movement", resume=tmp_path / "held")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"method": "ac-dc", "every": 20, "end": 1.0}, "10 turns in 100 steps"),
        ({"schedule": "cyclic", "every": 33, "end": 1.0}, "6 turns in 100 steps"),
        ({"every": 0}, "expected 1 step or more"),
        ({"start": 0.8, "end": 0.2}, "start 0.8 and end 0.2: expected shares of the steps"),
        ({"start": 0.8}, "start 0.8 and end 0.75: expected shares of the steps"),
        ({"recipe": secateur.method("magnitude", sparsity=0.99, allocation="global")}, "every layer keeps"),
        (
            {"recipe": secateur.method("magnitude", threshold={"absolute": 0.05}), "method": "movement"},
            "give a sparsity",
        ),
        ({"model": net().to("meta")}, "no weights yet"),
    ],
)
def test_mistakes_show_before_training(words, message):
    model = words.get("model", net())
    words = {"recipe": RECIPE, "total_steps": 100} | {k: v for k, v in words.items() if k != "model"}
    with pytest.raises(SecateurError, match=message):
        Pruner(model, optimizer=sgd(model), **words)


def test_wrapped_layers_go_by_their_plain_names():
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = net()

        def forward(self, x):
            return self.module(x)

    inner = net()
    inner[0] = torch.compile(inner[0], backend="eager")
    for model in (inner, Around(), nn.DataParallel(net()), nn.DataParallel(torch.compile(net(), backend="eager"))):
        optimizer = sgd(model)
        pruner = Pruner(
            model, secateur.method("magnitude", sparsity=0.8, protect=("*4*",)), optimizer, 10, end=0.0, method="rigl"
        )
        for _ in range(3):
            step(model, optimizer)
        assert sorted(pruner.masks.keep) == ["0.weight", "2.weight"]
        assert sum(int((p == 0).sum()) for name, p in model.named_parameters() if name.endswith("weight")) == 640


def test_calibrated_patterns_follow_the_schedule():
    recipe = secateur.method("wanda", granularity="2:4", protect=("4",))
    model = net()
    optimizer = sgd(model)
    pruner = Pruner(model, recipe, optimizer, 100, method="ac-dc", data=[X], end=1.0)
    seen = []
    for _ in range(100):
        step(model, optimizer)
        seen.append(pruner.masks.sparsity)
    assert [round(seen[place], 2) for place in (4, 14, 24, 34, 99)] == [0.0, 0.5, 0.0, 0.5, 0.5]
    once = net()
    secateur.prune_(once, recipe, [X])
    model = net()
    static = Pruner(model, recipe, sgd(model), 10, method="static", data=[X])
    assert torch.equal(static.masks.keep["0.weight"], once[0].weight != 0)


def test_calibrated_masks_of_raw_matrices_lie_as_their_parameters():
    """Experts that are used as x @ W show in calibration that they are transposed; the masks are the one-shot ones."""

    class Experts(nn.Module):
        def __init__(self, out: int) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.weight = nn.Parameter(torch.randn(2, 8, out))
            self.head = nn.Linear(out, 3)

        def forward(self, x):
            return self.head((x[None] @ self.weight).mean(0))

    x = torch.randn(32, 8) * torch.arange(1, 9)
    for out in (8, 12):
        recipe = secateur.method("wanda", sparsity=0.5, include=("*weight*",), protect=("head",))
        once = Experts(out)
        secateur.prune_(once, recipe, [x])
        model = Experts(out)
        pruner = Pruner(model, recipe, sgd(model), 10, method="static", data=[x])
        assert torch.equal(pruner.masks.keep["weight"], once.weight != 0)


def test_synflow_leaves_the_model_as_it_was():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.norm, self.two = nn.Linear(8, 8), nn.LayerNorm(8).float(), nn.Linear(8, 8)
            self.register_buffer("scale", torch.rand(8), persistent=False)

        def forward(self, x):
            return {"logits": self.two(self.norm(self.one(x)) * self.scale)}

    model = Mixed()
    model.one.bfloat16(), model.two.bfloat16()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    before = {name: value.clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}
    recipe = secateur.method("magnitude", sparsity=0.5, allocation="global")
    masks = synflow(model, recipe, torch.ones(1, 8))
    assert masks.sparsity == pytest.approx(0.5, abs=0.02)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])
        assert not value.requires_grad
    with pytest.raises(SecateurError, match="token ids"):
        synflow(model, recipe, torch.ones(1, 8, dtype=torch.long))


def test_learned_thresholds_have_the_settings_of_their_weights():
    model = net()
    rest = [p for name, p in model.named_parameters() if name not in ("0.weight", "2.weight")]
    groups = [{"params": rest, "weight_decay": 0.0}, {"params": [model[0].weight, model[2].weight]}]
    optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=5e-4)
    compiled = torch.compile(model, backend="eager")
    learned = LearnedThresholds(compiled, secateur.method("magnitude", sparsity=0.5, protect=("*4",)), optimizer)
    added = [group for group in optimizer.param_groups if any(p.ndim == 0 for p in group["params"])]
    assert [group["weight_decay"] for group in added] == [5e-4, 5e-4]
    assert sorted(learned.finish_().keep) == ["0.weight", "2.weight"]


def test_adapters_under_masks_can_be_pickled():
    peft = pytest.importorskip("peft")
    from secateur.training.lora import hold_masks_

    model, _ = given(0.5)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0", "2"], r=2))
    hold_masks_(adapted)
    again = pickle.loads(pickle.dumps(adapted))
    torch.testing.assert_close(again(X), adapted(X))


def test_a_pruner_that_could_not_be_made_chooses_nothing(tmp_path):
    model = net()
    optimizer = sgd(model)
    with pytest.raises(SecateurError, match="holds no masks"):
        Pruner(model, RECIPE, optimizer, 10, resume=tmp_path / "missing")
    for _ in range(5):
        step(model, optimizer)
    assert all(bool((parameter != 0).all()) for parameter in model.parameters())


@pytest.mark.parametrize("method", ["static", "set", "rigl"])
def test_given_masks_that_keep_everything_are_masks(method):
    model = net()
    optimizer = sgd(model)
    masks = Masks({name: torch.ones_like(model.get_parameter(name)).bool() for name in ("0.weight", "2.weight")})
    pruner = Pruner(model, RECIPE, optimizer, 10, method=method, masks=masks, every=2)
    for _ in range(10):
        step(model, optimizer)
    assert pruner.report().sparsity == 0.0


def test_a_pruner_that_holds_more_than_a_new_one_is_not_switched_off():
    model = net()
    first = Pruner(model, RECIPE, sgd(model), 10, method="static")
    optimizer, before = sgd(model), first.masks.digest()
    with pytest.raises(SecateurError, match=r"another pruner holds 0\.weight, too, and 2\.weight besides"):
        Pruner(model, secateur.method("magnitude", sparsity=0.5, protect=("2", "4")), optimizer, 10)
    for _ in range(5):
        step(model, optimizer)
    assert first.report().violations == 0
    assert first.masks.digest() == before
    first.detach()
    second = Pruner(model, secateur.method("magnitude", sparsity=0.5, protect=("2", "4")), optimizer, 10)
    for _ in range(5):
        step(model, optimizer)
    assert list(second.masks.keep) == ["0.weight"]
    assert first.report().violations > 0


def test_a_new_pruner_that_fails_leaves_the_old_one_at_work():
    model = net()
    optimizer = sgd(model)
    pruner = Pruner(model, RECIPE, optimizer, 10, method="static")
    with torch.no_grad():
        model[4].weight[0, 0] = torch.nan
    with pytest.raises(SecateurError, match="scores are NaN"):
        Pruner(model, secateur.method("magnitude", sparsity=0.9), sgd(model), 10, method="static")
    with torch.no_grad():
        model[4].weight[0, 0] = 0.1
    for _ in range(3):
        step(model, optimizer)
    assert pruner.report().violations == 0


def test_a_run_does_not_go_on_with_another_recipe():
    for other in ({"sparsity": 0.3}, {"granularity": "row"}, {"allocation": "global"}, {"seed": 5}):
        model = net()
        state = Pruner(model, RECIPE, sgd(model), 10).state_dict()
        changed = secateur.method("magnitude", **({"sparsity": 0.8, "protect": ("4",)} | other))
        pruner = Pruner(model, changed, sgd(model), 10)
        with pytest.raises(SecateurError, match=f"another training's: {next(iter(other))} was"):
            pruner.load_state_dict(state)


def test_masks_are_held_only_in_a_model_that_has_the_parameters():
    model = net()
    pruner = Pruner(model, RECIPE, sgd(model), 10, method="static")
    average = torch.optim.swa_utils.AveragedModel(model)
    pruner.also(average)
    assert bool((average.module[0].weight == 0).sum() >= 320)
    for other in (nn.Sequential(model), nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 20))):
        with pytest.raises(SecateurError, match=r"has no \d\.weight \[20, 20\] to hold masks in"):
            pruner.also(other)
    assert pruner.report().violations == 0


def test_a_disk_that_is_full_is_one_error(tmp_path, monkeypatch):
    model = net()
    pruner = Pruner(model, RECIPE, sgd(model), 10, method="static")
    pruner.save(tmp_path / "masks.safetensors")
    before = (tmp_path / "masks.safetensors").read_bytes()

    def full(*args, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(SecateurError, match="the disk is full"):
        pruner.save(tmp_path / "masks.safetensors")
    assert (tmp_path / "masks.safetensors").read_bytes() == before


def test_a_layer_without_a_gradient_is_named():
    model = net()
    optimizer = sgd(model)
    model[2].requires_grad_(False)
    Pruner(model, secateur.method("taylor", sparsity=0.5, protect=("4",)), optimizer, 10)
    with pytest.raises(SecateurError, match="2 has no gradient in this step, which the criterion taylor reads"):
        step(model, optimizer)

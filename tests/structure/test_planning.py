"""Plans: budgets bound what remains, frozen values that JSON holds, all or nothing on a model."""

from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from nets import NETS
from torch import nn

from conftest import TINY
from secateur.errors import SecateurError
from secateur.structure import Couplings, Plan, apply_, importance, plan, plan_heads, rehearsal, trace
from secateur.structure.budget import Costs
from secateur.structure.criteria import CRITERIA, REDUCTIONS
from secateur.structure.rehearsal import share

SOME = ("residual convolutions", "dense connections", "attention by attributes", "depthwise separable", "lstm", "u net")


def made(name: str) -> Couplings:
    torch.manual_seed(0)
    model, inputs = NETS[name]()
    return trace(model.eval(), inputs)


def macs_by_hooks(model: nn.Module, inputs: torch.Tensor) -> int:
    """Multiply-accumulates counted from modules and output shapes: another way than from operators."""
    total = 0

    def hook(module: nn.Module, args: object, output: torch.Tensor) -> None:
        nonlocal total
        total += module.weight[0].numel() * output.numel()  # type: ignore[operator, index]

    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return total


@pytest.fixture(scope="module")
def traced() -> dict[str, Couplings]:
    return {name: made(name) for name in SOME}


@pytest.mark.parametrize("name", ["residual convolutions", "dense connections", "depthwise separable"])
@given(target=st.sampled_from([0.3, 0.5, 0.8]), cost=st.sampled_from(["params", "macs", "bytes"]), data=st.data())
def test_budgets_bound_what_remains(name, target, cost, data, traced):
    allocation = data.draw(st.sampled_from(["uniform", "global"]))
    couplings = traced[name]
    found = plan(couplings, target={cost: target}, allocation=allocation, least=0.05, multiple=1)
    assert found.after[cost] <= target * found.before[cost]
    model = copy.deepcopy(couplings.model)
    apply_(model, found, couplings.inputs)
    assert sum(p.numel() for p in model.parameters()) == found.after["params"]
    assert macs_by_hooks(model, couplings.inputs) == found.after["macs"]
    assert macs_by_hooks(couplings.model, couplings.inputs) == found.before["macs"]


@pytest.mark.parametrize("name", SOME)
def test_costs_are_those_of_the_cut_model(name, traced):
    """Parameters and bytes after any removal, counted on the model itself."""
    couplings = traced[name]
    costs = Costs(couplings)
    for number, coupling in enumerate(couplings):
        units = share(coupling, coupling.steps // 2)
        scores = {c.name: torch.ones(c.size) for c in couplings}
        scores[coupling.name][units] = 0
        found = plan(
            couplings, remove={coupling.name: len(units) / coupling.size}, scores=scores, multiple=1, least=0.01
        )
        model = copy.deepcopy(couplings.model)
        apply_(model, found, couplings.inputs)
        expected = costs.of({number: 1 - len(units) / coupling.size})
        assert sum(p.numel() for p in model.parameters()) == expected["params"] == found.after["params"]
        stored = {t.data_ptr(): t.numel() * t.element_size() for t in model.state_dict().values()}
        assert sum(stored.values()) == expected["bytes"]


def test_the_units_that_go_are_those_with_the_lowest_scores(traced):
    couplings = traced["residual convolutions"]
    inner = next(c for c in couplings if c.name.startswith("a:") or (c.size == 16 and len(c.slices) == 3))
    scores = {inner.name: torch.arange(inner.size, 0, -1).float()}
    found = plan(couplings, remove={inner.name: 4}, scores=scores, multiple=1)
    removal = next(r for r in found.removals if r.coupling == inner.name)
    assert removal.kept == ((0, 12),)  # the last four have the lowest scores


def test_a_plan_is_a_frozen_value_that_json_holds(traced):
    found = plan(traced["attention by attributes"], remove={"heads": 0.5, "units": 0.25})
    again = Plan.from_json(json.loads(json.dumps(found.to_json())))
    assert again == found
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.promise = "anything"  # type: ignore[misc]


def test_a_plan_replays_on_another_copy(traced):
    couplings = traced["attention by attributes"]
    found = Plan.from_json(json.loads(json.dumps(plan(couplings, remove={"heads": 0.5}).to_json())))
    one, other = copy.deepcopy(couplings.model), copy.deepcopy(couplings.model)
    apply_(one, found)  # on inputs like those that it was made with
    apply_(other, found, couplings.inputs)
    assert one.attention.heads == other.attention.heads == 2
    torch.testing.assert_close(one(couplings.inputs), other(couplings.inputs))


def test_explain_says_what_goes_and_why_the_rest_stays(traced):
    shown = plan(traced["attention by attributes"], remove={"heads": 0.5}).explain()
    assert "attention:heads" in shown
    assert "4 -> 2" in shown
    assert "not asked for" in shown
    assert "head.weight:0: protected, an output of the model" in shown
    assert "removed == masked" in shown


def test_hidden_width_is_recomputed_not_masked(traced):
    """A LayerNorm runs over what is left, and the plan says so."""
    found = plan(traced["attention by attributes"], remove={"embed.weight": 0.25}, multiple=1)
    assert found.promise == "recomputed"
    assert found.difference < 1e-9


def test_layer_norm_over_what_is_left_by_hand():
    """The cut LayerNorm is the textbook formula over the kept channels, in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)).double().eval()
    nn.init.normal_(model[1].weight)
    nn.init.normal_(model[1].bias)
    x = torch.randn(4, 6, dtype=torch.float64)
    couplings = trace(model, x)
    scores = {couplings[0].name: torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1])}
    found = plan(couplings, remove={couplings[0].name: 2}, scores=scores, multiple=1)
    kept = torch.tensor([0, 2, 3, 5, 6, 7])
    h = (x @ model[0].weight.T + model[0].bias)[:, kept]
    h = (h - h.mean(1, keepdim=True)) / (h.var(1, keepdim=True, unbiased=False) + model[1].eps).sqrt()
    h = h * model[1].weight[kept] + model[1].bias[kept]
    want = (h @ model[2].weight[:, kept].T + model[2].bias).detach()
    apply_(model, found, x)
    torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)


def test_widths_are_rounded_and_floored(traced):
    couplings = traced["residual convolutions"]
    found = plan(couplings, target={"params": 0.6}, multiple=4)
    assert all(r.left % 4 == 0 for r in found.removals)
    with pytest.raises(SecateurError, match="nearest reachable"):
        plan(couplings, target={"params": 0.2}, least=0.75)


def test_steps_score_anew_what_is_left():
    """Two steps by hand: choose half, set it to zero, score again, choose the rest."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 2)).eval()
    x = torch.randn(64, 6)
    couplings = trace(model, x)
    first, second = (couplings[0], couplings[1])
    found = plan(couplings, remove={"units": 0.5}, criterion="activation", batches=[x], steps=2, multiple=1)
    once = plan(couplings, remove={"units": 0.5}, criterion="activation", batches=[x], multiple=1)
    gone = {c.name: importance(couplings, "activation", batches=[x])[c.name].argsort()[:3] for c in couplings}
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for layer, coupling in ((0, first), (2, second)):
            masked[layer].weight[gone[coupling.name]] = 0
            masked[layer].bias[gone[coupling.name]] = 0
    again = importance(trace(masked, x), "activation", batches=[x])
    for coupling in couplings:
        scores = again[coupling.name].clone()
        scores[gone[coupling.name]] = -1
        kept = np.concatenate(
            [np.arange(*r) for r in next(r.kept for r in found.removals if r.coupling == coupling.name)]
        )
        assert sorted(kept) == sorted(scores.argsort()[6:].tolist())
    assert found.removals != once.removals  # with this seed the second choice differs


def test_protected_kinds_and_globs_are_left_alone(traced):
    couplings = traced["dense connections"]
    found = plan(couplings, target={"params": 0.7}, protect=["layers.0.*"], least=0.05)
    assert all(r.left == r.size for r in found.removals if "layers.0" in r.coupling)
    assert found.after["params"] <= 0.7 * found.before["params"]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({}, "either what to remove"),
        ({"remove": {"units": 0.5}, "target": {"macs": 0.5}}, "either what to remove"),
        ({"remove": {"ffm": 0.5}}, "nothing that can be removed"),
        ({"remove": {"units": 0}}, "expected a share"),
        ({"remove": {"units": -0.5}}, "expected a share"),
        ({"target": {"flops": 0.5}}, "unknown budget"),
        ({"target": {"macs": 0.5}, "allocation": "owl"}, "unknown allocation"),
        ({"remove": {"units": 0.5}, "criterion": "magnitud"}, "unknown criterion"),
        ({"remove": {"units": 0.5}, "criterion": "taylor"}, "reads data"),
        ({"remove": {"units": 0.5}, "reduce": "median"}, "unknown reduction"),
        ({"target": {"macs": 0.001}}, "nearest reachable"),
        ({"remove": {"units": 0.5}, "scores": {"head:units": torch.ones(3)}}, "scores of head:units"),
        ({"remove": {"units": 0.5}, "scores": {"attention:heads": torch.ones(3)}}, "expected 4 numbers"),
        ({"remove": {"units": 0.001}}, "nothing would go"),
        ({"remove": {"units": 0.5}, "multiple": 0}, "expected a width of 1 or more"),
        ({"target": {"macs": 0.5}, "least": 1.5}, "share between 0 and 1"),
        ({"target": {"macs": 0.5}, "steps": 0}, "1 step or more"),
    ],
)
def test_bad_requests_are_one_clear_error(request_, words, traced):
    couplings = traced["attention by attributes"]
    before = copy.deepcopy(couplings.model.state_dict())
    with pytest.raises(SecateurError, match=words):
        plan(couplings, **request_)
    assert all(torch.equal(before[k], v) for k, v in couplings.model.state_dict().items())


def test_a_plan_for_another_model_is_refused_and_nothing_changes(traced):
    found = plan(traced["attention by attributes"], remove={"heads": 0.5})
    other = copy.deepcopy(traced["residual convolutions"].model)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(SecateurError, match="the plan is for Net with"):
        apply_(other, found, traced["residual convolutions"].inputs)
    assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())


def test_a_plan_is_not_applied_twice(traced):
    couplings = traced["residual convolutions"]
    found = plan(couplings, target={"params": 0.5})
    model = copy.deepcopy(couplings.model)
    apply_(model, found, couplings.inputs)
    with pytest.raises(SecateurError, match="applied already"):
        apply_(model, found, couplings.inputs)


def test_a_tampered_plan_is_refused_and_nothing_changes(traced):
    """Indices of one tensor that do not belong to those of the others."""
    couplings = traced["residual convolutions"]
    values = plan(couplings, target={"params": 0.5}).to_json()
    tensor = values["tensors"]["a.weight"]
    stop = tensor["before"][0]
    width = tensor["after"][0]
    tensor["kept"][0] = [[stop - width, stop]] if tensor["kept"][0] != [[stop - width, stop]] else [[0, width]]
    model = copy.deepcopy(couplings.model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SecateurError, match="stays as it was"):
        apply_(model, Plan.from_json(json.loads(json.dumps(values))), couplings.inputs)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.a.out_channels == 16


@pytest.mark.parametrize("content", [{}, {"version": 99}, {"version": 1}, {"version": 1, "tensors": []}])
def test_what_is_no_plan_is_refused(content):
    with pytest.raises(SecateurError, match=r"no plan of secateur|has version"):
        Plan.from_json(content)


# Importance


def test_magnitude_is_the_norm_of_all_that_a_unit_owns():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    couplings = trace(model, torch.randn(2, 5))
    owned = [
        torch.cat([model[0].weight[u], model[0].bias[u : u + 1], model[2].weight[:, u]]).double() for u in range(4)
    ]
    table = {
        "l2": torch.stack([w.square().sum().sqrt() for w in owned]),
        "sum": torch.stack([w.abs().sum() for w in owned]),
        "mean": torch.stack([w.abs().mean() for w in owned]),
        "max": torch.stack([w.abs().max() for w in owned]),
    }
    assert set(table) == set(REDUCTIONS)
    for reduce, want in table.items():
        got = importance(couplings, "magnitude", reduce=reduce)[couplings[0].name]
        torch.testing.assert_close(got, (want / want.mean()).detach(), rtol=1e-6, atol=1e-9)


def test_taylor_and_fisher_by_hand():
    """One linear unit each: gradients are known in closed form."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 1, bias=False)).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    couplings = trace(model, x)
    a, b = model[0].weight.detach(), model[1].weight.detach()
    batches = [x[:3], x[3:]]
    loss = lambda m, batch: m(batch).sum()  # noqa: E731
    first = [torch.outer(b[0], batch.sum(0)) for batch in batches]  # d loss / d a
    second = [batch.sum(0) @ a.T for batch in batches]  # d loss / d b
    ga, gb = sum(first) / 2, sum(second) / 2
    fa, fb = sum(g.square() for g in first) / 2, sum(g.square() for g in second) / 2
    want = {
        "taylor": (a * ga).abs().sum(1) + (b[0] * gb).abs(),
        "fisher": (a.square() * fa / 2).sum(1) + b[0].square() * fb / 2,
        "taylor2": (a * ga - a.square() * fa / 2).abs().sum(1) + (b[0] * gb - b[0].square() * fb / 2).abs(),
    }
    for name, values in want.items():
        got = importance(couplings, name, batches=batches, loss=loss)[couplings[0].name]
        torch.testing.assert_close(got, values / values.mean(), rtol=1e-4, atol=1e-6)


def test_activation_criteria_by_hand():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double().eval()
    x = torch.randn(50, 3, dtype=torch.float64)
    couplings = trace(model, x)
    h = model[1](model[0](x)).detach()
    w = model[2].weight.detach()
    want = {
        "activation": h.abs().mean(0),
        "flap": h.var(0, unbiased=False) * w.square().sum(0),
        "wanda": (w.abs() * h.square().sum(0).sqrt()).sum(0),
    }
    for name, values in want.items():
        got = importance(couplings, name, batches=[x[:20], x[20:]])[couplings[0].name]
        torch.testing.assert_close(got, values / values.mean(), rtol=1e-4, atol=1e-6)


def test_norm_scale_reads_the_norms_alone():
    couplings = made("residual convolutions")
    with torch.no_grad():
        couplings.model.norm.weight.copy_(torch.arange(1.0, 17))
    stream = next(c for c in couplings if any("norm.weight" in part.parameter for part in c.slices))
    got = importance(couplings, "norm-scale")
    assert list(got) == [stream.name]
    torch.testing.assert_close(got[stream.name], (torch.arange(1.0, 17) / 8.5).double())


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_gives_finite_scores_that_compare(criterion, traced):
    couplings = traced["attention by attributes"]
    loss = lambda model, batch: model(batch).square().mean()  # noqa: E731
    found = importance(couplings, criterion, batches=[couplings.inputs], loss=loss)
    assert found
    for name, scores in found.items():
        assert scores.shape == (couplings[name].size,)
        assert torch.isfinite(scores).all()
        assert abs(float(scores.mean()) - 1) < 1e-9
    again = importance(couplings, criterion, batches=[couplings.inputs], loss=loss)
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_a_tied_parameter_counts_once():
    couplings = made("tied weights")
    hidden = next(c for c in couplings if any(p.parameter == "table.weight" for p in c.slices))
    model = couplings.model
    parts = [model.table.weight, model.up.weight, model.down.weight.T, model.down.bias[None]]
    want = torch.cat([p.detach().double() for p in parts]).square().sum(0).sqrt()
    got = importance(couplings, "magnitude")[hidden.name]
    torch.testing.assert_close(got, want / want.mean(), rtol=1e-6, atol=1e-9)


def test_block_shares_stay_even(traced):
    """From every group of a GroupNorm equally many channels go, the lowest of each."""
    couplings = traced["u net"]
    grouped = next(c for c in couplings if len(c.blocks) == 4)
    found = plan(couplings, remove={grouped.name: 0.5}, multiple=1)
    removal = next(r for r in found.removals if r.coupling == grouped.name)
    kept = np.concatenate([np.arange(a, b) for a, b in removal.kept])
    assert all(np.isin(block, kept).sum() == 1 for block in grouped.blocks)


# By number


def test_heads_by_their_numbers():
    """What is left of an attention is the attention over the other heads."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 16}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=32, **sizes), add_pooling_layer=False).eval()
    ids = {"input_ids": torch.arange(14).view(2, 7)}
    found = plan_heads(trace(model, ids), {0: [1], 1: [0, 3]})
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for layer, gone in ((0, [1]), (1, [0, 3])):
            output = masked.encoder.layer[layer].attention.output.dense
            for head in gone:
                output.weight[:, 6 * head : 6 * head + 6] = 0
    apply_(model, found, ids)
    assert model.encoder.layer[1].attention.self.query.out_features == 12
    torch.testing.assert_close(model(**ids).last_hidden_state, masked(**ids).last_hidden_state)


def test_grouped_heads_go_in_whole_groups():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY | sizes)).eval()
    ids = {"input_ids": torch.arange(14).view(2, 7), "use_cache": False}
    couplings = trace(model, ids)
    with pytest.raises(SecateurError, match="groups of 2"):
        plan_heads(couplings, {0: [1]})
    with pytest.raises(SecateurError, match="found none"):
        plan_heads(couplings, {7: [1]})
    apply_(model, plan_heads(couplings, {0: [2, 3]}), ids)
    assert model.model.layers[0].self_attn.k_proj.out_features == 8
    assert model.model.layers[1].self_attn.k_proj.out_features == 16


@pytest.mark.parametrize(
    ("units", "words"),
    [
        ({"nothing": [0]}, "no coupling"),
        ({"attention:heads": [4]}, "units 0 to 3"),
        ({"attention:heads": [0, 1, 2, 3]}, "some have to stay"),
        ({"attention:heads": []}, "some have to stay"),
    ],
)
def test_units_that_make_no_sense(units, words, traced):
    with pytest.raises(SecateurError, match=words):
        plan(traced["attention by attributes"], units=units)


def test_units_of_blocks_go_evenly(traced):
    grouped = next(c for c in traced["u net"] if len(c.blocks) == 4)
    with pytest.raises(SecateurError, match="equal shares"):
        plan(traced["u net"], units={grouped.name: [0]})
    found = plan(traced["u net"], units={grouped.name: [int(block[0]) for block in grouped.blocks]})
    assert next(r.left for r in found.removals if r.coupling == grouped.name) == 4


def test_the_rank_of_an_adapter_is_a_kind_of_its_own():
    """A budget does not take from it, and neurons do not mean it."""

    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
            self.a, self.b = nn.Linear(8, 2, bias=False), nn.Linear(2, 16, bias=False)

        def forward(self, x):
            return x + self.down(torch.relu(self.up(x) + self.b(self.a(x))))

    torch.manual_seed(0)
    model = nn.Sequential(*(Adapted() for _ in range(2)), nn.Linear(8, 3))
    stack = nn.Sequential(nn.Sequential(*model[:2]), model[2])
    x = torch.randn(2, 5, 8)
    couplings = trace(stack, x)
    assert [c.size for c in couplings if c.kind == "rank"] == [2, 2]
    assert [c.size for c in couplings if c.kind == "ffn"] == [16, 16]
    found = plan(couplings, target={"params": 0.7}, multiple=1)
    assert all(removal.left == removal.size for removal in found.removals if removal.kind == "rank")
    named = plan(couplings, remove={"rank": 0.5}, multiple=1)
    assert {removal.left for removal in named.removals if removal.kind == "rank"} == {1}


def test_settings_that_belong_to_the_caller_are_copied_before_they_change():
    model, x = NETS["sizes in records"]()
    settings = [model[place].settings for place in (1, 2, 3)]
    before = copy.deepcopy(settings)
    found = plan(trace(model.eval(), x), remove={"heads": 0.5}, multiple=1)
    assert settings == before
    apply_(model, found)
    assert settings == before
    after = [model[place].settings for place in (1, 2, 3)]
    assert [vars(s) if not isinstance(s, dict) else s for s in after] == [{"heads": 2, "size": 5}] * 3
    assert [type(a) for a in after] == [type(b) for b in before]


@dataclasses.dataclass
class SmallConfig:
    """As small repositories have it: one object for all modules, and for the caller."""

    heads: int = 4


def test_a_config_that_belongs_to_the_caller_is_copied_too():
    class Net(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config
            self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 3)

        def forward(self, x):
            return self.b(self.a(x).view(len(x), self.config.heads, -1).relu().flatten(1))

    config, x = SmallConfig(), torch.randn(5, 6)
    model = Net(config).eval()
    apply_(model, plan(trace(model, x), remove={"heads": 0.5}, multiple=1))
    assert (config.heads, model.config.heads) == (4, 2)


def test_sizes_that_are_only_compared_follow():
    model, x = NETS["sizes that are only compared"]()
    couplings = trace(model.eval(), x)
    apply_(model, plan(couplings, remove={"units": 0.5}, multiple=1))
    assert [(m.width, m.inner) for m in (model[1], model[2])] == [(6, 9), (6, 10)]


@pytest.mark.parametrize("member", ["sequence", "list", "dictionary"])
def test_neurons_of_blocks_that_are_mere_containers_are_neurons(member):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            pair = [nn.Linear(12, 40), nn.Linear(40, 12)]
            make = {
                "sequence": lambda a, b: nn.Sequential(a, nn.ReLU(), b),
                "list": lambda a, b: nn.ModuleList([nn.LayerNorm(12), nn.Sequential(a, nn.ReLU(), b)]),
                "dictionary": lambda a, b: nn.ModuleDict({"up": a, "down": b}),
            }[member]
            self.enter, self.leave = nn.Linear(8, 12), nn.Linear(12, 3)
            self.blocks = nn.ModuleList(make(*copy.deepcopy(pair)) for _ in range(3))

        def forward(self, x):
            x = self.enter(x)
            for block in self.blocks:
                if member == "sequence":
                    x = x + block(x)
                elif member == "list":
                    x = x + block[1](block[0](x))
                else:
                    x = x + block["down"](block["up"](x).relu())
            return self.leave(x)

    kinds = [(c.kind, c.size) for c in trace(Net().eval(), torch.randn(4, 8))]
    assert sorted(kinds) == [("ffn", 40)] * 3 + [("hidden", 12)]


def test_a_share_that_is_asked_for_goes_whatever_a_target_would_leave():
    found = plan(made("u net"), remove={"channels": 0.95}, multiple=1)
    assert [r.left for r in found.removals if not r.why and r.size == 16] == [1]


def test_entries_of_heads_that_rotate_in_pairs_are_no_queries():
    """Cohere turns neighbors together: a unit is two rows of every head of queries and keys."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.CohereConfig(**sizes, num_hidden_layers=2, vocab_size=64, pad_token_id=0, use_cache=False)
    model = transformers.CohereForCausalLM(config).eval()
    found = {(c.kind, max(map(len, c.blocks))) for c in trace(model, {"input_ids": torch.arange(14).reshape(2, 7)})}
    assert found == {("hidden", 32), ("heads", 2), ("queries", 2), ("head_dim", 8), ("ffn", 48)}


def test_the_whole_model_is_not_run_again_for_a_plan():
    couplings = made("residual convolutions")
    runs = []
    handle = couplings.model.register_forward_pre_hook(lambda module, args: runs.append(module))
    try:
        plan(couplings, target={"params": 0.6})
    finally:
        handle.remove()
    assert len(runs) == 2 + couplings.facts.trains  # cut, as it trains, and masked


def test_a_model_that_changed_its_dtype_is_compared_in_the_new_one(monkeypatch):
    monkeypatch.setattr(rehearsal, "SMALL", 0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    couplings = trace(model, torch.randn(2, 4))
    assert couplings.reference.dtype == torch.float32
    model.double()
    assert plan(couplings, remove={couplings[0].kind: 0.5}).difference < 1e-12


def test_gradients_are_only_taken_of_what_may_go(traced):
    couplings = traced["residual convolutions"]
    name = couplings[0].name
    protected = {part.parameter for c in couplings if c.name != name for part in c.slices}
    protected -= {part.parameter for part in couplings[0].slices}
    trained = dict(couplings.model.named_parameters())
    seen = []

    def loss(model, batch):
        seen.append({key for key in protected if trained[key].requires_grad})
        return model(batch).square().mean()

    flags = {key: trained[key].requires_grad for key in protected}
    for key in protected:
        trained[key].requires_grad_(False)
    try:
        plan(couplings, remove={name: 0.5}, criterion="taylor", batches=[couplings.inputs], loss=loss)
    finally:
        for key, flag in flags.items():
            trained[key].requires_grad_(flag)
    assert protected
    assert seen == [set()]

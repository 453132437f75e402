"""Removed equals masked, in float64, for nets with every construction that is easy to cut wrongly."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nets import NETS

from secateur.structure import Couplings, plan, trace
from secateur.structure.attention import replace_
from secateur.structure.plans import RECOMPUTED
from secateur.structure.proof import Masked, Wrong, check, returned, run_listening
from secateur.structure.rehearsal import check_removal, enlarged
from secateur.structure.running import runner
from secateur.structure.surgery import Cut, cut_of, dead_of, mask_
from secateur.structure.watch import located, plainly

EXACT = 1e-9
REFUSED = {  # what must not be offered for removal, and a word of the reason
    "channel shuffle": {"c.weight:1": "differs"},
    "softmax over channels": {"0.weight:0": "softmax"},
    "in place writes": {"a.weight:0": "differs"},
    "fixed view": {"a.weight:0": ""},
    "weight normalization": {"0.parametrizations.weight.original1:1": "remove_parametrizations"},
    "tied weights": {"table.weight:0": "looked up"},
    "channel that is largest": {"a.weight:0": "place of aten.max is read"},
    "table of places": {"places:1": "not used on these inputs", "row:0": "not used on these inputs"},
}
EXPECTED = {  # kinds of structure, with sizes, that have to be found
    "attention by attributes": {("heads", 4)},
    "multihead attention": {("heads", 4), ("units", 24), ("units", 32)},
    "grouped queries": {("heads", 4), ("queries", 2)},
    "grouped convolutions": {("groups", 4)},
    "u net": {("channels", 8), ("channels", 16)},
    "split bottlenecks": {("channels", 16), ("channels", 8)},
    "lstm": {("units", 12), ("units", 20)},
    "linear into feature maps": {("channels", 12), ("channels", 8)},
    "pixel shuffle": {("channels", 8), ("channels", 6)},
    "heads that norms run over": {("heads", 3)},
    "biases put together": {("heads", 4)},
    "attention with tokens of its own": {("heads", 4)},
    "scale of the queries": {("heads", 4)},
    "sampled by heads": {("heads", 4)},
    "attention by maxima": {("channels", 16), ("channels", 12), ("units", 6)},
    "encoder and decoder": {("heads", 4), ("units", 16), ("units", 24)},
    "sizes in records": {("heads", 4), ("head_dim", 5), ("units", 16)},
    "sizes that are only compared": {("units", 12), ("units", 18), ("units", 20)},
    "view that counts in fours": {("channels", 32), ("channels", 16)},
    "heads in halves": {("heads", 8), ("head_dim", 4)},
}


@pytest.fixture(scope="module")
def traced() -> dict[str, Couplings]:
    found = {}
    for name, make in NETS.items():
        torch.manual_seed(0)
        model, inputs = make()
        found[name] = trace(model.eval(), inputs)
    return found


def removal(couplings: Couplings, data: st.DataObject) -> list:
    """A random keep-set of some couplings, equal shares of every block."""
    chosen = []
    for coupling in couplings:
        steps = data.draw(st.integers(0, coupling.steps - 1), label=coupling.name)
        if steps:
            seed = data.draw(st.integers(0, 99))
            rng = np.random.default_rng(seed)
            take = [rng.permutation(block)[: len(block) // coupling.steps * steps] for block in coupling.blocks]
            chosen.append((coupling, np.concatenate(take)))
    return chosen


@pytest.mark.parametrize("name", NETS)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_removed_equals_masked(name, traced, data):
    couplings = traced[name]
    chosen = removal(couplings, data)
    if not chosen:
        return
    model, run = couplings.model, runner(couplings.model, couplings.inputs)
    undo = replace_(model)
    try:
        with torch.no_grad(), enlarged(model):
            seen = check_removal(model, couplings.facts, chosen, run, run_listening(model, run)[1])
    finally:
        undo()
    assert seen.difference < EXACT


@pytest.mark.parametrize("name", NETS)
def test_nothing_is_changed_by_looking(name):
    torch.manual_seed(0)
    model, inputs = NETS[name]()
    before = copy.deepcopy(model.state_dict())
    attributes = [(type(m), {k: v for k, v in vars(m).items() if isinstance(v, (int, tuple))}) for m in model.modules()]
    trace(model, inputs)
    after = [(type(m), {k: v for k, v in vars(m).items() if isinstance(v, (int, tuple))}) for m in model.modules()]
    assert attributes == after
    assert all(type(v) in (int, bool, tuple) or isinstance(v, tuple) for _, table in after for v in table.values())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_go_is_protected_with_the_reason(name, traced):
    for place, word in REFUSED[name].items():
        assert word in traced[name].protected[place]


@pytest.mark.parametrize("name", EXPECTED)
def test_what_can_go_is_found(name, traced):
    found = {(coupling.kind, coupling.size) for coupling in traced[name]}
    assert EXPECTED[name] <= found


def test_blocks_that_have_to_stay_even(traced):
    """A chunk in two, and the groups of a GroupNorm: the same share of each."""
    halves = next(c for c in traced["split bottlenecks"] if len(c.blocks) > 1)
    assert {len(block) for block in halves.blocks} == {8}
    grouped = next(c for c in traced["u net"] if len(c.blocks) == 4)
    assert {len(block) for block in grouped.blocks} == {2}
    assert not grouped.exact


def test_width_and_heads_that_the_code_divides_go_by_the_same_share(traced):
    """Nothing that has to stay is taken along: the second stage of windows keeps its width when the first loses some."""

    def blocks(name):
        return {tuple(sorted(map(len, c.blocks))) for c in traced[name] if len(c.blocks) > 1}

    assert blocks("head size from the width") == {(4, 4, 24)}
    assert blocks("windows of two widths") == {(3, 18), (6, 36)}
    assert blocks("repeated keys by the width") == {(2, 2, 24)}


def test_units_that_only_go_several_at_a_time(traced):
    first = next(c for c in traced["view that counts in fours"] if c.size == 32)
    assert (first.grain, first.steps) == (4, 8)
    assert str(first).splitlines()[0].endswith("32 units, 4 at a time")


def test_what_the_code_takes_in_halves_keeps_as_much_of_each(traced):
    """Cut at both ends, halves stay in balance by chance: cutting at one end alone tells."""
    heads = next(c for c in traced["heads in halves"] if c.kind == "heads")
    assert sorted(block.tolist() for block in heads.blocks) == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("name", [n for n in NETS if n not in ("fixed view", "in place writes")])
def test_a_wrong_cut_is_caught(name, traced):
    """Keep other indices of one tensor than of those that are coupled with it: shapes fit, numbers do not."""
    couplings = traced[name]
    model, run = couplings.model, runner(couplings.model, couplings.inputs)
    coupling = next(c for c in couplings if c.size > 2 and c.steps > 1)
    units = np.concatenate([block[: len(block) // coupling.steps] for block in coupling.blocks])
    dead = dead_of(couplings.facts, [(coupling, units)])
    undo = replace_(model)
    try:
        with torch.no_grad(), enlarged(model):
            reference = run_listening(model, run)[1]
            right = cut_of(couplings.facts, dead)
            caught = 0
            for tensor, dims in right.kept.items():
                if model.state_dict()[tensor].is_floating_point() and "running" not in tensor:
                    caught += _is_caught(couplings, right, tensor, dims, dead, run, reference)
            assert caught >= 2
    finally:
        undo()


@pytest.mark.parametrize("name", [n for n in NETS if n not in ("fixed view", "in place writes")])
def test_what_was_traced_says_what_is_left_where_the_masked_run_is_not_followed(name, traced):
    """Norms, means and maxima over what is left, from the record of the traced run and found out anew."""
    couplings = traced[name]
    model, facts = couplings.model, couplings.facts
    dead = dead_of(facts, [(c, np.concatenate([b[: len(b) // c.steps] for b in c.blocks])) for c in couplings])
    undo = [replace_(model), mask_(model, cut_of(facts, dead))]
    found = []
    try:
        for follows in (False, True):
            masked = Masked(model, facts, dead, follows)
            with plainly(model), located(model, masked.where), masked:
                found.append((returned(runner(model, couplings.inputs)()), masked.restricted))
    finally:
        for step in reversed(undo):
            step()
    (known, restricted), (anew, again) = found
    assert restricted == again
    assert all(torch.equal(one, other) for one, other in zip(known, anew, strict=True))


def test_a_run_that_goes_another_way_than_the_traced_one_is_followed(traced, monkeypatch):
    couplings = traced["heads that norms run over"]
    coupling = next(c for c in couplings if not c.exact)
    monkeypatch.setattr(couplings.facts, "reduced", couplings.facts.reduced[1:])
    found = plan(couplings, remove={coupling.name: 0.5}, multiple=1)
    assert found.difference < EXACT
    assert found.promise == RECOMPUTED


def _is_caught(couplings, right, tensor, dims, dead, run, reference) -> bool:
    place, kept = next(iter(dims.items()))
    size = couplings.model.state_dict()[tensor].shape[place]
    shifted = (size - 1 - kept)[::-1].copy()
    if np.array_equal(shifted, kept):
        return False
    wrong = {name: dict(places) for name, places in right.kept.items()}
    wrong[tensor][place] = shifted
    try:
        cut = Cut(wrong, right.attributes)
        got = check(couplings.model, couplings.facts, cut, run, reference, dead, masked=right)
    except Wrong:
        return True
    return got.difference > 1e-6


def test_printing_a_coupling_shows_its_slices(traced):
    shown = str(traced["attention by attributes"]["attention:heads"])
    assert shown.splitlines()[0] == "attention:heads (heads): 4 units"
    assert "    attention.qkv.weight[6i + {0, 1, 2, 3, ..}]" in shown
    assert "    attention.out.weight[:, 6i : 6i+6]" in shown


def test_the_same_names_as_before():
    """torch's own attention keeps its parameters under their names, and its class where nothing was cut."""
    model, inputs = NETS["multihead attention"]()
    names = list(model.state_dict())
    trace(model, inputs)
    assert type(model.attention) is torch.nn.MultiheadAttention
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masks", ["none", "causal", "padding", "per head"])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("more", [{}, {"add_bias_kv": True}, {"add_zero_attn": True, "add_bias_kv": True}])
def test_split_attention_is_torchs_attention(batch_first, masks, need_weights, more):
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(12, 3, batch_first=batch_first, **more).eval().double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    x = x if batch_first else x.transpose(0, 1)
    options = {"need_weights": need_weights}
    if masks == "causal":
        options["attn_mask"] = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
    elif masks == "padding":
        options["key_padding_mask"] = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    elif masks == "per head":
        options["attn_mask"] = torch.randn(6, 5, 5, dtype=torch.float64)
    want = attention(x, x, x, **options)
    replace_(attention)
    got = attention(x, x, x, **options)
    torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=1e-12)
    if need_weights:
        torch.testing.assert_close(got[1], want[1], rtol=1e-12, atol=1e-12)

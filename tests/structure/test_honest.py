"""Nothing counts as proven that was not seen: outputs in unusual forms, parts that the inputs do not reach, state."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from nets import NETS
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.structure import apply_, plan, trace


@dataclass
class Answer:
    """What a model may return."""

    scores: Tensor


class Returns(nn.Module):
    """A net that returns its scores in some form."""

    def __init__(self, form):
        super().__init__()
        self.a, self.b, self.form = nn.Linear(4, 8), nn.Linear(8, 3), form

    def forward(self, x):
        return self.form(self.b(torch.relu(self.a(x))))


@pytest.mark.parametrize(
    "form",
    [
        Answer,
        lambda y: SimpleNamespace(scores=y),
        lambda y: {"inner": [Answer(y)]},
        lambda y: {"logits": y[:, :1], "last_hidden_state": y},
    ],
    ids=["dataclass", "namespace", "nested", "not of transformers"],
)
def test_outputs_in_any_form_keep_their_sizes(form):
    torch.manual_seed(0)
    model = Returns(form).eval()
    couplings = trace(model, torch.randn(5, 4))
    assert [c.size for c in couplings] == [8]
    assert "an output" in couplings.protected["b.weight:0"]


@pytest.mark.parametrize("form", [lambda y: int(y.argmax()), lambda y: str(y.shape), lambda y: None])
def test_outputs_without_tensors_are_refused(form):
    with pytest.raises(SecateurError, match="no tensor is found"):
        trace(Returns(form).eval(), torch.randn(5, 4))


class Behind(nn.Module):
    """A net that shuffles channels by fixed numbers, of which the output says next to nothing on these inputs."""

    def __init__(self, form):
        super().__init__()
        self.branch, self.form = NETS["channel shuffle"]()[0], form
        self.small = nn.Parameter(torch.arange(1.0, 5.0) * 1e-12)

    def forward(self, x):
        return self.form(self, x, self.branch(x).mean((2, 3)))


@pytest.mark.parametrize(
    "form",
    [
        lambda net, x, y: x.mean((2, 3)).sum(1, keepdim=True) + net.small * y,
        lambda net, x, y: x.mean((2, 3)).sum(1, keepdim=True) + torch.relu(x.min() - 100) * y,
        lambda net, x, y: (y + 100 * torch.arange(4)).argmax(1),
    ],
    ids=["small scale", "closed gate", "choice"],
)
def test_a_wrong_cut_shows_behind_a_gate_or_a_choice(form):
    torch.manual_seed(0)
    couplings = trace(Behind(form).eval(), NETS["channel shuffle"]()[1])
    assert re.search("of what branch.* returns", couplings.protected["branch.c.weight:1"])


class Joined(nn.Module):
    """A branch that treats the halves of its width by fixed numbers and hardly adds to what it is joined with."""

    def __init__(self, form):
        super().__init__()
        self.a, self.up, self.down, self.b = nn.Linear(6, 12), nn.Linear(12, 16), nn.Linear(16, 12), nn.Linear(12, 3)
        self.form = form

    def forward(self, x):
        y = self.a(x)
        h = torch.relu(self.up(y))
        return self.b(y + self.form(x) * self.down(torch.cat([h[:, :8] * 2, -h[:, 8:]], 1)))


@pytest.mark.parametrize("form", [lambda x: 1e-9, lambda x: torch.relu(x.mean() - 9)], ids=["small", "closed"])
def test_a_wrong_cut_shows_where_what_is_returned_gets_narrower(form):
    """Not even by shares: a quarter of 12 and of 16, taken from both ends, leaves the halves in balance."""
    torch.manual_seed(0)
    assert [coupling.size for coupling in trace(Joined(form).eval(), torch.randn(4, 6))] == [12]


class Shifted(nn.Module):
    """Reads its hidden width by fixed numbers, so that nothing of it may go."""

    def __init__(self, form):
        super().__init__()
        self.a, self.b, self.form = nn.Linear(4, 16), nn.Linear(16, 6), form

    def forward(self, x):
        h = self.a(x)
        h = torch.cat([h[:, :8] * 2, h[:, 8:]], 1)
        return self.form(self.b(h))


@pytest.mark.parametrize(
    "form",
    [lambda y: y, lambda y: torch.complex(y, y.flip(0)), lambda y: (y * 1000).round().long(), lambda y: y > 0],
    ids=["float", "complex", "integer", "bool"],
)
def test_a_wrong_cut_is_seen_in_outputs_of_any_type(form):
    """Removing unit 0 moves unit 8 into the part that is doubled."""
    torch.manual_seed(0)
    model = Shifted(form).eval()
    assert "a.weight:0" not in {f"{s.parameter}:{s.dim}" for c in trace(model, torch.randn(200, 4)) for s in c.slices}


class Routed(nn.Module):
    """Experts by a loop: those that no token chose do not run."""

    def __init__(self):
        super().__init__()
        self.inner, self.gate = nn.Linear(4, 12), nn.Linear(12, 6)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 12)) for _ in range(6))
        self.out = nn.Linear(12, 3)

    def forward(self, x):
        h = self.inner(x)
        chosen = self.gate(h).argmax(-1)
        rows = [self.experts[int(e)](row[None]) for e, row in zip(chosen, h, strict=True)]
        return self.out(h + torch.cat(rows))


def test_experts_that_no_token_chose_are_cut_like_those_that_were():
    torch.manual_seed(0)
    model = Routed().eval()
    nn.init.zeros_(model.gate.bias)
    x, others = torch.randn(2, 4), 3 * torch.randn(256, 4)
    assert len(model.gate(model.inner(x)).argmax(-1).unique()) <= 2
    assert len(model.gate(model.inner(others)).argmax(-1).unique()) > 4
    couplings = trace(model, x)
    for coupling in couplings:
        cut, masked = copy.deepcopy(model), copy.deepcopy(model)
        found = plan(couplings, remove={coupling.name: 0.5}, multiple=1)
        apply_(cut, found, x)
        with torch.no_grad():
            for name, change in found.tensors.items():
                for dim, kept in change.kept.items():
                    gone = torch.ones(change.before[dim], dtype=torch.bool)
                    for start, stop in kept:
                        gone[start:stop] = False
                    masked.get_parameter(name).index_fill_(dim, gone.nonzero()[:, 0], 0)
        torch.testing.assert_close(cut(others), masked(others))


def test_parts_that_the_inputs_do_not_reach_stay():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.extra = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(5, 8)

        def forward(self, x, y=None):
            h = self.a(x)
            return self.b(torch.relu(h if y is None else h + self.extra(y)))

    couplings = trace(Optional().eval(), torch.randn(5, 4))
    assert all("not used on these inputs" in couplings.protected[f"extra.weight:{dim}"] for dim in (0, 1))


class Keeps(nn.Module):
    """Makes a table on the first call, counts calls in a buffer, and keeps what it computed."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros(1))
        self.table = self.last = None

    def forward(self, x):
        if self.table is None:
            self.table = torch.linspace(0, 1, 8)
            self.register_buffer("late", torch.ones(8))
        self.calls += 1
        self.last = torch.relu(self.a(x)) * self.late
        return self.b(self.last)


def test_looking_at_a_model_leaves_nothing_behind():
    torch.manual_seed(0)
    model, x = Keeps().eval(), torch.randn(5, 4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, second = str(trace(model, x)), str(trace(model, x))
    assert first == second
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.table is None
    assert model.last is None


def test_models_of_which_no_gradient_can_be_had():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            h = torch.sigmoid(self.a(x))
            y = self.b(h)
            h.zero_()  # what the gradient of the sigmoid needs
            return y

    torch.manual_seed(0)
    model, x = Writes().eval(), torch.randn(5, 4)
    found = plan(trace(model, x), remove={"*": 0.5}, multiple=1)
    apply_(model, found, x)
    assert model.a.out_features == 4


@pytest.mark.parametrize("kind", ["divides", "shifts"])
def test_constants_of_each_channel(kind):
    """Masking one that divides would make 0/0; one that is added after the last weight counts as it is."""

    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
            self.register_buffer("each", torch.rand(8) + 0.5)

        def forward(self, x):
            h = self.a(x)
            return self.b((h - 1) / self.each if kind == "divides" else h + self.each)

    torch.manual_seed(0)
    model, x = Constant().eval(), torch.randn(5, 4)
    couplings = trace(model, x)
    assert [c.size for c in couplings] == [8]
    apply_(model, plan(couplings, remove={"units": 0.5}, multiple=1), x)
    assert model.each.shape == (4,)


class Draws(nn.Module):
    """A variational autoencoder: only in training it draws, with a size of its own."""

    def __init__(self):
        super().__init__()
        self.size = 6
        self.inner, self.mean, self.spread = nn.Linear(4, 10), nn.Linear(10, 6), nn.Linear(10, 6)
        self.out, self.norm = nn.Linear(6, 5), nn.BatchNorm1d(5)

    def forward(self, x):
        h = torch.relu(self.inner(x))
        z = self.mean(h)
        if self.training:
            z = z + torch.randn(len(x), self.size) * self.spread(h).exp()
        return self.norm(self.out(z))


def test_what_a_model_does_in_training_alone_is_followed_too():
    torch.manual_seed(0)
    model, x = Draws().eval(), torch.randn(7, 4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    couplings = trace(model, x)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    latent = next(c for c in couplings if c.size == 6)
    assert {part.parameter for part in latent.slices} >= {"mean.weight", "spread.weight", "out.weight"}
    apply_(model, plan(couplings, remove={"*": 0.5}, multiple=1), x)
    assert model.size == 3
    assert model.train()(x).shape == (7, 5)


def test_a_cut_that_only_training_would_not_survive_is_not_offered():
    class Fixed(Draws):
        def forward(self, x):
            z = self.mean(torch.relu(self.inner(x)))
            return self.out(z + torch.randn(len(x), 6) if self.training else z)

    couplings = trace(Fixed().eval(), torch.randn(7, 4))
    assert "mean.weight:0" not in {f"{s.parameter}:{s.dim}" for c in couplings for s in c.slices}
    assert 10 in {c.size for c in couplings}


def test_weights_that_a_forward_changes_for_good_are_changed_once():
    """RWKV scales its weights in its first forward, and remembers that in an attribute: both stay, or the next one would
    scale again."""

    class Once(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.done = nn.Linear(4, 8), nn.Linear(8, 3), False

        def forward(self, x):
            if not self.done:
                with torch.no_grad():
                    self.a.weight.div_(2)
                self.done = True
            return self.b(torch.relu(self.a(x)))

    torch.manual_seed(0)
    model, x = Once().eval(), torch.randn(5, 4)
    weight = model.a.weight.detach().clone()
    trace(model, x)
    assert model.done
    torch.testing.assert_close(model.a.weight.detach(), weight / 2)


class Remembers(nn.Module):
    """Keeps settings in a dictionary that its forward fills."""

    def __init__(self):
        super().__init__()
        self.seen, self.settings = {}, {"heads": 4}
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x):
        self.seen["length"] = x.shape[0]
        y = self.a(x)
        return self.b(y.view(len(x), self.settings["heads"], -1).relu().flatten(1))


def test_a_dictionary_that_a_forward_fills_is_no_other_record():
    model = Remembers().eval()
    x = torch.randn(5, 6)
    apply_(model, plan(trace(model, x), remove={"heads": 0.5}, multiple=1), x)
    assert model.settings == {"heads": 2}
    assert model(x).shape == (5, 3)


class Length(nn.Module):
    """Compares the length with a number that the width happens to have, too."""

    def __init__(self):
        super().__init__()
        self.width, self.length = 12, 12
        self.enter, self.up, self.down = nn.Linear(5, 12), nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x):
        x = self.enter(x)
        assert x.shape[-1] == self.width
        if x.shape[1] != self.length:
            x = x.flip(1)
        return self.down(self.up(x).relu()).sum(-1)


def test_a_number_that_was_never_equal_to_a_size_does_not_follow_it():
    model, x = Length().eval(), torch.randn(2, 7, 5)
    before = model.length
    apply_(model, plan(trace(model, x), remove={"enter:units": 0.5}, multiple=1), x)
    assert (model.width, model.length) == (6, before)


class Picks(nn.Module):
    """Reads the place of a maximum as a number of Python."""

    def __init__(self):
        super().__init__()
        self.a, self.table, self.b = nn.Linear(6, 12), nn.Parameter(torch.randn(12, 5)), nn.Linear(5, 3)

    def forward(self, x):
        largest, place = self.a(x).mean(0).max(0)
        return self.b(self.table[place.item()] * largest)


def test_the_place_of_a_maximum_that_python_reads_binds_the_channels():
    protected = trace(Picks().eval(), torch.randn(4, 6)).protected
    assert "place of aten.max is read" in protected["a.weight:0"]


class Aside(nn.Module):
    """A part returns noise that the output does not have."""

    def __init__(self):
        super().__init__()
        self.part, self.out = Noise(), nn.Linear(9, 3)

    def forward(self, x):
        return self.out(self.part(x)[0])


class Noise(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean = nn.Linear(6, 9)

    def forward(self, x):
        mean = self.mean(x)
        return mean, mean + torch.randn_like(mean)


def test_noise_of_another_shape_is_no_wrong_cut():
    assert [c.size for c in trace(Aside().eval(), torch.randn(4, 6))] == [9]


class Follows(nn.Module):
    """Has a target that follows its weights in training, within forward."""

    def __init__(self, how):
        super().__init__()
        self.online, self.target = (nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4)) for _ in range(2))
        self.how = how

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                for slow, fast in zip(self.target.parameters(), self.online.parameters(), strict=True):
                    self.how(slow, fast)
        return self.online(x) + self.target(x)


def replace_data(slow, fast):
    slow.data = 0.9 * slow.data + 0.1 * fast.data


@pytest.mark.parametrize(
    "how",
    [lambda s, f: s.lerp_(f, 0.1), lambda s, f: s.data.mul_(0.9).add_(0.1 * f), replace_data],
    ids=["lerp", "data in place", "data"],
)
def test_weights_that_training_changes_are_left_as_they_were(how):
    model = Follows(how).eval()
    before = copy.deepcopy(model.state_dict())
    storages = [p.data_ptr() for p in model.parameters()]
    assert len(trace(model, torch.randn(4, 6))) > 0
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert storages == [p.data_ptr() for p in model.parameters()]


class Auxiliary(nn.Module):
    """Returns a loss beside its numbers."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 8)

    def forward(self, x):
        return self.a(x), torch.tensor(0.0)


def test_a_number_made_in_a_module_is_nothing_to_compare_on_the_meta_device():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.b = Auxiliary(), nn.Linear(8, 3)

        def forward(self, x):
            return self.b(self.inner(x)[0])

    assert [c.size for c in trace(Net().to("meta"), torch.randn(4, 6))] == [8]


def test_weights_of_eight_bits_that_a_forward_casts():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.leave = nn.Linear(6, 8), nn.Linear(10, 3)
            self.small = nn.Parameter(torch.randn(10, 8).to(torch.float8_e4m3fn), False)

        def forward(self, x):
            return self.leave(torch.relu(self.enter(x) @ self.small.to(x.dtype).T))

    assert isinstance(trace(Net().eval(), torch.randn(4, 6)).protected, dict)

"""Statistics of batch norms after a cut."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.recover import reestimate_, settle_


def net() -> nn.Sequential:
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*first, nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5, momentum=0.2))


def test_the_statistics_are_those_of_the_inputs_in_eval_mode():
    model = net().train()
    batches = list(torch.randn(3, 8, 3, 10, 10, generator=torch.Generator().manual_seed(1)))
    state = {
        key: value.clone() for key, value in model.state_dict().items() if "running" not in key and "num" not in key
    }
    assert reestimate_(model, batches) == 2
    with torch.no_grad():
        one = [model[0](batch) for batch in batches]
    mean = torch.stack([x.mean((0, 2, 3)) for x in one]).mean(0)
    variance = torch.stack([x.var((0, 2, 3)) for x in one]).mean(0)
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, variance)
    assert model[5].momentum == 0.2
    assert all(module.training for module in model.modules())
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    with torch.no_grad():  # the second one sees what the first gives in training mode, and no dropout
        two = [model[4](nn.functional.batch_norm(x, None, None, training=True, weight=model[1].weight,
                                                 bias=model[1].bias).relu()) for x in one]  # fmt: skip
    torch.testing.assert_close(model[5].running_mean, torch.stack([x.mean((0, 2, 3)) for x in two]).mean(0))


def test_pairs_with_labels_and_nets_without_norms():
    assert reestimate_(nn.Linear(3, 2), [torch.randn(4, 3)]) == 0
    assert reestimate_(net(), [(torch.randn(4, 3, 10, 10), torch.zeros(4))]) == 2


def test_batches_that_were_used_up_are_told_and_nothing_is_lost():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model(torch.randn(8, 4))
    before = model[1].running_mean.clone()
    with pytest.raises(SecateurError, match="no batches"):
        reestimate_(model, iter([]))
    assert torch.equal(model[1].running_mean, before)
    assert float(before.abs().sum()) > 0


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_as_much_of_the_new_statistics_is_taken_as_brings_it_closest(share):
    model = net().eval()
    batches = list(3 * torch.randn(3, 8, 3, 10, 10, generator=torch.Generator().manual_seed(1)) + 1)
    new = copy.deepcopy(model)
    reestimate_(new, batches)
    wanted = {n: b.lerp(new.get_buffer(n), share) for n, b in model.named_buffers() if b.is_floating_point()}

    def distance() -> float:
        return sum(float((model.get_buffer(n) - value).abs().sum()) for n, value in wanted.items())

    assert settle_(model, batches, distance) == share
    assert all(torch.allclose(model.get_buffer(n), value) for n, value in wanted.items())


def test_a_net_without_norms_is_not_asked():
    assert settle_(nn.Linear(3, 2), [], lambda: pytest.fail("asked")) == 0.0
    norm = nn.BatchNorm1d(3).eval()
    assert settle_(norm, [torch.randn(8, 3) + 2], lambda: -float(norm.running_mean.sum())) == 1.0
    assert float(norm.running_mean.sum()) > 3


def test_what_fails_leaves_the_statistics_as_they_were():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model.train()(torch.randn(8, 4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="more than 1 value"):
        reestimate_(model, [torch.randn(8, 4), torch.randn(1, 4)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

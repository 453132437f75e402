"""Factors for norms over fewer elements: against closed forms, and never worse than none."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

from conftest import TINY
from secateur.structure import apply_, norm_factors, plan, rescale_, trace

IDS = [{"input_ids": torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(n))} for n in range(3)]


def decoder(kind="Llama"):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**TINY, max_position_embeddings=64, initializer_range=0.3)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.2, 1.8)
    return model


def narrower(model):
    couplings = trace(model, {**IDS[0], "use_cache": False})
    return plan(couplings, remove={"hidden": 0.25}, multiple=1)


def test_the_factor_of_a_single_norm_is_the_ratio_of_its_energies():
    """One token, RMS norm: norm(x) on what stays is norm'(x') sqrt(mean x'^2 / mean x^2), exactly."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.norm, self.out = nn.Linear(4, 8), nn.RMSNorm(8, eps=0.0), nn.Linear(8, 3)

        def forward(self, x):
            return self.out(self.norm(self.inner(x)))

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(1, 4)
    found = plan(trace(model, torch.randn(2, 4)), remove={"units": 0.5}, multiple=1)
    hidden = model.inner(x)[0].detach()
    kept = torch.cat([torch.arange(a, b) for a, b in found.tensors["norm.weight"].kept[0]])
    want = float((hidden[kept].square().mean() / hidden.square().mean()).sqrt())
    factors = norm_factors(model, found, [(x,)])
    assert factors == {"norm.weight": pytest.approx(want, rel=1e-5)}
    whole = model.norm(model.inner(x))[:, kept]
    apply_(model, found, torch.randn(2, 4))
    rescale_(model, factors)
    torch.testing.assert_close(model.norm(model.inner(x)), whole)


@pytest.mark.parametrize("kind", ["Llama", "Gemma", "Phi"])
def test_outputs_of_norms_come_nearer(kind):
    """RMS norm, RMS norm with an offset of 1, layer norm with a bias: least squares is never worse than nothing."""
    model = decoder(kind)
    found = narrower(model)
    factors = norm_factors(model, found, IDS)
    assert len(factors) >= 3
    name = next(iter(factors))
    norm, kept = name.rpartition(".")[0], torch.cat([torch.arange(a, b) for a, b in found.tensors[name].kept[0]])
    cut, fixed = copy.deepcopy(model), copy.deepcopy(model)
    for other in (cut, fixed):
        apply_(other, found)
    rescale_(fixed, factors)
    x = model.get_input_embeddings().requires_grad_(False)(
        torch.cat([batch["input_ids"] for batch in IDS])
    )  # what the first norm is given
    want = model.get_submodule(norm)(x)[..., kept]

    def apart(other):
        return (other.get_submodule(norm)(x[..., kept]) - want).square().mean().item()

    assert apart(fixed) < apart(cut)
    bias = getattr(model.get_submodule(norm), "bias", None)
    if bias is not None:
        assert torch.equal(fixed.get_submodule(norm).bias, cut.get_submodule(norm).bias)


def test_what_mixes_nothing_has_no_factor():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    x = torch.randn(2, 3, 6, 6)
    found = plan(trace(model, x), remove={"channels": 0.5}, multiple=1)
    assert norm_factors(model, found, [x]) == {}


def test_the_model_is_left_as_it_was():
    model = decoder()
    before = copy.deepcopy(model.state_dict())
    norm_factors(model, narrower(model), IDS)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())

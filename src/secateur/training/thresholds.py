"""Thresholds that are learned together with the weights, a number for each layer: how sparse a layer gets follows from the
loss and from weight decay, and is not asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from secateur.errors import SecateurError
from secateur.plan import make_plan
from secateur.recipe import Recipe
from secateur.training.masks import Masks, plain

START = -5.0  # of the parameter that a threshold is the sigmoid of: 0.0067


class SoftThreshold(nn.Module):
    """sign(w) max(|w| - sigmoid(s), 0). Kusupati et al. 2020 (STR), arXiv:2002.03231, eq. 2 and 3."""

    def __init__(self, start: float, like: Tensor) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.tensor(start, dtype=like.dtype, device=like.device))

    def forward(self, weight: Tensor) -> Tensor:
        """weight: of any shape."""
        return weight.sign() * (weight.abs() - self.s.sigmoid()).relu()


class LearnedThresholds:
    """Soft thresholds in the layers that a recipe names, learned by an optimizer that has the model's parameters.

    recipe: for its `protect` and `include` alone. While they learn, the layers are parametrized; `finish_` gives the model
    its plain parameters back, with zeros, and the masks that hold them from then on (`Pruner(.., masks=..)`, static).
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, optimizer: torch.optim.Optimizer, start: float = START
    ) -> None:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise SecateurError("thresholds are parameters, too: make them before the model is wrapped")
        self._layers: list[tuple[str, nn.Module, str]] = []
        for setting in make_plan(model, recipe).settings:
            path, _, name = setting.layer.parameter.rpartition(".")
            if setting.layer.index is not None:
                raise SecateurError(
                    f"{setting.layer.name} is one of a stack; a threshold is learned for whole parameters"
                )
            self._layers.append((plain(setting.layer.parameter), model.get_submodule(path), name))
        for parameter, module, name in self._layers:
            weight = getattr(module, name)
            group = next((g for g in optimizer.param_groups if any(p is weight for p in g["params"])), None)
            if group is None:
                raise SecateurError(f"the optimizer does not have {parameter}: make it of model.parameters()")
            threshold = SoftThreshold(start, weight)
            parametrize.register_parametrization(module, name, threshold)
            settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            named = (f"{parameter} threshold", threshold.s) if "param_names" in group else threshold.s
            optimizer.add_param_group({**settings, "params": [named]})  # it learns and decays as its weight does

    @property
    def sparsity(self) -> float:
        """Share of the weights that their thresholds set to zero."""
        with torch.no_grad():
            weights = [getattr(module, name) for _, module, name in self._layers]
        return 1 - sum(int((w != 0).sum()) for w in weights) / sum(w.numel() for w in weights)

    def finish_(self) -> Masks:
        """Put the weights behind their thresholds, and say which are left."""
        keep = {}
        for parameter, module, name in self._layers:
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
            keep[parameter] = getattr(module, name).detach() != 0
        return Masks(keep)

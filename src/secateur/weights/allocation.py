"""Allocation: how much goes from where. Per-layer summaries and a target in, a sparsity per layer out.

Summaries are small, so that no allocation ever holds the scores of a whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.errors import SecateurError

FLOOR = 0.02  # of a layer's weights that allocations by score leave: an emptied layer is a dead model
OUTLIER = 5.0  # OWL's M: an outlier scores this many times the layer's mean
SWING = 0.08  # OWL's lambda: how far a layer may stray from the target
PRECISION = 20  # leading bits of a float32 score that a histogram tells apart: 11 of mantissa


@dataclass(frozen=True)
class Summary:
    """What an allocation may know of a layer.

    shape: the parameter's own ([out, in], or [out, in, *kernel]); scores, counts: a histogram, ascending; block: the
    block it belongs to.
    """

    name: str
    shape: tuple[int, ...]
    block: str = ""
    scores: Tensor | None = None  # [bins]
    counts: Tensor | None = None  # [bins]

    @property
    def size(self) -> int:
        return int(torch.Size(self.shape).numel())


def histogram(scores: Tensor) -> tuple[Tensor, Tensor]:
    """(lower edges ascending, counts) of non-negative scores: bins of equal leading bits, so of equal relative width."""
    bits = scores.detach().float().flatten().contiguous().view(torch.int32)
    keys, counts = (bits >> (32 - PRECISION)).unique(return_counts=True)
    return (keys << (32 - PRECISION)).to(torch.int32).view(torch.float32), counts


def summarize(name: str, shape: Sequence[int], block: str, scores: Tensor, allocation: str) -> Summary:
    """scores: [out, in], at least 0."""
    if allocation == "lamp":
        scores = lamp_scores(scores)
    edges, counts = histogram(scores)
    return Summary(name, tuple(shape), block, edges.cpu(), counts.cpu())


def lamp_scores(scores: Tensor) -> Tensor:
    """s^2 over the sum of s^2 of the layer's weights that are not smaller. Lee et al. 2021, arXiv:2010.07611, eq. 4."""
    squares, order = scores.flatten().cpu().double().square().sort()
    rest = squares.flip(0).cumsum(0).flip(0)
    lamp = torch.empty_like(squares)
    lamp[order] = squares / rest.clamp(min=torch.finfo(torch.float64).tiny)
    return lamp.float().reshape(scores.shape).to(scores.device)


def uniform(layers: Sequence[Summary], sparsity: float) -> dict[str, float]:
    """The same for every layer."""
    return {layer.name: sparsity for layer in layers}


def erdos_renyi(layers: Sequence[Summary], sparsity: float) -> dict[str, float]:
    """Density in proportion to (out + in + sum of kernel) / size (ERK). Evci et al. 2020, arXiv:1911.11134, section 3."""
    raw = {layer.name: sum(layer.shape) / layer.size for layer in layers}
    budget = (1 - sparsity) * sum(layer.size for layer in layers)
    dense: set[str] = set()
    while True:  # layers whose density would exceed 1 stay dense, the others share what is left
        left = budget - sum(layer.size for layer in layers if layer.name in dense)
        weight = sum(raw[layer.name] * layer.size for layer in layers if layer.name not in dense)
        scale = left / weight if weight else 0.0
        over = {layer.name for layer in layers if layer.name not in dense and scale * raw[layer.name] > 1}
        if not over:
            break
        dense |= over
    return {name: 0.0 if name in dense else 1 - scale * raw[name] for name in raw}


def global_(layers: Sequence[Summary], sparsity: float) -> dict[str, float]:
    """One threshold for all layers' scores together; a layer keeps at least FLOOR of its weights.

    Exact up to the histogram's relative resolution (2^-11): scores in the threshold's own bin go in the order of layers.
    """
    caps = {layer.name: int(layer.size * (1 - FLOOR)) for layer in layers}
    target = int(sparsity * sum(layer.size for layer in layers) + 1e-9)
    edges = torch.cat([_scores(layer)[0] for layer in layers]).unique()
    low, high = 0, len(edges)
    while low < high:  # the lowest edge such that removing all bins up to it reaches the target
        middle = (low + high) // 2
        if sum(_removed(layer, edges[middle], caps, True) for layer in layers) >= target:
            high = middle
        else:
            low = middle + 1
    if low == len(edges):
        return {layer.name: caps[layer.name] / layer.size for layer in layers}
    removed = {layer.name: _removed(layer, edges[low], caps, False) for layer in layers}
    missing = target - sum(removed.values())
    for layer in layers:
        extra = min(missing, _removed(layer, edges[low], caps, True) - removed[layer.name])
        removed[layer.name] += extra
        missing -= extra
    return {layer.name: removed[layer.name] / layer.size for layer in layers}


def _scores(layer: Summary) -> tuple[Tensor, Tensor]:
    assert layer.scores is not None
    assert layer.counts is not None
    return layer.scores, layer.counts


def _removed(layer: Summary, edge: Tensor, caps: Mapping[str, int], inclusive: bool) -> int:
    scores, counts = _scores(layer)
    index = int(torch.searchsorted(scores, edge, right=inclusive))
    return min(caps[layer.name], int(counts[:index].sum()))


def owl(layers: Sequence[Summary], sparsity: float) -> dict[str, float]:
    """Blocks with more outliers keep more. Yin et al. 2024, arXiv:2310.05175, section 3: sparsities within SWING of the
    target, falling linearly with the block's share of outliers (scores above OUTLIER times the block's mean), their mean
    the target.
    """
    blocks: dict[str, list[Summary]] = {}
    for layer in layers:
        blocks.setdefault(layer.block, []).append(layer)
    sizes = {block: sum(layer.size for layer in members) for block, members in blocks.items()}
    share = {block: _outliers(members) for block, members in blocks.items()}
    low, high = min(share.values()), max(share.values())
    apart = high - low > 1e-9  # not by rounding alone
    spread = {b: (share[b] - low) / (high - low) * 2 * SWING if apart else 0.0 for b in share}
    mean = sum(spread[b] * sizes[b] for b in spread) / sum(sizes.values())
    widest = max(abs(mean - part) for part in spread.values())  # up to twice SWING where one block stands out
    room = max(0.0, min(SWING, sparsity, 1 - FLOOR - sparsity))
    narrow = min(1.0, room / widest) if widest else 0.0
    return {layer.name: max(0.0, sparsity + narrow * (mean - spread[layer.block])) for layer in layers}


def _outliers(members: Sequence[Summary]) -> float:
    """The share of a block's scores above OUTLIER times their mean."""
    scores, counts = (torch.cat(parts) for parts in zip(*map(_scores, members), strict=True))
    mean = (scores.double() * counts).sum() / counts.sum()
    return float(counts[scores > OUTLIER * mean].sum() / counts.sum())


ALLOCATIONS: dict[str, Callable[[Sequence[Summary], float], dict[str, float]]] = {
    "uniform": uniform,
    "erdos-renyi": erdos_renyi,
    "global": global_,
    "lamp": global_,  # of scores that are relative to their layer
    "owl": owl,
}
NEEDS_SCORES = frozenset({"global", "lamp", "owl"})


def allocate(name: str, layers: Sequence[Summary], sparsity: float) -> dict[str, float]:
    """Layer name -> sparsity. Raises SecateurError when the target would empty layers."""
    if not layers:
        return {}
    if name in ("global", "lamp") and sparsity > 1 - FLOOR:
        raise SecateurError(
            f"sparsity {sparsity} with {name} allocation: every layer keeps {FLOOR:.0%}, so at most {1 - FLOOR:.2f}"
        )
    return ALLOCATIONS[name](layers, sparsity)

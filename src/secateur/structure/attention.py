"""torch's nn.MultiheadAttention with heads that can be removed: the same parameters under the same names.

The original computes the size of a head as width / heads, and so cannot lose a head. `replace_` gives its instances a
class that keeps the two numbers apart; nothing else about them changes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SplitAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention whose heads, and whose sizes of queries and of values, are numbers of their own."""

    head_size: int
    value_size: int
    scale: float

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention's."""
        unbatched = query.dim() == 2
        if unbatched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self._projected(query, key, value)
        mask = self._mask(q, k, attn_mask, key_padding_mask)
        tokens = k.shape[2]
        k, v = self._longer(k, self.bias_k, self.head_size), self._longer(v, self.bias_v, self.value_size)
        mask = None if mask is None else F.pad(mask, (0, k.shape[2] - tokens))
        scale = self.scale
        if need_weights:
            scores = (q * scale) @ k.transpose(-2, -1)  # [batch, heads, queries, keys]
            weights = (scores if mask is None else scores + mask).softmax(-1)
            out = F.dropout(weights, self.dropout, self.training) @ v
        else:
            weights = None
            dropout = self.dropout if self.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
        out = self.out_proj(out.transpose(1, 2).flatten(2))  # [batch, queries, width]
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if unbatched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Queries, keys and values, [batch, heads, tokens, size] each."""
        sizes = [self.num_heads * self.head_size, self.num_heads * self.head_size, self.num_heads * self.value_size]
        if self.in_proj_weight is not None:
            matrices = self.in_proj_weight.split(sizes)
        else:
            matrices = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.split(sizes)
        each = (self.head_size, self.head_size, self.value_size)
        return [
            F.linear(x, w, b).unflatten(-1, (self.num_heads, size)).transpose(1, 2)
            for x, w, b, size in zip((query, key, value), matrices, biases, each, strict=True)
        ]

    def _longer(self, x: Tensor, bias: Tensor | None, size: int) -> Tensor:
        """Keys or values with a learned one behind them, and one of zeros, where the module has them."""
        if bias is not None:
            own = bias.unflatten(-1, (self.num_heads, size)).transpose(1, 2)
            x = torch.cat([x, own.expand(len(x), -1, -1, -1)], 2)
        if self.add_zero_attn:
            x = torch.cat([x, torch.zeros_like(x[:, :, :1])], 2)
        return x

    def _mask(self, q: Tensor, k: Tensor, attn_mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """Both masks as one that is added to the scores: [batch, heads or 1, queries, keys]."""
        mask = None
        for given, where in ((attn_mask, "attention"), (padding, "padding")):
            if given is None:
                continue
            if given.dtype.is_floating_point:
                added = given.to(q.dtype)
            else:
                added = q.new_zeros(given.shape).masked_fill(given, float("-inf"))
            if where == "padding":
                added = added.reshape(-1, 1, 1, k.shape[2])
            elif added.dim() == 3:  # [batch * heads, queries, keys]
                added = added.unflatten(0, (q.shape[0], -1))
            mask = added if mask is None else mask + added
        return mask


def replace_(model: nn.Module) -> Callable[[], None]:
    """Let all of torch's own multi-head attention in a model be of this class. Returns what undoes it."""
    changed = []
    for module in model.modules():
        if type(module) is nn.MultiheadAttention:
            changed.append((module, module._qkv_same_embed_dim))
            module.__class__ = SplitAttention
            module.head_size = module.value_size = module.head_dim  # type: ignore[assignment]
            module.scale = module.head_dim**-0.5  # type: ignore[assignment]
            module._qkv_same_embed_dim = False  # torch's fused encoder layer must not take the parameters by itself

    def undo() -> None:
        for module, same in changed:
            module.__class__ = nn.MultiheadAttention
            module._qkv_same_embed_dim = same
            for name in ("head_size", "value_size", "scale"):
                vars(module).pop(name, None)

    return undo

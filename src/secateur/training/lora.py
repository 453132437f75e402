"""Adapters that respect a mask: W + s (B A) * M, where M is where W is not zero. A plain adapter fills the zeros of a
pruned model when it is merged, and masking after the merge loses a part of what it learned.
"""

from __future__ import annotations

import functools
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import SecateurError


def hold_masks_(model: nn.Module) -> int:
    """Make the LoRA layers of a PEFT model learn W + s (B A) * M, so that merging is exact and keeps every zero. Call it
    after `get_peft_model`; train, merge and unload as usual. Returns how many layers there are whose weights have zeros.

    Raises SecateurError where there are none, or an adapter is of another kind.
    """
    try:
        from peft.tuners.lora.layer import Linear, LoraLayer
    except ImportError:
        raise SecateurError("adapters need the package peft: pip install 'secateur[lora]'") from None
    masked = _masked(Linear)
    layers: dict[str, Any] = {n: module for n, module in model.named_modules() if isinstance(module, LoraLayer)}
    sparse = {name: m for name, m in layers.items() if bool((m.get_base_layer().weight == 0).any())}
    for name, module in sparse.items():
        if type(module) not in (Linear, masked) or module.lora_variant:
            kind = next(iter(module.lora_variant.values()), module)
            raise SecateurError(
                f"{name} has an adapter of the kind {type(kind).__name__}; masks are held in plain LoRA on linear layers.\n"
                "  Leave the layer out of target_modules, or use the variant that LoraConfig has by default."
            )
    if not sparse:
        raise SecateurError(f"none of the {len(layers)} layers with adapters has zeros: there is no mask to hold")
    for module in sparse.values():
        module.__class__ = masked
    return len(sparse)


@functools.cache
def _masked(linear: type) -> type:
    """PEFT's linear layer with its update under the mask."""

    class MaskedLinear(linear):
        """W + s (B A) * M."""

        def get_delta_weight(self, adapter: str) -> Tensor:
            return super().get_delta_weight(adapter) * (self.get_base_layer().weight != 0)

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.disable_adapters or self.merged:
                return super().forward(x, *args, **kwargs)
            if kwargs.get("adapter_names") is not None:
                raise SecateurError("adapters under a mask do not mix in one batch: set one active adapter")
            result = self.base_layer(x, *args, **kwargs)
            for adapter in self.active_adapters:
                if adapter not in self.lora_A:
                    continue
                delta = self.get_delta_weight(adapter)
                delta = delta.T if self.fan_in_fan_out else delta  # [out, in]
                bias = self.lora_B[adapter].bias
                bias = None if bias is None else bias * self.scaling[adapter]
                given = self.lora_dropout[adapter](self._cast_input_dtype(x, delta.dtype))
                result = result + F.linear(given, delta, bias).to(result.dtype)
            return result

    MaskedLinear.__qualname__ = "MaskedLinear"  # where `__getattr__` has it, for pickles
    return MaskedLinear


def __getattr__(name: str) -> type:
    if name != "MaskedLinear":
        raise AttributeError(name)
    from peft.tuners.lora.layer import Linear

    return _masked(Linear)

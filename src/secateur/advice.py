"""What helps for which aim, the best first, said as plainly where it does not help as where it does.

The figures on speed were measured on one 2-core AVX-512 machine with a 389M LLaMA that generates one token at a time,
against torch in bfloat16; what nobody here measured says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

HERE, PARTLY, ELSEWHERE, LATER = "in this version", "pruning in this version", "another tool", "not in this version"
BITS_8, BITS_4 = 8.5, 4.5  # per weight, with the scales of blocks of 32


@dataclass(frozen=True)
class Advice:
    """what to do, what it brings, how, and whether this version of secateur does it."""

    what: str
    effect: str
    how: str
    here: str


@dataclass(frozen=True)
class Facts:
    """What the advice depends on. prunable: share of all weights that lie in layers that can be pruned."""

    bytes: int
    parameters: int
    prunable: float
    divides: bool  # 2:4 divides every layer

    def stored(self, sparsity: float) -> int:
        """Bytes with one bit per weight that says where the zeros are, and only the others kept."""
        bits = 8 * self.bytes / max(self.parameters, 1)
        return round(self.bytes * (1 - self.prunable * (sparsity - 1 / bits)))

    def quantized(self, bits: float) -> int:
        """Bytes with all weights at so many bits."""
        return round(self.parameters * bits / 8)


def advise(facts: Facts) -> Mapping[str, tuple[Advice, ...]]:
    """Aim -> what to do about it."""
    return {
        "a smaller file": _smaller(facts),
        "faster on a CPU": _cpu(),
        "faster on a GPU": _gpu(facts),
        "a phone": _phone(),
    }


def _smaller(facts: Facts) -> tuple[Advice, ...]:
    sizes = ", ".join(f"{_mb(facts.stored(s))} at {s:.0%} zeros" for s in (0.5, 0.7, 0.9))
    return (
        Advice(
            "quantize",
            f"{_mb(facts.quantized(BITS_8))} at 8 bits, {_mb(facts.quantized(BITS_4))} at 4 bits",
            "prune first, then quantize the result: llama.cpp (GGUF), torchao, bitsandbytes",
            ELSEWHERE,
        ),
        Advice(
            "store only what is not zero",
            sizes,
            "a mask bit per weight and the other weights packed; no stock library reads such files",
            LATER,
        ),
        _remove("the file shrinks by what is removed"),
        Advice(
            "zeros in dense tensors",
            f"none: still {_mb(facts.bytes)}",
            "what `secateur prune` writes: the same shapes, so that stock libraries load it",
            HERE,
        ),
    )


def _cpu() -> tuple[Advice, ...]:
    return (
        Advice(
            "quantize",
            "3 times the tokens per second of torch in bfloat16 at 8 bits, 5 to 7 times at 4 bits (measured: 389M LLaMA, "
            "2 cores with AVX-512, one token at a time)",
            "llama.cpp on a GGUF file of the pruned or the original model",
            ELSEWHERE,
        ),
        Advice(
            "sparse kernels",
            "2.3 to 2.7 times at 50 % zeros, 2.8 to 3.3 times at 70 % (measured in the same way, with a prototype); "
            "no gain for long prompts, batches of 64, or weights that fit in the cache",
            "in any pattern; below 25 % zeros they lose",
            LATER,
        ),
        _remove("time falls with what is removed"),
        Advice(
            "zeros in dense tensors",
            "none: 1.0 times (measured)",
            "dense kernels multiply zeros like other numbers",
            HERE,
        ),
    )


def _gpu(facts: Facts) -> tuple[Advice, ...]:
    note = "" if facts.divides else "; protect the layers that 4 does not divide (see the patterns above)"
    return (
        Advice(
            "the pattern 2:4",
            "up to 2 times in large matrix products on sparse tensor cores (NVIDIA Ampere and later), less in a whole "
            "model (not measured here)",
            f"`secateur prune --pattern 2:4`, then torch.sparse.to_sparse_semi_structured in half precision{note}; "
            "torchao and vLLM have dropped their kernels for it",
            PARTLY,
        ),
        Advice(
            "quantize",
            "memory traffic falls with the bits per weight (not measured here)",
            "the formats of your serving engine",
            ELSEWHERE,
        ),
        _remove("time falls with what is removed (not measured here)"),
        Advice("zeros in no pattern", "none", "dense kernels multiply zeros like other numbers", HERE),
    )


def _phone() -> tuple[Advice, ...]:
    return (
        Advice(
            "quantize and export",
            "file and memory as under a smaller file",
            "ExecuTorch with XNNPACK, or llama.cpp",
            ELSEWHERE,
        ),
        _remove("smaller and faster in every runtime; ExecuTorch takes layers of uneven widths"),
        Advice("zeros in dense tensors", "none", "ONNX Runtime stores and multiplies them like other numbers", HERE),
    )


def _remove(effect: str) -> Advice:
    return Advice(
        "remove whole layers, heads or widths",
        effect,
        "secateur prune --remove ffn=30% layers=2, then some training to recover",
        HERE,
    )


def _mb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"

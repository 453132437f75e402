"""Any architecture: prune tiny random models of many families by streaming, and check the results with other means.

    python benchmarks/families.py [--families LLaMA,GPT-2] [--methods magnitude,wanda,sparsegpt] [--jobs 2]

The models stand in families.yaml. Each is saved, pruned from its folder into another by every method at 50 % and 2:4, and
loaded by stock transformers. Checked are: files, headers, dtypes and names as before; nothing changed but pruned layers;
the exact sparsity of each; weights that magnitude and Wanda keep as they were; ties as before; every weight, bit by bit,
as when the model is pruned in memory; and the outputs of both. Writes results/families.json.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from torch import Tensor, nn

from common import RESULTS, machine, write
from secateur.data import Data, call, from_iterable
from secateur.forward import no_cache
from secateur.pipeline import prune
from secateur.plan import make_plan
from secateur.probe import answer
from secateur.prune import InPlace, Job, Report, run
from secateur.recipe import Recipe, method
from secateur.stream.observe import make_observable
from secateur.stream.walk import Resident

METHODS, PATTERNS = ("magnitude", "wanda", "sparsegpt"), ("50 %", "2:4")
TABLE = Path(__file__).resolve().parent / "families.yaml"
SHARD = "150KB"  # so that most models have several shards
CLOSE = 1e-5  # of the largest output: two loaded copies of one model in float32


# The models


@dataclass(frozen=True)
class Family:
    """A row of families.yaml."""

    kind: str  # class of transformers
    config: Mapping[str, Any]
    inputs: str = "text"
    dtype: str = "float32"
    recipe: Mapping[str, Any] = field(default_factory=dict)
    remark: str = ""


def families() -> dict[str, Family]:
    """Name -> family."""
    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))

    def whole(config: Any) -> Any:
        if not isinstance(config, dict):
            return config
        base = table["bases"][config["base"]] if "base" in config else {}
        return {**base, **{key: whole(value) for key, value in config.items() if key != "base"}}

    return {name: Family(row.pop("class"), whole(row.pop("config")), **row) for name, row in table["families"].items()}


def build(family: Family) -> nn.Module:
    """The family's model with random weights, none of them constant, in float32."""
    import transformers

    kind = getattr(transformers, family.kind)
    torch.manual_seed(0)
    model = kind(kind.config_class(**family.config)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and (parameter.numel() < 2 or float(parameter.std()) == 0):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(generator=generator).mul_(0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(1, 2, generator=generator)
    return model


def save(family: Family, folder: Path) -> None:
    """Write the family's model as transformers does, in several shards."""
    model = build(family)
    if family.dtype == "mixed":  # matrices in fewer bits than the rest
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16() if parameter.ndim > 1 else parameter.data
    else:
        model.to(getattr(torch, family.dtype))
    model.save_pretrained(folder, max_shard_size=SHARD)


def batches(family: Family) -> Data:
    """Two calibration batches."""
    return from_iterable([_batch(family, seed) for seed in (0, 1)])


def _batch(family: Family, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    vocabulary = min(family.config.get("vocab_size", 96), 96) - 6  # the last ids stand for images and the like

    def ids(length: int) -> Tensor:
        return torch.randint(3, vocabulary, (2, length), generator=generator)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def picture(start: int, tokens: int, image: Tensor, **more: Any) -> dict[str, Tensor]:
        text = ids(40)
        text[:, start : start + tokens] = 95
        return {"input_ids": text, "pixel_values": image} | {key: make(text) for key, make in more.items()}

    return INPUTS[family.inputs](ids, noise, picture)


INPUTS: dict[str, Callable[[Any, Any, Any], dict[str, Tensor]]] = {
    "text": lambda ids, noise, picture: {"input_ids": ids(24)},
    "seq2seq": lambda ids, noise, picture: {"input_ids": ids(24), "decoder_input_ids": ids(16)},
    "image": lambda ids, noise, picture: {"pixel_values": noise(4, 3, 32, 32)},
    "image64": lambda ids, noise, picture: {"pixel_values": noise(2, 3, 64, 64)},
    "image2seq": lambda ids, noise, picture: {"pixel_values": noise(2, 3, 32, 32), "decoder_input_ids": ids(16)},
    "mel": lambda ids, noise, picture: {"input_features": noise(2, 16, 64), "decoder_input_ids": ids(16)},
    "spectrogram": lambda ids, noise, picture: {"input_values": noise(2, 32, 16)},
    "wave": lambda ids, noise, picture: {"input_values": noise(2, 800)},
    "wave2seq": lambda ids, noise, picture: {"input_values": noise(2, 1600), "decoder_input_ids": ids(16)},
    "series": lambda ids, noise, picture: {"past_values": noise(2, 32, 2)},
    "image and text": lambda ids, noise, picture: {"input_ids": ids(16), "pixel_values": noise(2, 3, 32, 32)},
    "llava": lambda ids, noise, picture: picture(2, 16, noise(2, 3, 32, 32)),
    "blip2": lambda ids, noise, picture: picture(2, 4, noise(2, 3, 32, 32)),
    "idefics3": lambda ids, noise, picture: picture(2, 4, noise(2, 1, 3, 32, 32)),
    "gemma3": lambda ids, noise, picture: picture(
        2, 4, noise(2, 3, 32, 32), token_type_ids=lambda text: (text == 95).long()
    ),
    "qwen2vl": lambda ids, noise, picture: picture(
        2,
        16,
        noise(2 * 64, 3 * 2 * 4 * 4),
        image_grid_thw=lambda text: torch.tensor([[1, 8, 8]] * 2),
        mm_token_type_ids=lambda text: (text == 95).long(),
    ),
}


# The checks


class Rounded(InPlace):
    """In memory, rounded to what the checkpoint stores."""

    def __init__(self, dtypes: Mapping[str, torch.dtype]) -> None:
        self.dtypes = dtypes

    def stored_dtype(self, parameter: str) -> torch.dtype:
        return self.dtypes[parameter]


@dataclass
class Case:
    """One family, pruned in one way: the folders, both models, and what there is to say of each."""

    family: Family
    recipe: Recipe
    source: Path
    out: Path
    report: Report
    job: Job
    before: nn.Module
    after: nn.Module
    data: Data


def recipe_of(family: Family, name: str, pattern: str) -> Recipe:
    """The recipe of a method at 50 % or N:M."""
    how = {"granularity": pattern} if ":" in pattern else {"sparsity": 0.5}
    return method(name, **how, **family.recipe)


def prune_both_ways(family: Family, recipe: Recipe, source: Path, out: Path) -> Case:
    """From folder to folder, and in memory."""
    import transformers

    kind = getattr(transformers, family.kind)
    data = batches(family)
    report = prune(source, recipe, data if recipe.needs() else None, out)
    resident = load(kind, source)
    make_observable(resident)
    stored = {name: value.dtype for name, value in kind.from_pretrained(source, dtype="auto").named_parameters()}
    if family.dtype == "mixed":
        stored = {n: torch.bfloat16 if p.ndim > 1 else torch.float32 for n, p in resident.named_parameters()}
    job = Job(resident, make_plan(resident, recipe), data if recipe.needs() else None, Resident(), Rounded(stored))
    run(job)
    return Case(family, recipe, source, out, report, job, load(kind, source), load(kind, out), data)


def load(kind: Any, folder: Path) -> nn.Module:
    """By stock transformers, in float32, in memory of its own (what is mapped from a file may lie where products are
    computed in another order).
    """
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def problems(case: Case) -> Iterator[str]:
    """Everything that is not as it has to be."""
    yield from _files(case)
    yield from _stored(case)
    yield from _sparsity(case)
    yield from _weights(case)
    yield from _outputs(case)


def _files(case: Case) -> Iterator[str]:
    for path in case.source.iterdir():
        twin = case.out / path.name
        if not twin.exists():
            yield f"{path.name} is missing"
        elif path.suffix == ".safetensors":
            if _header(path) != _header(twin):
                yield f"{path.name}: names, dtypes, shapes or places differ"
        elif path.read_bytes() != twin.read_bytes():
            yield f"{path.name} differs"


def _header(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(struct.unpack("<Q", file.read(8))[0])


def _tensors(folder: Path) -> dict[str, Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as shard:
            found.update({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118
    return found


def _stored(case: Case) -> Iterator[str]:
    """What is on disk either changed by zeros alone (where the method changes nothing else) or not at all."""
    old, new = _tensors(case.source), _tensors(case.out)
    for name in old:
        kept = (new[name] == old[name]) | (new[name] == 0)
        if case.recipe.update == "none" and not bool(kept.all()):
            yield f"{name}: weights that stay have changed"


def _sparsity(case: Case) -> Iterator[str]:
    layers = {setting.layer.name: setting.layer for setting in case.job.plan.settings}
    if sorted(layers) != sorted(found.name for found in case.report.layers):
        yield "not the same layers by streaming and in memory"
        return
    pattern = case.recipe.granularity
    for name, layer in layers.items():
        zero = layer.matrix(case.after.get_parameter(layer.parameter).detach()) == 0
        if pattern == "2:4":
            exact = bool((zero.unflatten(1, (-1, 4)).sum(-1) == 2).all())
        elif pattern == "per-row":
            exact = bool((zero.sum(1) == zero.shape[1] // 2).all())
        else:
            exact = int(zero.sum()) == zero.numel() // 2
        if not exact:
            yield f"{name}: not exactly {case.recipe.granularity} at 50 %"


def _weights(case: Case) -> Iterator[str]:
    resident, before, after = (_parameters(model) for model in (case.job.model, case.before, case.after))
    masks = [name for name in after if not torch.equal(resident[name] == 0, after[name] == 0)]
    values = [name for name in after if not torch.equal(resident[name], after[name])]
    if masks:
        yield f"masks by streaming and in memory differ: {', '.join(masks[:3])}"
    elif values:
        yield f"weights by streaming and in memory differ: {', '.join(values[:3])}"
    if _ties(case.before) != _ties(case.after):
        yield "not the same weights are tied"
    tied = {name: group for group in _ties(case.before) for name in group}
    pruned = {alias for s in case.job.plan.settings for alias in tied.get(s.layer.parameter, [s.layer.parameter])}
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    if extra := sorted(changed - pruned):
        yield f"changed without being pruned: {', '.join(extra[:3])}"
    if missing := sorted(pruned - changed):
        yield f"pruned without being changed: {', '.join(missing[:3])}"


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def _ties(model: nn.Module) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return sorted(names for names in groups.values() if len(names) > 1)


def _outputs(case: Case) -> Iterator[str]:
    found = []
    for model in (case.job.model, case.after):
        torch.manual_seed(0)
        with torch.no_grad():
            found.append(answer(call(model, case.data.batches[0], **no_cache(model))))
    apart = float((found[0] - found[1]).abs().max() / found[0].abs().max())
    if not apart <= CLOSE:
        yield f"outputs of the reloaded model differ by {apart:.1e} of the largest"


# The run


def examine(name: str, methods: tuple[str, ...] = METHODS, patterns: tuple[str, ...] = PATTERNS) -> dict[str, Any]:
    """A family by every method: a row of families.json."""
    family = families()[name]
    row: dict[str, Any] = {
        "class": family.kind,
        "inputs": family.inputs,
        "dtype": family.dtype,
        "remark": family.remark,
    }
    row["results"] = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        save(family, root / "model")
        row["shards"] = len(list((root / "model").glob("*.safetensors")))
        for wanted in methods:
            for pattern in patterns:
                started = time.perf_counter()
                try:
                    recipe = recipe_of(family, wanted, pattern)
                    case = prune_both_ways(family, recipe, root / "model", root / f"{wanted}-{pattern[0]}")
                    found = list(problems(case))
                    row |= _facts(case)
                except Exception as error:
                    found = [f"{type(error).__name__}: {error}", traceback.format_exc(limit=-3)]
                result = {"problems": found, "seconds": round(time.perf_counter() - started, 2)}
                if not found:
                    result |= _result(case)
                row["results"][f"{wanted} {pattern}"] = result
    return row


def _facts(case: Case) -> dict[str, Any]:
    return {
        "parameters": sum(parameter.numel() for parameter in case.before.parameters()),
        "blocks": len(case.job.plan.blocks),
        "layers": len(case.report.layers),
    }


def _result(case: Case) -> dict[str, Any]:
    return {
        "layers": len(case.report.layers),
        "protected": dict(Counter(case.report.protected.values())),
        "by weights alone": sum("its weights alone" in note for layer in case.report.layers for note in layer.notes),
        "verified": case.report.verified["how"],
        "difference": case.report.verified["difference"],
    }


def main() -> None:
    """Examine all families, or some, and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", help="names from families.yaml, with commas (default: all)")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    known = families()
    names = args.families.split(",") if args.families else list(known)
    path = RESULTS / "families.json"
    rows = json.loads(path.read_text())["families"] if args.families and path.exists() else {}
    started = time.perf_counter()
    with ProcessPoolExecutor(args.jobs, initializer=quiet) as pool:
        futures = {name: pool.submit(examine, name, tuple(args.methods.split(","))) for name in names}
        for name, future in futures.items():
            rows[name] = future.result()
            bad = {key: found["problems"] for key, found in rows[name]["results"].items() if found["problems"]}
            print(f"{'FAIL' if bad else 'ok  '} {name}", *(f"\n       {key}: {why[0]}" for key, why in bad.items()))
    ordered = {name: rows[name] for name in known if name in rows}
    write(path, {"seconds": round(time.perf_counter() - started), "families": ordered, "machine": machine()})


def quiet(threads: int = 1) -> None:
    """Few threads, and no reports of loading."""
    from transformers.utils import logging

    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    main()

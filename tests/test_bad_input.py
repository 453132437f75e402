"""The table of what can be wrong with an input: each ends in one clear error, and leaves nothing that looks whole.

A row: how the input is broken, and the words that must stand in the message (the file, tensor or key; what was found;
what was expected; the way out). Add one: write a function that breaks `Input`, decorated with the words.
"""

import json
import math
import os
import pickle
import shutil
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from conftest import VOCABULARY, batches, contents, fingerprint, text
from secateur import Recipe, SecateurError, method, pipeline, prune
from secateur.cli import app
from secateur.recipe import read_yaml, validate
from secateur.stream.staging import staging_folder

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass
class Input:
    """Everything that `prune` is given, good until a row breaks it."""

    folder: Path
    out: Path
    recipe: Callable[[], Recipe] = lambda: method("wanda", sparsity=0.5)
    data: Any = field(default_factory=batches)

    def calibrate(self, **calibration: Any) -> None:
        """Learn from text."""
        self.data = None
        self.recipe = lambda: method("wanda", sparsity=0.5, calibration={"samples": 2, "length": 8} | calibration)

    def settings(self, name: str, **changes: Any) -> None:
        """Change a JSON file of the folder; None removes a key."""
        path = self.folder / name
        content = (json.loads(path.read_text()) if path.exists() else {}) | changes
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    def tensors(self, shard: str, **changes: torch.Tensor) -> None:
        """Change or add tensors of a shard (dots written as double underscores)."""
        found = load_file(self.folder / shard) | {key.replace("__", "."): value for key, value in changes.items()}
        save_file(found, self.folder / shard, metadata={"format": "pt"})

    def single(self) -> None:
        """One shard, without an index."""
        save_file(load_file(self.folder / FIRST) | load_file(self.folder / SECOND), self.folder / "model.safetensors")
        for name in (FIRST, SECOND, INDEX):
            (self.folder / name).unlink()


@dataclass(frozen=True)
class Row:
    broken: Callable[[Input], None]
    words: tuple[str, ...]
    late: bool  # found after work has begun: a staging folder may be left


TABLE: list[Row] = []


def row(*words: str, late: bool = False) -> Callable[[Callable[[Input], None]], Callable[[Input], None]]:
    def add(broken: Callable[[Input], None]) -> Callable[[Input], None]:
        TABLE.append(Row(broken, words, late))
        return broken

    return add


@pytest.fixture
def given(llama: Path, tmp_path: Path) -> Input:
    (tmp_path / "work").mkdir()
    folder = shutil.copytree(llama, tmp_path / "in" / "llama")
    return Input(folder, tmp_path / "work" / "out")


# Shards


def header(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write(path: Path, text: bytes, data: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit_entry(given: Input, **changes: Any) -> None:
    entries, data = header(given.folder / FIRST)
    entries["model.embed_tokens.weight"] |= changes
    write(given.folder / FIRST, json.dumps(entries).encode(), data)


@row(FIRST, "truncated", "again")
def truncated_shard(given: Input) -> None:
    os.truncate(given.folder / FIRST, (given.folder / FIRST).stat().st_size - 100)


@row(FIRST, "5 bytes", "again")
def shard_of_five_bytes(given: Input) -> None:
    (given.folder / FIRST).write_bytes(b"\x10\0\0\0\0")


@row(FIRST, "0 bytes", "again")
def empty_shard(given: Input) -> None:
    (given.folder / FIRST).write_bytes(b"")


@row(FIRST, "its header claims 9223372036854775807 bytes", "again")
def header_larger_than_the_file(given: Input) -> None:
    (given.folder / FIRST).write_bytes(struct.pack("<Q", (1 << 63) - 1) + b"{}" * 100)


@row(FIRST, "not a safetensors file", "again")
def header_that_is_no_json(given: Input) -> None:
    write(given.folder / FIRST, b"\x80\x81{" * 100, b"")


@row(FIRST, "not a safetensors file", "again")
def header_nested_deeply(given: Input) -> None:
    write(given.folder / FIRST, b"[" * 200_000, b"")


@row(FIRST, "not a safetensors file")
def header_with_a_huge_number(given: Input) -> None:
    edit_entry(given, shape=[10**30, 8])


@row(FIRST, "not a safetensors file")
def header_that_is_a_list(given: Input) -> None:
    write(given.folder / FIRST, b"[1, 2]", b"")


@row(FIRST, "a name twice")
def header_with_a_name_twice(given: Input) -> None:
    entries, data = header(given.folder / FIRST)
    one = json.dumps(entries["model.embed_tokens.weight"])
    text = json.dumps(entries)[:-1] + f', "model.embed_tokens.weight": {one}}}'
    write(given.folder / FIRST, text.encode(), data)


@row(FIRST, "not a safetensors file")
def offsets_outside_the_file(given: Input) -> None:
    edit_entry(given, data_offsets=[10**9, 10**9 + 1024])


@row(FIRST, "not a safetensors file")
def offsets_backwards(given: Input) -> None:
    edit_entry(given, data_offsets=[1024, 0])


@row(FIRST, "not a safetensors file")
def tensors_that_overlap(given: Input) -> None:
    entries, data = header(given.folder / FIRST)
    names = [name for name in entries if name != "__metadata__"]
    for name in names:
        entries[name] = entries[names[0]]
    write(given.folder / FIRST, json.dumps(entries).encode(), data)


@row(FIRST, "not a safetensors file")
def shape_that_is_not_the_size(given: Input) -> None:
    edit_entry(given, shape=[VOCABULARY + 1, 8])


@row(FIRST, "not a safetensors file")
def negative_shape(given: Input) -> None:
    edit_entry(given, shape=[-VOCABULARY, -8])


@row(FIRST, "not a safetensors file")
def unknown_dtype(given: Input) -> None:
    edit_entry(given, dtype="F3")


@row(FIRST, "not in", "incomplete")
def missing_shard(given: Input) -> None:
    (given.folder / FIRST).unlink()


@row(FIRST, "not in", "incomplete")
def folder_for_a_shard(given: Input) -> None:
    (given.folder / FIRST).unlink()
    (given.folder / FIRST).mkdir()


@row("model.norm.weight", FIRST, SECOND, "both")
def tensor_in_two_shards(given: Input) -> None:
    given.tensors(FIRST, model__norm__weight=torch.ones(8))
    given.tensors(SECOND, model__norm__weight=torch.ones(8))


# Index


def edit_map(given: Input, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((given.folder / INDEX).read_text())
    change(content["weight_map"])
    (given.folder / INDEX).write_text(json.dumps(content))


@row(INDEX, "model.norm.weight", FIRST, SECOND, "do not belong together")
def index_with_the_wrong_shard(given: Input) -> None:
    edit_map(given, lambda m: m.update({"model.norm.weight": FIRST if m["model.norm.weight"] == SECOND else SECOND}))


@row(INDEX, "model.nothing.weight", "no shard", "do not belong together")
def index_with_a_tensor_that_is_not_there(given: Input) -> None:
    edit_map(given, lambda m: m.update({"model.nothing.weight": FIRST}))


@row("lacks model.norm.weight", "incomplete")
def index_without_a_tensor(given: Input) -> None:
    edit_map(given, lambda m: m.pop("model.norm.weight"))


@row(INDEX, "'../stolen.safetensors'", "inside the folder")
def index_that_points_outside(given: Input) -> None:
    shutil.copy(given.folder / FIRST, given.folder.parent / "stolen.safetensors")
    edit_map(given, lambda m: m.update({"model.norm.weight": "../stolen.safetensors"}))


@row(INDEX, "/stolen.safetensors'", "inside the folder")
def index_with_an_absolute_path(given: Input) -> None:
    shutil.copy(given.folder / FIRST, given.folder.parent / "stolen.safetensors")
    edit_map(given, lambda m: m.update({"model.norm.weight": str(given.folder.parent / "stolen.safetensors")}))


@row(INDEX, "'..'", "inside the folder")
def index_that_names_the_parent(given: Input) -> None:
    edit_map(given, lambda m: m.update({"model.norm.weight": ".."}))


@row(INDEX, "pytorch_model.bin", ".safetensors")
def index_of_pickles(given: Input) -> None:
    edit_map(given, lambda m: m.update(dict.fromkeys(m, "pytorch_model.bin")))


@row(INDEX, "not in", "incomplete")
def index_with_a_null_in_a_name(given: Input) -> None:
    edit_map(given, lambda m: m.update({"model.norm.weight": "a\0b.safetensors"}))


@row(INDEX, "weight_map")
def index_without_a_map(given: Input) -> None:
    (given.folder / INDEX).write_text("{}")


@row(INDEX, "weight_map")
def index_that_maps_to_numbers(given: Input) -> None:
    edit_map(given, lambda m: m.update({"model.norm.weight": 7}))


@row(INDEX, "not readable JSON")
def index_that_is_no_json(given: Input) -> None:
    (given.folder / INDEX).write_bytes(b'{"weight_map": \xff')


@row("has no model.safetensors", INDEX, "expected")
def no_index(given: Input) -> None:
    (given.folder / INDEX).unlink()


# Values


def poisoned(given: Input, name: str, value: float) -> None:
    shard = json.loads((given.folder / INDEX).read_text())["weight_map"][name]
    tensor = load_file(given.folder / shard)[name]
    tensor.view(-1)[3] = value
    given.tensors(shard, **{name.replace(".", "__"): tensor})


@row("model.layers.1.mlp.down_proj.weight", SECOND, "NaN or Inf", "expected finite", "export it again", late=True)
def nan_in_a_weight(given: Input) -> None:
    poisoned(given, "model.layers.1.mlp.down_proj.weight", math.nan)


@row("model.layers.1.mlp.down_proj.weight", "NaN or Inf", "expected finite", "export it again")
def nan_in_a_weight_without_data(given: Input) -> None:
    poisoned(given, "model.layers.1.mlp.down_proj.weight", math.nan)
    given.calibrate(source=given.folder / "text.txt")
    (given.folder / "text.txt").write_text(
        text()
    )  # the windows held out pass the whole model before anything is pruned


@row("model.layers.0.input_layernorm.weight", "NaN or Inf", "expected finite")
def infinity_in_a_norm(given: Input) -> None:
    poisoned(given, "model.layers.0.input_layernorm.weight", -math.inf)


@row("model.embed_tokens.weight", FIRST, "NaN or Inf", "expected finite")
def nan_in_the_embedding(given: Input) -> None:
    poisoned(given, "model.embed_tokens.weight", math.nan)


@row("model.layers.0", "q_proj", "NaN or Inf", "calibration", "expected finite", "--dtype float32")
def infinity_in_activations(given: Input) -> None:
    """Every weight is finite, their products are not."""
    poisoned(given, "model.layers.0.input_layernorm.weight", 3e38)


@row("model.layers.1", "NaN or Inf", "calibration", "expected finite", "--dtype float32", late=True)
def infinity_in_later_activations(given: Input) -> None:
    poisoned(given, "model.layers.1.input_layernorm.weight", 3e38)


@row("NaN or Inf", "probe", late=True)
def infinity_in_the_output_without_data(given: Input) -> None:
    poisoned(given, "model.norm.weight", 3e38)
    given.data, given.recipe = None, lambda: method("magnitude", sparsity=0.5)


# Quantized, adapters, code, pickles


@row("model.norm.weight", "F8_E4M3", "quantized", "dequantize")
def fp8_tensors(given: Input) -> None:
    given.tensors(FIRST, model__norm__weight=torch.ones(8).to(torch.float8_e4m3fn))
    shard = load_file(given.folder / SECOND)
    shard.pop("model.norm.weight", None)
    save_file(shard, given.folder / SECOND)
    edit_map(given, lambda m: m.update({"model.norm.weight": FIRST}))


@row("quantized", "fp8", "dequantize")
def fp8_config(given: Input) -> None:
    given.settings("config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})


@row("quantized", "gptq", "dequantize")
def gptq(given: Input) -> None:
    given.settings("config.json", quantization_config={"quant_method": "gptq", "bits": 4})


@row("quantized", "awq", "dequantize")
def awq(given: Input) -> None:
    given.settings("config.json", quantization_config={"quant_method": "awq", "bits": 4})


@row("quantized", "bitsandbytes", "dequantize")
def bitsandbytes(given: Input) -> None:
    given.settings("config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


@row("quantized", "dequantize")
def bitsandbytes_of_old(given: Input) -> None:
    given.settings("config.json", quantization_config={"load_in_8bit": True})


@row("quantized", "dequantize")
def compressed_tensors(given: Input) -> None:
    given.settings("config.json", compression_config={"quant_method": "compressed-tensors"})


@row("q_proj.qweight", "quantized", "dequantize")
def gptq_that_the_config_does_not_tell(given: Input) -> None:
    given.single()
    given.tensors("model.safetensors", model__layers__0__self_attn__q_proj__qweight=torch.ones(1, 8).int())


@row("adapter", "merge_and_unload")
def adapter(given: Input) -> None:
    for path in given.folder.iterdir():
        path.unlink()
    given.settings("adapter_config.json", peft_type="LORA")
    save_file({"lora_A.weight": torch.ones(2, 2)}, given.folder / "adapter_model.safetensors")


@row("adapter", "merge_and_unload")
def adapter_with_its_model_s_config(given: Input) -> None:
    for name in (FIRST, SECOND, INDEX):
        (given.folder / name).unlink()
    given.settings("adapter_config.json", peft_type="LORA")


def plant(given: Input) -> None:
    (given.folder / "modeling_own.py").write_text("import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n")
    auto = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    given.settings("config.json", auto_map=auto)


@row("OwnModel", "code of its own", "not run", "--build")
def code_of_its_own(given: Input) -> None:
    plant(given)
    given.settings("config.json", architectures=["OwnModel"], model_type="own")


@row("LlamaForCausalLM", "code of its own", "not run", "--build")
def code_of_its_own_under_a_known_name(given: Input) -> None:
    plant(given)
    given.settings("config.json", model_type="own")


@row("pytorch_model.bin", "pickle", "can run code", ".safetensors", "save_pretrained")
def pickles(given: Input) -> None:
    for name in (FIRST, SECOND, INDEX):
        (given.folder / name).unlink()
    torch.save({"weight": torch.ones(2)}, given.folder / "pytorch_model.bin")


@row("model.safetensors", "not a safetensors file")
def pickle_under_another_name(given: Input) -> None:
    given.single()
    (given.folder / "model.safetensors").write_bytes(pickle.dumps({"weight": [1.0] * 100}))


@row("GGUF", "safetensors", "gguf_file")
def gguf(given: Input) -> None:
    for name in (FIRST, SECOND, INDEX):
        (given.folder / name).unlink()
    (given.folder / "model.gguf").write_bytes(b"GGUF")


# Config


@row("has no config.json", "expected")
def no_config(given: Input) -> None:
    (given.folder / "config.json").unlink()


@row("config.json", "not readable JSON")
def config_that_is_no_json(given: Input) -> None:
    (given.folder / "config.json").write_text("{")


@row("config.json", "JSON object")
def config_that_is_a_list(given: Input) -> None:
    (given.folder / "config.json").write_text("[]")


@row("LlamaForCausalLN", "config.json", "architectures")
def unknown_architecture(given: Input) -> None:
    given.settings("config.json", architectures=["LlamaForCausalLN"])


@row("config.json", "architectures")
def no_architecture(given: Input) -> None:
    given.settings("config.json", architectures=None)


@row("config.json", "architecture", "7")
def architecture_that_is_a_number(given: Input) -> None:
    given.settings("config.json", architectures=[7])


@row("config.json", "architecture", "'pipeline'")
def architecture_that_is_no_model(given: Input) -> None:
    given.settings("config.json", architectures=["pipeline"])


@row("shape", "[8, 16]", "[8, 24]", "do not belong together")
def config_of_another_size(given: Input) -> None:
    given.settings("config.json", intermediate_size=24)


@row("lacks model.layers.2", "LlamaForCausalLM", "incomplete")
def config_with_more_layers(given: Input) -> None:
    given.settings("config.json", num_hidden_layers=3)


@row("cannot build", "config.json")
def config_that_makes_no_sense(given: Input) -> None:
    given.settings("config.json", hidden_size="large")


# Calibration


@row("text.txt", "empty", "give a file with text")
def empty_text(given: Input) -> None:
    given.calibrate(source=given.folder.parent / "text.txt")
    (given.folder.parent / "text.txt").write_text(" \n")


@row("text.txt", "20 tokens", "2 whole windows of 8", "10 are needed", "--samples 2")
def short_text(given: Input) -> None:
    given.calibrate(source=given.folder.parent / "text.txt", samples=10)
    (given.folder.parent / "text.txt").write_text(text(20))


@row("text.txt", "not UTF-8", "byte 4", "0xff", "Save it as UTF-8")
def text_that_cannot_be_decoded(given: Input) -> None:
    given.calibrate(source=given.folder.parent / "text.txt")
    (given.folder.parent / "text.txt").write_bytes(b"root\xff\xfe" * 100)


@row("text.txt", "does not exist")
def no_text(given: Input) -> None:
    given.calibrate(source=given.folder.parent / "text.txt")


@row("text.jsonl", "line 2", "not valid JSON")
def broken_json_lines(given: Input) -> None:
    given.calibrate(source=given.folder.parent / "text.jsonl")
    (given.folder.parent / "text.jsonl").write_text('{"text": "root"}\n{"text": \n')


@row("text.bin", "pickle", "can run code")
def pickled_calibration(given: Input) -> None:
    given.calibrate(source=given.folder.parent / "text.bin")
    (given.folder.parent / "text.bin").write_bytes(pickle.dumps("root"))


@row("no tokenizer", "pre-tokenized", ".safetensors")
def no_tokenizer(given: Input) -> None:
    given.calibrate()
    for path in given.folder.glob("tokenizer*"):
        path.unlink()


@row("tokenizer does not load")
def broken_tokenizer(given: Input) -> None:
    given.calibrate()
    (given.folder / "tokenizer.json").write_text("{")


@row("token id 99", "32 ids", "tokenizer")
def tokens_outside_the_vocabulary(given: Input) -> None:
    given.calibrate(source=given.folder.parent / "ids.safetensors")
    save_file({"input_ids": torch.full((2, 8), 99)}, given.folder.parent / "ids.safetensors")


@row("token id 99", "32 ids", "tokenizer")
def batches_outside_the_vocabulary(given: Input) -> None:
    given.data = [{"input_ids": torch.full((1, 8), 99)}]


@row("no batches", "at least one")
def no_batches(given: Input) -> None:
    given.data = iter(())


@row("a single str", "iterable of batches")
def text_for_batches(given: Input) -> None:
    given.data = "root stem leaf"


@row("list under 'input_ids'", "expected tensors")
def lists_for_tensors(given: Input) -> None:
    given.data = [{"input_ids": [1, 2, 3]}]


@row("LlamaForCausalLM", "token_ids [1, 8]", "one tensor for each argument", "input_ids")
def an_argument_that_the_model_does_not_have(given: Input) -> None:
    given.data = [{"token_ids": torch.ones(1, 8).long()}]


# Recipe


@row("sparsity is 1.2", "less than 1")
def sparsity_over_one(given: Input) -> None:
    given.recipe = lambda: method("wanda", sparsity=1.2)


@row("sparsity is 1.2", "less than 1")
def sparsity_over_one_in_python(given: Input) -> None:
    given.recipe = lambda: Recipe(sparsity=1.2)


@row("sparsity is nan", "finite")
def sparsity_nan(given: Input) -> None:
    given.recipe = lambda: method("wanda", sparsity=math.nan)


@row("recipe.yaml", "'sparsty'", "did you mean 'sparsity'?")
def unknown_key(given: Input) -> None:
    path = given.folder.parent / "recipe.yaml"
    path.write_text("criterion: wanda\nsparsty: 0.5\n")
    given.recipe = lambda: validate(Recipe, read_yaml(path), "recipe.yaml")


@row("'calibration.sample'", "did you mean 'samples'?")
def unknown_key_further_in(given: Input) -> None:
    given.recipe = lambda: method("wanda", sparsity=0.5, calibration={"sample": 3})


@row("recipe.yaml", "not valid YAML")
def recipe_that_is_no_yaml(given: Input) -> None:
    path = given.folder.parent / "recipe.yaml"
    path.write_text("criterion: [wanda\n")
    given.recipe = lambda: validate(Recipe, read_yaml(path))


@row("unknown criterion 'wonda'", "did you mean 'wanda'?")
def unknown_criterion(given: Input) -> None:
    given.recipe = lambda: Recipe(criterion="wonda", sparsity=0.5)


@row("model.layers.0.self_attn.q_proj", "[8, 8]", "3:5", "multiple of 5", "--protect", "2:4")
def pattern_that_does_not_divide(given: Input) -> None:
    given.recipe = lambda: method("wanda", granularity="3:5")


@row("'*.gate_prj'", "matches no layer", "model.layers.0.")
def glob_without_a_match(given: Input) -> None:
    given.recipe = lambda: method("wanda", sparsity=0.5, protect=("*.gate_prj",))


@row("nothing to prune", "protected by the recipe")
def everything_protected(given: Input) -> None:
    given.recipe = lambda: method("wanda", sparsity=0.5, protect=("*",))


# Output


@row("exists already", "another name, or delete it")
def output_that_exists(given: Input) -> None:
    given.out = given.folder.parent


@row("exists already", "another name, or delete it")
def output_that_is_a_file(given: Input) -> None:
    given.out = given.folder.parent / "result"
    given.out.write_text("years of work")


@row("exists already", "another name, or delete it")
def output_that_is_a_broken_link(given: Input) -> None:
    given.out = given.folder.parent / "result"
    given.out.symlink_to("nowhere")


@row("the input itself", "never changed", "another folder")
def output_that_is_the_input(given: Input) -> None:
    given.out = given.folder / ".." / given.folder.name


@row("inside the input", "another place")
def output_inside_the_input(given: Input) -> None:
    given.out = given.folder / "pruned" / "twice"


@row("the input itself", "never changed", "another folder")
def output_by_way_of_the_input(given: Input) -> None:
    given.folder = given.folder.rename(given.folder.parent / "result.partial")
    given.out = given.folder.parent / "result"


@row("around the input", "another place")
def input_inside_the_unfinished_output(given: Input) -> None:
    (given.folder.parent / "result.partial").mkdir()
    given.folder = given.folder.rename(given.folder.parent / "result.partial" / "llama")
    given.out = given.folder.parent.parent / "result"


@row("names no new folder")
def output_without_a_name(given: Input) -> None:
    given.out = Path(".")


@row("names no new folder")
def output_that_is_a_parent(given: Input) -> None:
    given.out = given.out / "new" / ".."


@row("not a folder")
def output_in_a_file(given: Input) -> None:
    given.out = given.folder.parent / "file" / "out"
    given.out.parent.write_text("")


@row("cannot write to", "out.partial")
def output_below_a_file(given: Input) -> None:
    given.out = given.folder.parent / "file" / "deeper" / "out"
    given.out.parent.parent.write_text("")


@row("cannot write to", "too long")
def output_with_too_long_a_name(given: Input) -> None:
    given.out = given.out.with_name("o" * 250)


@row("unfinished run", "--resume", "delete")
def output_with_an_unfinished_run(given: Input) -> None:
    staging_folder(given.out).mkdir()


@row("in the way", "out.partial", "another --out")
def output_with_a_file_in_the_way(given: Input) -> None:
    staging_folder(given.out).write_text("years of work")


# Input


@row("does not exist", "expected a local model folder", "org/name")
def no_input(given: Input) -> None:
    given.folder = given.folder.parent / "nothing"


@row("not a folder", "expected a local Hugging Face model folder")
def input_that_is_a_file(given: Input) -> None:
    given.folder = given.folder / "config.json"


def name(row: Row) -> str:
    return row.broken.__name__


@pytest.mark.parametrize("row", TABLE, ids=name)
def test_one_clear_error(row: Row, given: Input, llama: Path, tmp_path: Path) -> None:
    row.broken(given)
    before, files = fingerprint(tmp_path / "in"), sorted(tmp_path.rglob("*"))
    with pytest.raises(SecateurError) as error:
        prune(given.folder, given.recipe(), given.data, given.out)
    for word in row.words:
        assert word in str(error.value), f"{word!r} is missing from: {error.value}"
    assert "Traceback" not in str(error.value)
    assert fingerprint(tmp_path / "in") == before
    if sorted(tmp_path.rglob("*")) == files:
        return
    assert row.late, f"left behind: {set(tmp_path.rglob('*')) - set(files)}"
    partial = staging_folder(given.out)
    assert list(given.out.parent.iterdir()) == [partial]
    assert not any(path.name.endswith((".json", ".safetensors")) for path in partial.rglob("*"))
    shutil.rmtree(partial)
    prune(llama, method("wanda", sparsity=0.5), batches(), given.out)
    assert "config.json" in contents(given.out)


COMMANDS: list[tuple[Callable[[Input], None], list[str]]] = [
    (truncated_shard, []),
    (header_larger_than_the_file, []),
    (index_that_points_outside, []),
    (nan_in_the_embedding, []),
    (gptq, []),
    (adapter, []),
    (code_of_its_own, []),
    (pickles, []),
    (output_that_is_the_input, []),
    (output_inside_the_input, []),
    (output_that_is_a_file, []),
    (output_with_an_unfinished_run, []),
    (no_input, []),
    (no_tokenizer, ["--method", "wanda"]),
    (short_text, ["--method", "wanda", "--calibration", "text.txt", "--samples", "10", "--length", "8"]),
    (
        text_that_cannot_be_decoded,
        ["--method", "wanda", "--calibration", "text.txt", "--samples", "2", "--length", "8"],
    ),
]


@pytest.mark.parametrize(("broken", "options"), COMMANDS, ids=[broken.__name__ for broken, _ in COMMANDS])
@pytest.mark.parametrize("as_json", [False, True], ids=["", "json"])
def test_on_the_command_line(
    broken: Callable[[Input], None],
    options: list[str],
    as_json: bool,
    given: Input,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Exit code 2, the message on stderr without a traceback, and with --json as the only thing on stdout."""
    broken(given)
    words = next(row.words for row in TABLE if row.broken is broken)
    before, files = fingerprint(tmp_path / "in"), sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path / "in")
    method = [] if "--method" in options else ["--method", "magnitude"]
    done = CliRunner().invoke(
        app, ["prune", str(given.folder), "--out", str(given.out), *method, *options, *(["--json"] if as_json else [])]
    )
    assert done.exit_code == 2, done.output
    assert all(word in done.stderr for word in words), done.stderr
    assert done.stderr.startswith("secateur: ") or "\nsecateur: " in done.stderr
    assert "Traceback" not in done.output
    if as_json:
        assert set(json.loads(done.stdout)) == {"error"}
    assert fingerprint(tmp_path / "in") == before
    assert sorted(tmp_path.rglob("*")) == files


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sparsity", "1.2"], ["sparsity", "1.2"]),
        (["--sparsity", "nan"], ["sparsity", "nan"]),
        (["--sparsity", "half"], ["--sparsity", "valid number"]),
        (["--pattern", "3:5", "--method", "wanda"], ["q_proj", "[8, 8]", "multiple of 5", "--protect"]),
        (["--pattern", "5:3"], ["5:3"]),
        (["--method", "wonda"], ["wonda", "did you mean 'wanda'?"]),
        (["--protect", "*.gate_prj", "--method", "magnitude"], ["*.gate_prj", "matches no layer"]),
        (["--recipe", "recipe.yaml"], ["recipe.yaml", "'sparsty'", "did you mean 'sparsity'?"]),
        (["--recipe", "nothing.yaml"], ["nothing.yaml"]),
        (["--calibration", "nothing.txt", "--method", "wanda"], ["nothing.txt", "does not exist"]),
        (["--device", "toaster"], ["toaster"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_wrong_options(
    options: list[str], words: list[str], given: Input, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / "in")
    Path("recipe.yaml").write_text("criterion: wanda\nsparsty: 0.5\n")
    before = fingerprint(tmp_path)
    done = CliRunner().invoke(app, ["prune", str(given.folder), "--out", str(given.out), *options])
    assert done.exit_code == 2, done.output
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.output
    assert fingerprint(tmp_path) == before


def test_code_in_the_folder_is_never_run(given: Input, tmp_path: Path) -> None:
    """Not even for a model that transformers has a class for: then its own class is used."""
    plant(given)
    given.settings("config.json", auto_map={"AutoModelForCausalLM": "modeling_own.OwnModel"})
    prune(given.folder, given.recipe(), given.data, given.out)
    assert not any(path.name in ("ran", "modeling_own.py") for path in given.out.iterdir())
    assert not (given.folder / "ran").exists()
    assert "modeling_own" not in sys.modules


def test_a_result_that_does_not_answer_as_in_memory(given: Input, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reload that differs is no result: it gets no name."""
    monkeypatch.setattr(pipeline, "difference", lambda *_: math.nan)
    with pytest.raises(SecateurError, match=r"reloaded result.*differs.*not given its name"):
        prune(llama, given.recipe(), given.data, given.out)
    assert not given.out.exists()
    assert not list(staging_folder(given.out).rglob("*.json"))
    monkeypatch.undo()
    prune(llama, given.recipe(), given.data, given.out, resume=True)

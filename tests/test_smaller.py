"""Structure removed from a folder: in memory and on the shards, from the command line, whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from conftest import fingerprint, save_llama, save_tokenizer, text
from secateur import options
from secateur.cli import app
from secateur.data import windows
from secateur.errors import SecateurError
from secateur.smaller import Smaller, remove
from secateur.structure import load, plan, trace

MAGNITUDE = {"criterion": "magnitude", "multiple": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = save_llama(tmp_path_factory.mktemp("models") / "llama", layers=4)
    save_tokenizer(path)
    return path


def state(path: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def run(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_in_memory_and_on_the_shards_are_the_same(folder, tmp_path):
    wanted = Smaller(remove={"ffn": 0.5}, **MAGNITUDE)
    one = remove(folder, wanted, tmp_path / "memory", in_memory=True)
    other = remove(folder, wanted, tmp_path / "shards", in_memory=False)
    assert one.loads_with == other.loads_with == "stock"
    a, b = state(tmp_path / "memory"), state(tmp_path / "shards")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert a["model.layers.0.mlp.gate_proj.weight"].shape == (8, 8)
    assert one.after["params"] == other.after["params"] == one.plans[0].after["params"]


def test_shapes_by_layer_on_the_shards_load_with_the_plan(folder, tmp_path):
    wanted = Smaller(remove={"model.layers.1.mlp*": 0.5}, **MAGNITUDE)
    found = remove(folder, wanted, tmp_path / "out", in_memory=False)
    assert found.loads_with == "secateur.load"
    ids = torch.arange(6)[None]
    again = load(tmp_path / "out")
    remove(folder, wanted, tmp_path / "memory", in_memory=True)
    torch.testing.assert_close(again(ids).logits, load(tmp_path / "memory")(ids).logits)


@pytest.mark.parametrize("arguments", [["ffn=50%", "layers=2"], ["ffn=50%"], ["layers=1"]])
def test_the_command_line(folder, tmp_path, arguments):
    (tmp_path / "text.txt").write_text(text(600))
    before = fingerprint(folder)
    out = tmp_path / "out"
    done = run(
        "prune", folder, "--remove", *arguments, "--calibration", tmp_path / "text.txt", "--samples", 4, "--length", 16,
        "--multiple", 1, "--out", out, "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert fingerprint(folder) == before
    assert not (tmp_path / "out.partial").exists()
    details = json.loads(done.stdout)
    assert details["loads with"] == "stock"
    assert details["after"]["params"] < details["before"]["params"]
    assert details["after"]["bytes"] < details["before"]["bytes"]
    assert {"milliseconds", "perplexity"} <= details["after"].keys()
    model = AutoModelForCausalLM.from_pretrained(out)
    assert sum(p.numel() for p in model.parameters()) == details["after"]["params"]
    assert {"tokenizer.json", "secateur.json", "config.json"} <= {path.name for path in out.iterdir()}


def test_a_target_bounds_what_remains(folder, tmp_path):
    words = ["prune", folder, "--target", "params=-20%", "--criterion", "magnitude", "--multiple", 1]
    done = run(*words, "--out", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    details = json.loads(done.stdout)
    assert details["after"]["params"] <= 0.8 * details["before"]["params"]


def test_dry_run_writes_nothing(folder, tmp_path):
    done = run(
        "prune", folder, "--remove", "ffn=50%", "--criterion", "magnitude", "--multiple", 1, "--dry-run", "--json"
    )
    assert done.exit_code == 0, done.output
    assert "ffn" in json.loads(done.stdout)["plans"][0]
    assert not list(tmp_path.iterdir())


BAD = {
    "no value": (["--remove", "ffn"], "expected ffn=30%"),
    "not a number": (["--remove", "ffn=much"], "is no share"),
    "unknown kind": (["--remove", "headz=30%"], "did you mean 'heads'"),
    "unknown cost": (["--target", "flops=-50%"], "unknown budget 'flops'"),
    "both": (["--remove", "ffn=30%", "--target", "macs=-50%"], "either what to remove or what may remain"),
    "weights and structure": (["--remove", "ffn=30%", "--sparsity", "0.5"], "--sparsity is for single weights"),
    "unknown criterion": (["--remove", "ffn=30%", "--criterion", "obs"], "unknown criterion 'obs'"),
    "unknown allocation": (["--target", "params=-30%", "--allocation", "owl"], "unknown allocation 'owl'"),
    "a target's options": (["--remove", "ffn=30%", "--include", "ffn"], "include is for a target"),
    "layers' option": (["--remove", "ffn=30%", "--contiguous"], "remove layers"),
    "all layers": (["--remove", "layers=4"], "some have to stay"),
    "out of reach": (["--target", "params=-99%"], "nearest reachable"),
    "too little": (["--remove", "ffn=0.1%"], "nothing would go"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_one_message_and_nothing_is_written(name, folder, tmp_path):
    arguments, words = BAD[name]
    criterion = [] if "--criterion" in arguments else ["--criterion", "magnitude"]
    done = run("prune", folder, *arguments, *criterion, "--out", tmp_path / "out")
    assert done.exit_code == 2, done.output
    assert words in done.stderr.replace("\n", " ").replace("  ", " ")
    assert "Traceback" not in done.output
    assert not list(tmp_path.iterdir())


def test_criteria_that_run_data_need_memory(folder, tmp_path):
    for wanted in (Smaller(remove={"ffn": 0.5}, criterion="taylor"), Smaller(remove={"layers": 1})):
        with pytest.raises(SecateurError, match="whole model in memory"):
            remove(folder, wanted, tmp_path / "out", in_memory=False)


def test_an_unfinished_run_is_not_overwritten(folder, tmp_path):
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(SecateurError, match="unfinished run"):
        remove(folder, Smaller(remove={"ffn": 0.5}, **MAGNITUDE), tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "spread"),
    [
        (["--remove", "a=1", "b=2", "--out", "x"], ["--remove", "a=1", "--remove", "b=2", "--out", "x"]),
        (["m", "--remove", "a=1"], ["m", "--remove", "a=1"]),
        (["--remove", "a=1", "folder"], ["--remove", "a=1", "folder"]),
        (["--target", "macs=-50%", "--remove"], ["--target", "macs=-50%", "--remove"]),
        (["--remove", "--out", "x"], ["--remove", "--out", "x"]),
        (["--text", "a=1"], ["--text", "a=1"]),
    ],
)
def test_an_option_takes_values_until_the_next_one(words, spread):
    assert options.spread(words) == spread


@pytest.mark.parametrize(
    ("words", "option", "found"),
    [
        (["ffn=30%", "layers=2"], "--remove", {"ffn": 0.3, "layers": 2}),
        (["macs=-50%"], "--target", {"macs": 0.5}),
        (["bytes=200M", "params=50%"], "--target", {"bytes": 200e6, "params": 0.5}),
        (None, "--remove", None),
    ],
)
def test_shares(words, option, found):
    assert options.shares(words, option) == found


def test_attention_and_mlps_alone(folder, tmp_path):
    out = tmp_path / "out"
    found = run(
        "prune", folder, "--remove", "attention=2", "mlp=25%", "layers=1", "--out", out, "--criterion", "magnitude"
    )
    assert found.exit_code == 0, found.output
    assert "nothing reads it" in found.output
    assert "secateur.load" in found.output
    model = load(out)
    assert len(model.model.layers) == 3
    ids = torch.arange(6)[None]
    write = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids, **write), model.generate(ids, use_cache=False, **write))


@pytest.mark.parametrize("ask", ["attention=9", "layers=9"])
def test_more_of_depth_than_there_is(folder, tmp_path, ask):
    found = run("prune", folder, "--remove", ask, "--out", tmp_path / "out")
    assert found.exit_code == 2
    assert "can go" in found.stderr.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


# A module of the user's own, and recipes


def small_net() -> torch.nn.Module:
    """What `--build test_smaller:small_net` makes."""
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16)]
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


@pytest.fixture
def built(tmp_path, monkeypatch) -> Path:
    """A folder with weights, and inputs with labels."""
    torch.manual_seed(0)
    save_file(small_net().state_dict(), tmp_path / "net.safetensors")
    pixels, labels = torch.randn(12, 3, 9, 9), torch.randint(10, (12,))
    save_file({"input": pixels, "labels": labels}, tmp_path / "inputs.safetensors")
    monkeypatch.chdir(Path(__file__).parent)
    return tmp_path


def from_build(folder: Path, *more: object):
    given = ["--build", "test_smaller:small_net", "--weights", folder / "net.safetensors", "--samples", 12]
    given += ["--calibration", folder / "inputs.safetensors"]
    return run("prune", *given, "--out", folder / "out", *more)


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "flap", "norm-scale"])
def test_a_module_of_ones_own(built, criterion):
    found = from_build(built, "--target", "macs=-50%", "--criterion", criterion, "--multiple", 1)
    assert found.exit_code == 0, found.stderr
    assert "small_net())" in found.output
    model = load(built / "out", small_net())
    assert model[0].out_channels < 8
    masked = small_net()  # by hand: the whole weights where they stay, zeros elsewhere
    weights = load_file(built / "net.safetensors")
    plan = json.loads((built / "out" / "secateur.json").read_text())["plans"][0]
    for name, change in plan["tensors"].items():
        for dim, ranges in change["kept"].items():
            stays = torch.zeros(weights[name].shape[int(dim)])
            for start, stop in ranges:
                stays[start:stop] = 1
            shape = [-1 if place == int(dim) else 1 for place in range(weights[name].ndim)]
            if "running_var" not in name:
                weights[name] = weights[name] * stays.view(shape)
    masked.load_state_dict(weights)
    pixels = load_file(built / "inputs.safetensors")["input"]
    torch.testing.assert_close(model(pixels), masked.eval()(pixels))


def test_taylor_of_a_classifier_is_that_of_its_cross_entropy(built):
    from secateur.smaller import remove_built

    wanted = Smaller(
        target={"macs": 0.5},
        criterion="taylor",
        multiple=1,
        calibration={"source": built / "inputs.safetensors", "samples": 12},
    )
    found = remove_built("test_smaller:small_net", built / "net.safetensors", wanted, built / "out")
    model = small_net().eval()
    model.load_state_dict(load_file(built / "net.safetensors"))
    data = load_file(built / "inputs.safetensors")
    batches = [{"input": x[None], "labels": y[None]} for x, y in zip(data["input"], data["labels"], strict=True)]

    def loss(net, batch):
        return nn.functional.cross_entropy(net(batch["input"]), batch["labels"])

    couplings = trace(model, data["input"][:2])
    want = plan(couplings, target={"macs": 0.5}, criterion="taylor", batches=batches, loss=loss, multiple=1)
    assert want.tensors == found.plans[0].tensors


def test_a_module_of_ones_own_needs_inputs_and_a_loss(built):
    given = ["--build", "test_smaller:small_net", "--weights", built / "net.safetensors", "--out", built / "out"]
    found = run("prune", *given, "--target", "macs=-50%")
    assert found.exit_code == 2
    assert "a tensor file" in found.stderr or "one tensor for each argument" in found.stderr.replace("\n", " ")
    data = load_file(built / "inputs.safetensors")
    save_file({"input": data["input"]}, built / "inputs.safetensors")
    found = from_build(built, "--target", "macs=-50%", "--criterion", "taylor")
    assert found.exit_code == 2
    assert "add a tensor `labels`" in found.stderr
    assert not (built / "out").exists()


def test_a_recipe_says_what_to_remove(folder, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {folder}\nout: {tmp_path / 'one'}\nremove: {{ffn: 50%, layers: 1}}\nmultiple: 1\ncriterion: magnitude\n"
    )
    found = run("run", recipe)
    assert found.exit_code == 0, found.stderr
    found = run("prune", folder, "--recipe", recipe, "--out", tmp_path / "two", "--remove", "layers=2")
    assert found.exit_code == 0, found.stderr
    assert len(load(tmp_path / "one").model.layers) == 3
    assert load(tmp_path / "one").config.intermediate_size == 8
    assert len(load(tmp_path / "two").model.layers) == 2
    assert load(tmp_path / "two").config.intermediate_size == 16


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("remove: {ffn: a lot}", "no share"),
        ("remove: {ffn: 30%}\ntarget: {macs: -50%}", "either what to remove or what may remain"),
        ("remove: {ffn: 30%}\nmultipel: 8", "did you mean 'multiple'"),
        ("target: {macs: -50%}\ncriterion: wand", "unknown criterion"),
    ],
)
def test_recipes_that_make_no_sense(folder, tmp_path, line, says):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {folder}\nout: {tmp_path / 'out'}\n{line}\n")
    found = run("run", recipe)
    assert found.exit_code == 2
    assert says in found.stderr
    assert "recipe.yaml" in found.stderr
    assert not (tmp_path / "out").exists()


def test_norms_over_fewer_elements_are_rescaled_where_there_is_data(folder, tmp_path):
    wanted = Smaller(
        remove={"hidden": 0.5}, criterion="activation", multiple=1, calibration={"samples": 2, "length": 16}
    )
    found = remove(folder, wanted, tmp_path / "out")
    before, after = state(folder), state(tmp_path / "out")
    ratios = []
    for name, change in found.plans[0].tensors.items():
        if "norm" in name:
            kept = torch.cat([torch.arange(start, stop) for start, stop in change.kept[0]])
            ratio = after[name] / before[name][kept]
            torch.testing.assert_close(ratio, ratio[0].expand_as(ratio))  # one factor for each norm
            ratios.append(float(ratio[0]))
    assert len(set(ratios)) == len(ratios) == 9
    assert all(ratio != 1 for ratio in ratios)


@pytest.mark.parametrize(
    "ask",
    ["layers=100%", "layers=150%", "attention=100%", "ffn=100%", "layers=1.5", "ffn=-5", "ffn=0", "ffn=10% ffn=20%"],
)
def test_shares_that_leave_nothing_or_are_none(folder, tmp_path, ask):
    found = run("prune", folder, "--remove", *ask.split(), "--out", tmp_path / "out")
    assert found.exit_code == 2
    assert any(words in found.stderr for words in ("below 100%", "twice"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ask", ["macs=-100%", "macs=-150%", "macs=0", "params=150%", "flops=-50%"])
def test_targets_that_leave_nothing(folder, tmp_path, ask):
    found = run("prune", folder, "--target", ask, "--out", tmp_path / "out")
    assert found.exit_code == 2
    assert any(words in found.stderr for words in ("would leave nothing", "unknown budget"))
    assert list(tmp_path.iterdir()) == []


def test_a_glob_over_a_layer_does_not_mean_the_width_of_the_model(folder, tmp_path):
    found = remove(folder, Smaller(remove={"model.layers.1.mlp*": 0.5}, **MAGNITUDE), tmp_path / "out")
    assert {removal.kind for removal in found.plans[0].removals if removal.left < removal.size} == {"ffn"}
    assert found.plans[0].promise == "removed == masked"


def test_bytes_are_those_of_the_checkpoint(tmp_path):
    """A checkpoint in bfloat16 that fits a budget already loses nothing; half of it is half of what is on the disk."""
    model = AutoModelForCausalLM.from_pretrained(save_llama(tmp_path / "whole"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    size = sum(path.stat().st_size for path in (tmp_path / "half").glob("*.safetensors"))
    with pytest.raises(SecateurError, match="nothing would go"):
        remove(tmp_path / "half", Smaller(target={"bytes": 1.5 * size}, **MAGNITUDE), tmp_path / "out")
    found = remove(tmp_path / "half", Smaller(target={"bytes": 0.8}, **MAGNITUDE), tmp_path / "out")
    assert found.plans[0].before["bytes"] <= size
    assert found.plans[0].after["bytes"] <= 0.8 * found.plans[0].before["bytes"]


def test_what_loads_with_us_alone_is_not_cut_again(folder, tmp_path):
    remove(folder, Smaller(remove={"model.layers.1.mlp*": 0.5}, **MAGNITUDE), tmp_path / "once")
    found = run("prune", tmp_path / "once", "--remove", "ffn=50%", "--out", tmp_path / "twice")
    assert found.exit_code == 2
    assert "was cut by secateur before" in found.stderr
    found = run(
        "prune", tmp_path / "once", *("--method", "magnitude", "--sparsity", "0.5", "--out", tmp_path / "twice")
    )
    assert found.exit_code == 2
    assert "only secateur.load builds it" in found.stderr
    assert "only secateur.load" in " ".join(run("doctor", tmp_path / "once").stdout.split())
    assert not (tmp_path / "twice").exists()


def test_what_loads_with_us_alone_is_evaluated_and_not_filled_with_noise(folder, tmp_path):
    """An attention that is gone: stock transformers would make a new one."""
    remove(folder, Smaller(remove={"attention": 1}, **MAGNITUDE), tmp_path / "out")
    words = tmp_path / "words.txt"
    words.write_text(text(200))
    found = run("eval", tmp_path / "out", "--text", words, "--samples", 4, "--length", 16, "--json")
    assert found.exit_code == 0, found.stderr
    model = load(tmp_path / "out")
    ids = windows(words.read_text(), AutoTokenizer.from_pretrained(tmp_path / "out"), 16, 4, seed=None)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert json.loads(found.stdout)["pruned"]["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-4)


def test_what_stock_libraries_load_is_cut_again(folder, tmp_path):
    wanted = Smaller(remove={"ffn": 0.5}, **MAGNITUDE)
    remove(folder, wanted, tmp_path / "once")
    found = remove(tmp_path / "once", wanted, tmp_path / "twice")
    assert found.loads_with == "stock"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "twice").config.intermediate_size == 4


@pytest.mark.parametrize(
    ("labels", "says"),
    [(torch.full((12,), 10), "10 classes"), (torch.rand(12), "float32"), (torch.zeros(12, 2).long(), "[1, 2]")],
)
def test_labels_that_are_no_classes(built, labels, says):
    data = load_file(built / "inputs.safetensors")
    save_file({"input": data["input"], "labels": labels}, built / "inputs.safetensors")
    found = from_build(built, "--target", "macs=-50%", "--criterion", "taylor")
    assert found.exit_code == 2
    assert says in found.stderr
    assert not (built / "out").exists()


def test_inputs_in_double_precision(built):
    data = load_file(built / "inputs.safetensors")
    save_file({"input": data["input"].double(), "labels": data["labels"]}, built / "inputs.safetensors")
    found = from_build(built, "--target", "macs=-50%", "--criterion", "taylor", "--multiple", 1)
    assert found.exit_code == 0, found.stderr


def test_structure_is_not_resumed(folder, tmp_path):
    found = run("prune", folder, "--remove", "ffn=50%", "--resume", "--out", tmp_path / "out")
    assert found.exit_code == 2
    assert "without --resume" in found.stderr.replace("\n", " ")


def test_what_is_protected_may_be_a_block_or_a_width(folder, tmp_path):
    ask = ["--remove", "layers=1", "ffn=50%", "--criterion", "magnitude", "--multiple", 1]
    found = run("prune", folder, *ask, "--protect", "model.layers.3", "--protect", "ffn", "--out", tmp_path / "a")
    assert found.exit_code == 2  # then nothing is left of the request
    found = run("prune", folder, *ask, "--protect", "model.layers.3", "--out", tmp_path / "b")
    assert found.exit_code == 0, found.stderr
    found = run("prune", folder, *ask, "--protect", "zzz*", "--out", tmp_path / "c")
    assert found.exit_code == 2
    assert "names no part of this model" in found.stderr


def test_a_dry_run_writes_nothing_and_minds_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pruned").mkdir()
    done = run(
        "prune", folder, "--target", "macs=-30%", "--criterion", "magnitude", "--multiple", 1, "--dry-run", "--json"
    )
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["dry_run"]
    assert found["after"]["macs"] <= 0.7 * found["before"]["macs"]
    assert list((tmp_path / "pruned").iterdir()) == []


def test_a_file_of_tensors_is_used_as_a_whole(built):
    given = ["--build", "test_smaller:small_net", "--weights", built / "net.safetensors", "--out", built / "out"]
    found = run(
        "prune", *given, "--calibration", built / "inputs.safetensors", "--target", "macs=-50%", "--multiple", 1
    )
    assert found.exit_code == 0, found.stderr
    found = run(
        "prune",
        *given[:-1],
        built / "other",
        "--calibration",
        built / "inputs.safetensors",
        "--samples",
        1,
        "--target",
        "macs=-50%",
    )
    assert found.exit_code == 2
    assert "two samples" in found.stderr

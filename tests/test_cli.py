"""The command line: every command and option group, exit codes, what goes to stdout, and that a dry run writes nothing."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file, save_model
from torch import nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

import secateur
from conftest import TINY, Watch, fingerprint, save_llama, save_tokenizer, text
from secateur.cli import app
from secateur.recipe import ABOUT, METHODS

SHORT = ("--samples", "2", "--length", "8")
COMMANDS = ("prune", "run", "recipe", "eval", "doctor", "demo")

Call = Callable[..., Result]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: empty but for a text to calibrate on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "words.txt").write_text(text(400))
    (tmp_path / "words.jsonl").write_text(
        "\n".join(json.dumps({"body": text(200, seed), "id": seed}) for seed in (3, 4))
    )
    return tmp_path


@pytest.fixture
def call() -> Call:
    """call(0, "prune", ...): the exit code that is expected, then the words."""

    def run(code: int, *words: Any) -> Result:
        done = CliRunner().invoke(app, [str(word) for word in words], prog_name="secateur")
        assert done.exit_code == code, f"{done.output}\n{done.exception!r}"
        return done

    return run


@pytest.fixture
def prune(call: Call, llama: Path) -> Call:
    """prune(0, options): the small LLaMA into ./out."""
    return lambda code, *words: call(code, "prune", llama, "--out", "out", "--calibration", "words.txt", *SHORT, *words)


def written(folder: str = "out") -> dict[str, Any]:
    return json.loads(Path(folder, "secateur.json").read_text())


def flat(done: Result) -> str:
    """Everything that was said, without the breaks of tables and panels."""
    return " ".join(done.output.replace("│", " ").split())


# Help


def test_the_help_has_examples_and_exit_codes(call: Call):
    said = call(0, "--help").stdout
    for words in ("secateur prune ./llama --out ./pruned", "--against", "Exit codes", "130", "--resume", "--json"):
        assert words in said
    for command in COMMANDS:
        assert command in said


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example(call: Call, command: str):
    said = call(0, command, "--help").stdout
    assert "Example" in said
    assert f"secateur {command}" in said or "model: ./llama" in said


def test_examples_keep_their_lines(call: Call):
    lines = [line.strip() for line in call(0, "prune", "--help").stdout.splitlines()]
    assert "secateur prune ./llama --out ./pruned" in lines
    assert any("'*.layers.0.*'" in line for line in lines)


def test_version(call: Call):
    assert call(0, "--version").stdout == f"secateur {secateur.__version__}\n"


# Prune


def test_prune(prune: Call, llama: Path, unchanged: Watch):
    unchanged(llama)
    done = prune(0)
    model = AutoModelForCausalLM.from_pretrained("out")
    zeros = (model.model.layers[0].mlp.down_proj.weight == 0).float().mean()
    assert zeros == pytest.approx(0.5, abs=0.01)
    said = flat(done)
    for words in (
        "recipe: admm",
        "update: admm",
        "50.00%",
        "perplexity",
        "peak memory",
        "stock transformers",
        "layers that changed most",
    ):
        assert words in said
    assert "give no speed and no smaller file by themselves" in said
    assert "Loading weights" not in done.output
    assert "pruning: 2/2" in done.stderr


def test_the_small_text_is_named_when_it_is_used(call: Call, llama: Path):
    said = flat(call(0, "prune", llama, "--out", "out", *SHORT, "--method", "wanda"))
    assert "No --calibration: learning from the small text that ships" in said
    assert "ships with secateur" in written()["calibration"]["description"]


def test_magnitude_reads_no_data(call: Call, llama: Path):
    said = flat(call(0, "prune", llama, "--out", "out", "--method", "magnitude", *SHORT))
    assert "No --calibration" not in said
    assert written()["calibration"]["description"] == "none"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--sparsity", "0.25", "--method", "wanda"), {"sparsity": 0.25, "granularity": "per-row", "update": "none"}),
        (("--pattern", "2:4", "--method", "sparsegpt"), {"granularity": "2:4", "sparsity": None, "criterion": "obs"}),
        (("--threshold", "0.1"), {"threshold": {"absolute": 0.1, "sigma": None}, "criterion": "magnitude"}),
        (("--threshold", "1.5s"), {"threshold": {"absolute": None, "sigma": 1.5}, "sparsity": None, "update": "none"}),
        (
            ("--criterion", "ria", "--granularity", "1x4", "--allocation", "erdos-renyi", "--update", "refit"),
            {"criterion": "ria", "granularity": "1x4", "allocation": "erdos-renyi", "update": "refit", "sparsity": 0.5},
        ),
        (("--seed", "7", "--dtype", "float64", "--method", "random"), {"seed": 7, "dtype": "float64"}),
    ],
)
def test_options_make_the_recipe(prune: Call, words: tuple[str, ...], expected: dict[str, Any]):
    prune(0, *words, "--quiet")
    recipe = written()["recipe"]
    assert {key: recipe[key] for key in expected} == expected
    assert recipe["calibration"]["samples"] == 2


def test_protect_and_include(prune: Call):
    prune(0, "-m", "magnitude", "--protect", "*.q_proj", "--protect", "*.0.*", "--include", "model.embed_tokens", "-q")
    details = written()
    names = {layer["name"] for layer in details["layers"]}
    assert "model.embed_tokens" in names
    assert not any(name.endswith("q_proj") or ".0." in name for name in names)
    assert details["protected"]["model.layers.1.self_attn.q_proj"] == "protected by the recipe"


def test_a_field_of_json_lines(call: Call, llama: Path):
    words = ("--calibration", "words.jsonl", "--field", "body", "--method", "wanda", *SHORT)
    call(0, "prune", llama, "--out", "out", *words, "-q")
    assert "words.jsonl (field 'body'" in written()["calibration"]["description"]


def test_json_is_all_there_is_on_stdout(prune: Call):
    details = json.loads(prune(0, "--json").stdout)
    assert details == {"out": "out", **written()}
    assert {"recipe", "sparsity", "measures", "seconds", "peak_memory_bytes", "verified", "layers", "protected"} <= set(
        details
    )
    assert details["measures"]["before"]["perplexity"] > 0


def test_quiet_says_one_line(prune: Call):
    done = prune(0, "--quiet")
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1
    assert "50.0% zeros" in done.stdout


def test_experts_without_tokens_are_noted(call: Call, mixtral: Path):
    words = ("--calibration", "words.txt", "--samples", "1", "--length", "2", "--method", "wanda")
    assert "note: saw no calibration tokens" in flat(call(0, "prune", mixtral, "--out", "out", *words))


# Dry run


@pytest.mark.parametrize("extra", [(), ("--json",), ("--quiet",), ("--pattern", "2:4"), ("--allocation", "owl")])
def test_a_dry_run_writes_nothing(prune: Call, llama: Path, here: Path, unchanged: Watch, extra: tuple[str, ...]):
    unchanged(llama)
    before = fingerprint(here)
    done = prune(0, "--dry-run", *extra)
    assert fingerprint(here) == before
    if "--json" in extra:
        details = json.loads(done.stdout)
        assert details["dry_run"] is True
        assert len(details["layers"]) == 14
        assert details["expected"]["memory"] > 0
        assert details["expected"]["seconds"] > 0
    elif not extra:
        said = flat(done)
        for words in (
            "model.layers.*.mlp.down_proj",
            "embedding",
            "memory expected",
            "time expected",
            "nothing was written",
        ):
            assert words in said


def test_a_dry_run_finds_mistakes(prune: Call):
    assert "matches no layer" in prune(2, "--dry-run", "--protect", "nothing.*").stderr
    assert "whole windows of 8" in prune(2, "--dry-run", "--samples", "1000").stderr


# Recipes


def test_recipe_to_file_to_run(call: Call, prune: Call):
    Path("mine.yaml").write_text(call(0, "recipe", "wanda", "--sparsity", "0.25").stdout)
    prune(0, "--recipe", "mine.yaml", "--protect", "*.k_proj")
    recipe = written()["recipe"]
    assert (recipe["criterion"], recipe["sparsity"], recipe["protect"]) == ("wanda", 0.25, ["*.k_proj"])
    assert recipe["calibration"]["length"] == 8


@pytest.mark.parametrize(
    ("content", "words", "expected"),
    [
        ({"method": "wanda", "granularity": "2:4"}, ("--sparsity", "0.25"), {"granularity": "layer", "sparsity": 0.25}),
        ({"method": "wanda", "sparsity": 0.3}, ("--pattern", "1:2"), {"granularity": "1:2", "sparsity": None}),
        (
            {"method": "magnitude", "threshold": {"sigma": 1}},
            ("--sparsity", "0.1"),
            {"threshold": None, "sparsity": 0.1},
        ),
        (
            {"method": "magnitude", "protect": ["*.q_proj"]},
            ("--protect", "*.k_proj"),
            {"protect": ["*.q_proj", "*.k_proj"]},
        ),
    ],
)
def test_options_change_a_recipe_file(prune: Call, content: Any, words: tuple[str, ...], expected: dict[str, Any]):
    Path("r.yaml").write_text(yaml.safe_dump(content))
    details = json.loads(prune(0, "--recipe", "r.yaml", "--dry-run", "--json", *words).stdout)
    assert {key: details["recipe"][key] for key in expected} == expected


@pytest.mark.parametrize("method", METHODS)
def test_every_method_prints_as_yaml(call: Call, method: str):
    recipe = yaml.safe_load(call(0, "recipe", method).stdout)
    assert recipe["sparsity"] == 0.5
    assert recipe["criterion"] == METHODS[method]["criterion"]


def test_methods_are_listed_with_their_sources(call: Call):
    assert set(ABOUT) == set(METHODS)
    said = call(0, "recipe", "--list").stdout
    assert all(method in said for method in METHODS)
    assert "Frantar" in said


def test_recipe_of_a_pattern_or_threshold(call: Call):
    assert yaml.safe_load(call(0, "recipe", "wanda", "--pattern", "2:4").stdout)["granularity"] == "2:4"
    assert yaml.safe_load(call(0, "recipe", "magnitude", "--threshold", "2s").stdout)["threshold"] == {"sigma": 2.0}


# Run


def test_run(call: Call, llama: Path):
    content = {"model": str(llama), "out": "out", "method": "wanda", "sparsity": 0.25}
    content |= {"calibration": {"source": "words.txt", "samples": 2, "length": 8}}
    Path("job.yaml").write_text(yaml.safe_dump(content))
    details = json.loads(call(0, "run", "job.yaml", "--dry-run", "--json").stdout)
    assert details["recipe"]["sparsity"] == 0.25
    assert not Path("out").exists()
    call(0, "run", "job.yaml")
    assert written()["recipe"]["update"] == "none"
    assert "exists already" in call(2, "run", "job.yaml").stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"modle": "x"}, ("job.yaml", "'modle'", "did you mean 'model'")),
        ({"model": "x", "sparsty": 0.5}, ("did you mean 'sparsity'",)),
        ({"model": "x", "out": "o", "method": "wonda"}, ("did you mean 'wanda'",)),
        ({"model": "x", "out": "o", "method": ["wanda"]}, ("unknown method",)),
        ({"model": "x"}, ("--out",)),
        ({"out": "o"}, ("model folder", "--build")),
        ({"build": "a:b", "out": "o"}, ("go together",)),
        (["model"], ("expected a mapping",)),
    ],
)
def test_mistakes_in_a_run(call: Call, content: Any, words: tuple[str, ...]):
    Path("job.yaml").write_text(yaml.safe_dump(content))
    said = call(2, "run", "job.yaml").stderr
    assert all(word in said for word in words), said


# Errors


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--sparsity", "1.2"), ("sparsity is 1.2", "less than 1")),
        (("--sparsity", "half"), ("Invalid value for '--sparsity'",)),
        (("--sparsity", "0.5", "--pattern", "1:4"), ("leave --sparsity out",)),
        (("--sparsity", "0.5", "--threshold", "1s"), ("give either",)),
        (("--pattern", "16x16"), ("expected N:M", "--granularity 16x16")),
        (("--pattern", "2:4", "--granularity", "layer"), ("drop one",)),
        (("--pattern", "3:5"), ("needs a multiple of 5", "--protect")),
        (("--threshold", "small"), ("expected a number", "1.5s")),
        (("--threshold", "0.1", "--method", "wanda"), ("magnitude",)),
        (("--method", "sparse-gpt"), ("did you mean 'sparsegpt'",)),
        (("--method", "wanda", "--recipe", "r.yaml"), ("--method and --recipe",)),
        (("--recipe", "none.yaml"), ("no recipe at none.yaml",)),
        (("--criterion", "magnitud"), ("did you mean 'magnitude'",)),
        (("--device", "cuda:99"), ("--device cuda:99 cannot be used", "cpu")),
        (("--device", "tpu"), ("--device tpu cannot be used",)),
        (("--dtype", "float8"), ("unknown dtype",)),
        (("--build", "a:b", "--weights", "w.safetensors"), ("either a model folder",)),
        (("--sparcity", "0.5"), ("No such option",)),
    ],
)
def test_mistakes_end_in_a_message_and_exit_code_2(prune: Call, here: Path, words: tuple[str, ...], expected: Any):
    before = fingerprint(here)
    done = prune(2, *words)
    assert all(word in done.stderr for word in expected), done.stderr
    assert "Traceback" not in done.output
    assert fingerprint(here) == before
    error = json.loads(prune(2, *words, "--json").stdout)
    assert set(error) == {"error"}


def test_a_model_that_is_not_there(call: Call):
    done = call(2, "prune", "./nowhere", "--out", "out", "--quiet")
    assert done.stderr.startswith("secateur: ./nowhere does not exist")
    assert done.stdout == ""


def test_an_internal_error_is_exit_code_1(prune: Call, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("secateur.pipeline.prune", lambda *_, **__: 1 / 0)
    done = prune(1, "--json")
    assert "please report it" in done.stderr
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError" in json.loads(done.stdout)["error"]


def test_interrupted_and_resumed(prune: Call, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr("secateur.pipeline.verify", _interrupt)
        assert "--resume" in prune(130).stderr
    assert not Path("out").exists()
    assert "unfinished run" in prune(2).stderr
    prune(0, "--resume")
    assert written()["sparsity"] == pytest.approx(0.5, abs=0.01)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


# Eval


@pytest.fixture
def pruned(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pruned") / "llama"
    secateur.prune(llama, secateur.method("magnitude", sparsity=0.5), out=folder)
    return folder


def test_eval_against_the_dense_model(call: Call, pruned: Path, llama: Path):
    words = ("eval", pruned, "--against", llama, "--text", "words.txt", "--samples", 4, "--length", 16)
    said = flat(call(0, *words))
    for expected in ("perplexity", "95 % interval", "KL", "same first choice"):
        assert expected in said
    found = json.loads(call(0, *words, "--json").stdout)
    assert {"dense", "pruned", "log_ratio", "kl_mean", "kl_p99", "agreement", "windows", "text"} <= set(found)
    assert found["log_ratio"]["low"] <= found["log_ratio"]["value"] <= found["log_ratio"]["high"]
    assert found["kl_mean"]["value"] > 0
    same = json.loads(call(0, "eval", llama, *words[2:], "--json").stdout)
    assert same["kl_mean"]["value"] == 0
    assert same["agreement"]["value"] == 1


def test_eval_alone(call: Call, pruned: Path):
    words = ("eval", pruned, "--text", "words.jsonl", "--field", "body", "--samples", 4, "--length", 16)
    assert "perplexity of" in flat(call(0, *words))
    assert set(json.loads(call(0, *words, "--json").stdout)["pruned"]) >= {"perplexity", "nll", "tokens"}
    assert len(call(0, *words, "--quiet", "--dtype", "bfloat16").stdout.splitlines()) == 1


def test_eval_mistakes_come_before_models_load(
    call: Call, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("secateur.evaluation._load", lambda *_: pytest.fail("a model was loaded"))
    assert "whole windows" in call(2, "eval", llama, "--text", "words.txt", "--samples", 1000).stderr
    assert "does not exist" in call(2, "eval", llama, "--text", "none.txt").stderr
    assert "unknown dtype" in call(2, "eval", llama, "--text", "words.txt", "--dtype", "int8").stderr
    other = save_llama(tmp_path / "other")
    config = json.loads((other / "config.json").read_text()) | {"vocab_size": 40}
    (other / "config.json").write_text(json.dumps(config))
    words = ("eval", llama, "--text", "words.txt", *SHORT)
    assert "vocabularies differ" in call(2, *words, "--against", other).stderr
    other = save_llama(tmp_path / "third")
    save_tokenizer(other)
    tokens = (other / "tokenizer.json").read_text().replace('"root": 1', '"root": 2').replace('"stem": 2', '"stem": 1')
    (other / "tokenizer.json").write_text(tokens)
    assert "encode" in call(2, *words, "--against", other).stderr
    assert "2 windows" in call(2, *words, "--against", llama, "--samples", 1).stderr


def test_eval_takes_no_pickle(call: Call, llama: Path, tmp_path: Path):
    folder = shutil.copytree(llama, tmp_path / "pickle")
    for path in folder.glob("model*"):
        path.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    assert "weights as pickle files" in call(2, "eval", folder, "--text", "words.txt", *SHORT).stderr


# Doctor


def test_doctor(call: Call, llama: Path, unchanged: Watch):
    unchanged(llama)
    said = flat(call(0, "doctor", llama, *SHORT))
    for words in ("LlamaForCausalLM", "2 blocks model.layers.*", "model.layers.*.mlp.down_proj", "embedding", "2:4"):
        assert words in said
    for aim in ("a smaller file", "faster on a CPU", "faster on a GPU", "a phone"):
        assert aim in said
    assert "model.layers.1.mlp.down_proj" not in said
    assert "model.layers.1.mlp.down_proj" in flat(call(0, "doctor", llama, "--names"))
    found = json.loads(call(0, "doctor", llama, "--json").stdout)
    assert found["prunable"] is True
    assert found["names"]["model.layers.0.self_attn.q_proj"] is None


def test_doctor_of_a_model_that_cannot_be_pruned(call: Call, llama: Path, tmp_path: Path):
    folder = shutil.copytree(llama, tmp_path / "quantized")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert "cannot be pruned" in flat(call(2, "doctor", folder))
    found = json.loads(call(2, "doctor", folder, "--json").stdout)
    assert found["prunable"] is False
    assert "gptq" in found["problems"][0]
    assert "does not exist" in call(2, "doctor", "./nowhere").stderr
    assert "samples is 0" in call(2, "doctor", llama, "--samples", "0").stderr


# Demo


def test_demo(call: Call, monkeypatch: pytest.MonkeyPatch):
    from secateur.demo.run import Row

    rows = [Row(name, 0.5, 2_000_000, 3.25, {"copy": 0.75}, 12.5) for name in ("dense", "admm 50 %")]
    monkeypatch.setattr("secateur.demo.run.demo", lambda out, progress: rows)
    said = flat(call(0, "demo"))
    assert all(words in said for words in ("admm 50 %", "perplexity", "copy, accuracy", "no smaller file"))
    assert json.loads(call(0, "demo", "--json").stdout)["rows"][0]["name"] == "dense"


# A module of one's own

MODELS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.second = nn.Conv2d(4, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, image):
        x = self.norm(self.second(torch.relu(self.conv(image))))
        return self.head(x.mean((2, 3)))

def net():
    return Net()

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.again = nn.Linear(8, 8)
        self.again.weight = self.inner.weight
        self.out = nn.Linear(8, 4)

    def forward(self, x):
        return self.out(self.again(torch.relu(self.inner(x))))

def noisy():
    model = Tied()
    model.out.forward = lambda x, scale=torch.rand(()) : x * scale
    return model

def needs(argument):
    pass

def broken():
    raise ValueError("no such size")

NOT_A_FUNCTION = 3

def nothing():
    return 3
"""


@pytest.fixture
def mine(here: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's in the current directory, of a name of its own, so that imports are not shared."""
    name = f"mine_{abs(hash(request.node.name))}"
    (here / f"{name}.py").write_text(MODELS)
    return name


def make(here: Path, name: str, kind: str) -> nn.Module:
    space: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(MODELS, space)
    return space[kind]()


def inputs(here: Path) -> None:
    save_file({"image": torch.randn(4, 1, 8, 8)}, here / "inputs.safetensors")
    save_file({"x": torch.randn(4, 8)}, here / "x.safetensors")


def test_build(call: Call, here: Path, mine: str):
    module = make(here, mine, "Net")
    save_model(module, str(here / "w.safetensors"))
    before = fingerprint(here)
    words = ("prune", "--build", f"{mine}:net", "--weights", "w.safetensors", "-m", "magnitude", "-o", "out")
    assert "second" in flat(call(0, *words, "--dry-run"))
    shutil.rmtree(here / "__pycache__", ignore_errors=True)
    assert fingerprint(here) == before
    said = flat(call(0, *words))
    assert "every tensor read back" in said
    old, new = load_file("w.safetensors"), load_file("out/model.safetensors")
    assert {name: value.dtype for name, value in old.items()} == {name: value.dtype for name, value in new.items()}
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"second.weight"}
    assert (new["second.weight"] == 0).float().mean() == 0.5
    assert sorted(os.listdir("out")) == ["README.md", "model.safetensors", "secateur.json"]
    assert not Path("out.partial").exists()


def test_build_with_inputs(call: Call, here: Path, mine: str):
    inputs(here)
    module = make(here, mine, "Net").half()
    save_file(module.state_dict(), here / "w.safetensors")
    words = ("prune", "--build", f"{mine}:net", "--weights", "w.safetensors", "--calibration", "inputs.safetensors")
    details = json.loads(call(0, *words, "--samples", 4, "-o", "out", "--json").stdout)
    assert details["verified"]["how"] == "loaded into a fresh module"
    assert details["verified"]["difference"] == 0
    assert details["recipe"]["update"] == "admm"
    assert details["probe"]["output"]["shape"] == [1, 3]
    assert all(value.dtype in (torch.float16, torch.int64) for value in load_file("out/model.safetensors").values())


@pytest.mark.parametrize("whole", [False, True])
def test_build_with_tied_tensors(call: Call, here: Path, mine: str, whole: bool):
    inputs(here)
    module = make(here, mine, "Tied")
    if whole:
        save_file({name: value.clone() for name, value in module.state_dict().items()}, here / "w.safetensors")
    else:
        save_model(module, str(here / "w.safetensors"))
    words = ("prune", "--build", f"{mine}:Tied", "--weights", "w.safetensors", "--calibration", "x.safetensors")
    call(0, *words, "--samples", 4, "-o", "out", "-q")
    old, new = load_file("w.safetensors"), load_file("out/model.safetensors")
    assert set(old) == set(new)
    tied = [new[name] for name in ("inner.weight", "again.weight") if name in new]
    assert len(tied) == 1 + whole
    assert all((value == 0).float().mean() == 0.5 and torch.equal(value, tied[0]) for value in tied)


def test_build_into_a_file_of_the_usual_name_and_resume(call: Call, here: Path, mine: str, monkeypatch: Any):
    (here / "w").mkdir()
    save_model(make(here, mine, "Net"), str(here / "w/model.safetensors"))
    words = (
        "prune",
        "--build",
        f"{mine}:net",
        "--weights",
        "w/model.safetensors",
        "-m",
        "magnitude",
        "-o",
        "out",
        "-q",
    )
    with monkeypatch.context() as patch:
        patch.setattr("secateur.module._verify", _interrupt)
        call(130, *words)
    assert not Path("out").exists()
    assert "unfinished run" in call(2, *words).stderr
    call(0, *words, "--resume")
    assert Path("out/model.safetensors").is_file()


def _pickle(here: Path) -> None:
    torch.save({}, here / "w.pt")


@pytest.mark.parametrize(
    ("build", "weights", "expected"),
    [
        ("net", "w.pt", ("pickle", "weights_only=True", "save_file")),
        ("net", "none.safetensors", ("does not exist",)),
        ("net", "junk.safetensors", ("not a safetensors file",)),
        ("net", "missing.safetensors", ("lacks head.bias",)),
        ("net", "more.safetensors", ("has heads.weight", "did you mean 'head.weight'")),
        ("net", "shape.safetensors", ("head.bias has shape [4]", "[3]")),
        ("net", "nan.safetensors", ("NaN or Inf",)),
        ("nett", "w.safetensors", ("has no 'nett'", "did you mean 'net'")),
        ("needs", "w.safetensors", ("called without arguments",)),
        ("broken", "w.safetensors", ("no such size",)),
        ("NOT_A_FUNCTION", "w.safetensors", ("is a int",)),
        ("nothing", "w.safetensors", ("returned a int",)),
        (None, "w.safetensors", ("cannot be imported",)),
        ("", "w.safetensors", ("package.module:function",)),
    ],
)
def test_mistakes_with_build(call: Call, here: Path, mine: str, build: str | None, weights: str, expected: Any):
    state = make(here, mine, "Net").state_dict()
    _pickle(here)
    Path("junk.safetensors").write_bytes(b"no")
    save_file(state, "w.safetensors")
    save_file({k: v for k, v in state.items() if k != "head.bias"}, "missing.safetensors")
    save_file(state | {"heads.weight": torch.zeros(1)}, "more.safetensors")
    save_file(state | {"head.bias": torch.zeros(4)}, "shape.safetensors")
    save_file(state | {"head.bias": torch.full((3,), torch.nan)}, "nan.safetensors")
    spec = "no_such_package:net" if build is None else f"{mine}:{build}"
    done = call(2, "prune", "--build", spec, "--weights", weights, "-m", "magnitude", "-o", "out")
    assert all(word in done.stderr for word in expected), done.stderr
    assert not Path("out").exists()
    assert not Path("out.partial").exists()


def test_a_module_is_calibrated_on_tensors(call: Call, here: Path, mine: str):
    inputs(here)
    save_model(make(here, mine, "Net"), str(here / "w.safetensors"))
    words = ("prune", "--build", f"{mine}:net", "--weights", "w.safetensors", "-o", "out")
    assert "(image)" in call(2, *words).stderr
    assert "words.txt is none" in call(2, *words, "--calibration", "words.txt").stderr
    said = call(2, *words, "--calibration", "x.safetensors", "--samples", 4).stderr
    assert "does not run on a batch of x [1, 8]" in said
    assert not Path("out").exists()


def test_a_module_that_answers_differently_is_not_called_done(call: Call, here: Path, mine: str):
    inputs(here)
    save_model(make(here, mine, "Tied"), str(here / "w.safetensors"))
    words = ("prune", "--build", f"{mine}:noisy", "--weights", "w.safetensors", "--calibration", "x.safetensors")
    said = call(2, *words, "--samples", 4, "-o", "out", "-m", "magnitude").stderr
    assert "not in its state dict" in said
    assert not Path("out").exists()


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks with four experts each."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(**TINY, num_local_experts=4, max_position_embeddings=64, initializer_range=0.3)
    folder = tmp_path_factory.mktemp("models") / "mixtral"
    MixtralForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder

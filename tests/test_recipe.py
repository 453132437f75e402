"""Recipes: mistakes named in one message, RULES, YAML there and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from secateur import Recipe, SecateurError, method
from secateur.recipe import (
    ABOUT,
    DEFAULT_METHOD,
    DEFAULT_SPARSITY,
    METHODS,
    RULES,
    Override,
    Run,
    make_run,
    read_yaml,
    to_yaml,
    validate,
)
from secateur.weights.allocation import ALLOCATIONS
from secateur.weights.criteria import CRITERIA
from secateur.weights.granularity import parse
from secateur.weights.update import UPDATES

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sparsity": 1.2}, "sparsity is 1.2: input should be less than 1"),
        ({"sparsity": 1}, "sparsity is 1: input should be less than 1"),
        ({"sparsity": -1}, "sparsity is -1: input should be greater than or equal to 0"),
        ({"sparsity": NAN}, "sparsity is nan: input should be a finite number"),
        ({"sparsity": INF}, "sparsity is inf: "),
        ({"sparsity": "half"}, "sparsity is 'half': input should be a valid number"),
        ({"sparsity": [0.5]}, r"sparsity is \[0.5\]: "),
        ({"damp": 0}, "damp is 0: input should be greater than 0"),
        ({"damp": NAN}, "damp is nan: "),
        ({"probes": 0}, "probes is 0: "),
        ({"seed": -1}, "seed is -1: "),
        ({"seed": 2**63}, "seed is 9223372036854775808: "),
        ({"protect": "*.q_proj"}, r"protect is '\*.q_proj': "),
        ({"threshold": {"sigma": -1}, "sparsity": None}, "threshold.sigma is -1: input should be greater than 0"),
        ({"overrides": [{"match": "*", "sparsity": 2}]}, "overrides.0.sparsity is 2: "),
        ({"overrides": [{"sparsity": 0.2}]}, "overrides.0.match is "),
        ({"calibration": {"samples": 0}}, "calibration.samples is 0: "),
        ({"calibration": {"length": 1}}, "calibration.length is 1: "),
        # unknown keys name the nearest known one
        ({"sparsty": 0.5}, r"unknown key 'sparsty' \(did you mean 'sparsity'\?\); known: criterion, granularity, "),
        ({"pattern": "2:4"}, "unknown key 'pattern'; known: criterion, "),
        ({"overrides": [{"match": "*", "criteria": "obs"}]}, r"'overrides.0.criteria' \(did you mean 'criterion'\?\)"),
        ({"calibration": {"sample": 3}}, r"'calibration.sample' \(did you mean 'samples'\?\); known: source, field, "),
        ({"threshold": {"absolut": 3}, "sparsity": None}, r"'threshold.absolut' \(did you mean 'absolute'\?\)"),
        # and so do unknown names
        ({"criterion": "wnda"}, r"unknown criterion 'wnda' \(did you mean 'wanda'\?\); known: magnitude, random"),
        ({"update": "sparsgpt"}, r"unknown update 'sparsgpt' \(did you mean 'sparsegpt'\?\); known: none, "),
        ({"allocation": "erk"}, "unknown allocation 'erk'; known: uniform, "),
        ({"dtype": "fp16"}, r"unknown dtype 'fp16'(.*); known: auto, float32"),
        ({"granularity": "filter"}, "unknown granularity 'filter'; known: layer, "),
        ({"granularity": "4:2"}, "pattern 4:2: N:M keeps N of every M weights"),
        ({"overrides": [{"match": "*", "criterion": "wnda"}]}, r"unknown criterion 'wnda' \(did you mean 'wanda'\?\)"),
        ({"overrides": [{"match": "*", "update": "x"}]}, "unknown update 'x'"),
        ({"overrides": [{"match": "*", "granularity": "x"}]}, "unknown granularity 'x'"),
    ],
)
def test_mistakes_are_named(values: dict[str, Any], message: str):
    values = {"sparsity": 0.5, **values}
    for make in (lambda: Recipe(**values), lambda: validate(Recipe, values), lambda: make_run(values)):
        with pytest.raises(SecateurError, match=message) as caught:
            make()
        assert "pydantic" not in str(caught.value)


def test_all_mistakes_are_in_one_message_with_the_place():
    with pytest.raises(SecateurError) as caught:
        validate(Recipe, {"sparsity": 2, "damp": 0, "sed": 1}, "mine.yaml")
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert all("mine.yaml: " in line for line in lines)


BROKEN: dict[str, list[dict[str, Any]]] = {
    "how much to remove is said once": [
        {},
        {"sparsity": 0.5, "threshold": {"sigma": 1}, "criterion": "magnitude"},
    ],
    "an N:M pattern fixes the sparsity": [{"granularity": "2:4", "sparsity": 0.6}],
    "an N:M pattern takes no threshold": [
        {"granularity": "2:4", "threshold": {"absolute": 1}, "criterion": "magnitude"}
    ],
    "a threshold is on |w|": [{"threshold": {"absolute": 1}, "criterion": name} for name in ("wanda", "obs", "random")],
    "a threshold is absolute or in sigmas": [
        {"threshold": {}, "criterion": "magnitude"},
        {"threshold": {"absolute": 1, "sigma": 1}, "criterion": "magnitude"},
    ],
    "an allocation needs a sparsity to distribute": [
        {"granularity": "2:4", "allocation": "owl"},
        {"threshold": {"sigma": 1}, "criterion": "magnitude", "allocation": "global"},
    ],
    "allocations by score need scores that compare": [
        {"sparsity": 0.5, "criterion": "random", "allocation": name} for name in ("global", "lamp")
    ],
}


def test_every_rule_stands_in_the_table():
    assert set(BROKEN) == {rule.title for rule in RULES}
    assert len({rule.why for rule in RULES}) == len(RULES)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.title)
def test_what_a_rule_excludes_ends_in_its_words(rule: Any):
    for values in BROKEN[rule.title]:
        with pytest.raises(SecateurError) as caught:
            Recipe(**values)
        assert str(caught.value) == f"recipe: {rule.why}"


@pytest.mark.parametrize(
    "values",
    [
        {"sparsity": 0},
        {"sparsity": 0.999},
        {"granularity": "2:4"},
        {"granularity": "2:4", "sparsity": 0.5},
        {"granularity": "1:3", "sparsity": 2 / 3},
        {"threshold": {"sigma": 0.5}, "criterion": "magnitude"},
        {"threshold": {"absolute": 0.5}, "criterion": "magnitude", "update": "refit", "granularity": "row"},
        {"sparsity": 0.5, "criterion": "random", "allocation": "erdos-renyi"},
    ],
)
def test_what_no_rule_excludes(values: dict[str, Any]):
    Recipe(**values)


def test_nothing_is_excluded_but_by_a_rule():
    for c in CRITERIA:
        for g in ("layer", "per-row", "row", "column", "4x4", "2:4"):
            for u in UPDATES:
                for a in ALLOCATIONS:
                    values = {"criterion": c, "granularity": g, "update": u, "allocation": a}
                    amount = {} if ":" in g else {"sparsity": 0.5}
                    bad = (":" in g and a != "uniform") or (c == "random" and a in ("global", "lamp"))
                    if bad:
                        with pytest.raises(SecateurError):
                            Recipe(**values, **amount)
                    else:
                        recipe = Recipe(**values, **amount)
                        assert not any(rule.broken(recipe, parse(g)) for rule in RULES)


# Methods.


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_recipe(name: str):
    recipe = method(name, sparsity=0.5)
    assert {key: getattr(recipe, key) for key in METHODS[name]} == METHODS[name]
    assert name in ABOUT
    with pytest.raises(SecateurError, match="give either a sparsity"):
        method(name)
    if METHODS[name].get("allocation", "uniform") == "uniform":
        assert method(name, granularity="2:4").sparsity is None


def test_unknown_methods_name_the_nearest():
    with pytest.raises(SecateurError, match=r"unknown method 'wandaa' \(did you mean 'wanda'\?\); known: admm, "):
        method("wandaa", sparsity=0.5)


@pytest.mark.parametrize(
    ("values", "needs"),
    [
        ({"criterion": "magnitude", "update": "none"}, set()),
        ({"criterion": "random", "update": "none", "allocation": "erdos-renyi"}, set()),
        ({"criterion": "magnitude", "update": "none", "allocation": "owl"}, {"squares"}),
        ({"criterion": "wanda", "update": "none"}, {"squares"}),
        ({"criterion": "wanda", "update": "admm"}, {"squares", "gram"}),
        ({"criterion": "obd", "update": "refit"}, {"curvature", "gram"}),
        ({"criterion": "magnitude", "update": "none", "overrides": [{"match": "*", "update": "refit"}]}, {"gram"}),
        (
            {"criterion": "magnitude", "update": "none", "overrides": [{"match": "*", "criterion": "taylor"}]},
            {"gradient"},
        ),
    ],
)
def test_what_a_recipe_reads(values: dict[str, Any], needs: set[str]):
    assert Recipe(sparsity=0.5, **values).needs() == needs


def test_recipes_do_not_change():
    recipe = Recipe(sparsity=0.5)
    with pytest.raises(Exception, match="frozen"):
        recipe.sparsity = 0.6  # type: ignore[misc]


# YAML.

globs = st.lists(st.text("abc.*[]0?", min_size=1, max_size=6), max_size=2)
amounts = st.one_of(
    st.fixed_dictionaries({"sparsity": st.floats(0, 1, exclude_max=True)}),
    st.just({"granularity": "2:4"}),
    st.fixed_dictionaries(
        {"criterion": st.just("magnitude"), "threshold": st.fixed_dictionaries({"sigma": st.floats(1e-3, 9)})}
    ),
)
recipes = st.tuples(
    amounts,
    st.fixed_dictionaries(
        {},
        optional={
            "update": st.sampled_from(sorted(UPDATES)),
            "damp": st.floats(1e-9, 10),
            "protect": globs,
            "include": globs,
            "seed": st.integers(0, 2**63 - 1),
            "calibration": st.fixed_dictionaries(
                {"samples": st.integers(1, 9)}, optional={"source": st.sampled_from(["a.txt", "data/b c.jsonl"])}
            ),
            "overrides": st.lists(
                st.fixed_dictionaries(
                    {"match": st.sampled_from(["*", "*.down_proj", "a[0]"])},
                    optional={"sparsity": st.floats(0, 0.9), "granularity": st.sampled_from(["1:4", "row", "1x16"])},
                ),
                max_size=2,
            ),
        },
    ),
).map(lambda parts: parts[0] | parts[1])


@given(recipes)
def test_yaml_there_and_back(values: dict[str, Any]):
    recipe = Recipe(**values)
    text = to_yaml(recipe)
    assert validate(Recipe, yaml.safe_load(text)) == recipe
    assert to_yaml(validate(Recipe, yaml.safe_load(text))) == text


def test_yaml_of_a_file(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    recipe = method("owl", sparsity=0.6, overrides=[{"match": "*.o_proj", "threshold": {"absolute": 0.01}}])
    path.write_text(to_yaml(recipe), encoding="utf-8")
    assert validate(Recipe, read_yaml(path)) == recipe
    assert isinstance(recipe.overrides[0], Override)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sparsity: [", "is not valid YAML"),
        ("- 1\n- 2", "expected a mapping of keys to values, found list"),
        ("", "expected a mapping of keys to values, found NoneType"),
        ("just words", "found str"),
        (b"\xff\xfe\x00", "cannot read"),
        ("a: !!python/object/apply:os.system [echo]", "is not valid YAML"),
    ],
)
def test_files_that_are_no_recipe(content: str | bytes, message: str, tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SecateurError, match=message):
        read_yaml(path)


def test_a_recipe_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(SecateurError, match="no recipe at"):
        read_yaml(tmp_path / "absent.yaml")
    with pytest.raises(SecateurError, match="cannot read"):
        read_yaml(tmp_path)


@pytest.mark.parametrize("content", ["sparsity: .nan", "sparsity: 1.2", "sparsity: -1", "sparsity: yes please"])
def test_bad_numbers_in_yaml(content: str):
    with pytest.raises(SecateurError, match=r"mine\.yaml: sparsity is "):
        validate(Recipe, yaml.safe_load(content), "mine.yaml")


# Runs: a recipe and what it is applied to.


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, METHODS[DEFAULT_METHOD] | {"sparsity": DEFAULT_SPARSITY}),
        (
            {"method": "sparsegpt", "granularity": "2:4"},
            METHODS["sparsegpt"] | {"granularity": "2:4", "sparsity": None},
        ),
        ({"method": "wanda", "sparsity": 0.7}, METHODS["wanda"] | {"sparsity": 0.7}),
        ({"threshold": {"sigma": 1}}, METHODS["magnitude"] | {"sparsity": None}),
        ({"criterion": "ria", "seed": None}, METHODS[DEFAULT_METHOD] | {"criterion": "ria", "seed": 0}),
    ],
)
def test_what_a_run_does_not_say_comes_from_its_method(values: dict[str, Any], expected: dict[str, Any]):
    run = make_run(values)
    assert {key: getattr(run, key) for key in expected} == expected
    assert run.recipe == Recipe(**{key: getattr(run, key) for key in Recipe.model_fields})
    assert validate(Run, yaml.safe_load(to_yaml(run))) == run

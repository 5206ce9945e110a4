"""PerSite: which site gets which passes, and what is refused before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slimc import recipes
from slimc.errors import RecipeError
from slimc.passes import (
    Activations,
    AllocateBits,
    Calibrate,
    Compensate,
    Fuse,
    LowRank,
    Pass,
    PerSite,
    Prune,
    Quantize,
    Tune,
    check_order,
    from_config,
)
from slimc.passes.journal import Journal

EXPRESSIONS = {
    "int3": [Quantize(bits=3, group=12)],
    "sparse": [Quantize(bits=4), Prune("2:4"), LowRank(rank=2)],
}
PER_SITE = PerSite(EXPRESSIONS, sites={"mix": "sparse", "re:gate|up": "sparse"}, default="int3")


def test_each_site_is_as_if_its_expression_were_the_whole_recipe(network, batches, run):
    program, outcome = run(network, batches, [Calibrate(), PER_SITE, Fuse()])
    forms = {row.name: row.expression for row in outcome.rows}
    assert {name for name, form in forms.items() if form.startswith("2:4 int4")} == {"gate", "up", "mix"}
    assert forms["down"] == "int3/12"
    # The first sites see dense inputs in both runs, so that they are equal in every bit.
    alone, _ = run(network, batches, [Calibrate(), *EXPRESSIONS["sparse"], Fuse()])
    ours, theirs = (one.sites["gate"].packed.tensors() for one in (program, alone))
    assert ours.keys() == theirs.keys()
    assert all(bool((ours[name] == theirs[name]).all()) for name in ours)


def test_the_recipe_line_builds_an_equal_pass_and_survives_json_and_yaml(tmp_path: Path):
    lines = json.loads(json.dumps([Calibrate().to_config(), PER_SITE.to_config(), Fuse().to_config()]))
    assert from_config(lines)[1] == PER_SITE
    recipe = recipes.Recipe(name="mine", passes=lines)
    (tmp_path / "mine.yaml").write_text(recipe.to_yaml())
    assert recipes.load(tmp_path / "mine.yaml").build()[1] == PER_SITE


def test_it_asks_for_what_any_expression_needs():
    gram = PerSite({"a": [Quantize()], "b": [Prune(method="sparsegpt")]}, default="a")
    assert gram.statistics() == {"activations", "gram"}
    with pytest.raises(RecipeError, match="needs calibrate before it"):
        check_order([gram])
    assert PerSite({"a": [Quantize()]}, default="a").statistics() == frozenset()


def test_a_name_goes_before_patterns_and_a_pattern_before_the_default():
    assert [PER_SITE.choice(name) for name in ("mix", "gate", "down")] == ["sparse", "sparse", "int3"]
    named = PerSite(EXPRESSIONS, sites={"*": "int3", "a.b": "sparse"})
    assert [named.choice(name) for name in ("a.b", "a.c")] == ["sparse", "int3"]


def test_a_resumed_run_gives_the_same_bytes(network, batches, run, tmp_path: Path):
    passes = [Calibrate(), PER_SITE, Fuse()]
    first = Journal(tmp_path / "journal", resume=False)
    first.begin({"recipe": [one.to_config() for one in passes]})
    program, _ = run(network, batches, passes, journal=first)
    second = Journal(tmp_path / "journal", resume=True)
    second.begin({"recipe": [one.to_config() for one in passes]})
    again, _ = run(network, batches, passes, journal=second)
    for name, site in program.sites.items():
        tensors = again.sites[name].packed.tensors()
        assert all(bool((tensor == tensors[key]).all()) for key, tensor in site.packed.tensors().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expressions": {}}, "must map names to lists"),
        ({"expressions": {"a": "quantize"}, "default": "a"}, "must map names to lists"),
        ({"expressions": {"a": ["quantise"]}, "default": "a"}, "expression 'a': There is no pass 'quantise' .did you"),
        ({"expressions": {"a": []}, "default": "a"}, "'a' compresses nothing"),
        ({"expressions": {"a": [Activations()]}, "default": "a"}, "'a' compresses nothing"),
        ({"expressions": {"a": [Quantize(), Fuse()]}, "default": "a"}, "has 'fuse', which is not for a single site"),
        ({"expressions": {"a": [PER_SITE]}, "default": "a"}, "has 'per_site', which is not for a single site"),
        ({"expressions": EXPRESSIONS, "sites": ["a"]}, "sites must map names"),
        ({"expressions": EXPRESSIONS, "sites": {"a": "int4"}}, "'a' has the expression 'int4'.*did you mean 'int3'"),
        ({"expressions": EXPRESSIONS, "default": "dense"}, "To leave a site dense, exclude it"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        PerSite(**options)


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ({"mixx": "int3", "*": "int3"}, "'mixx' matches no weight .did you mean 'mix'"),
        ({"mix": "int3"}, "nothing says how 'gate' is to be expressed"),
        ({"g*": "int3", "*ate": "int3", "*": "int3"}, "both 'g.' and '.ate' match 'gate'"),
        ({"*": "odd"}, "the pattern 2:5 does not divide the width 32 of 'gate'"),
    ],
)
def test_sites_that_do_not_fit_the_model_are_refused_before_any_work(network, batches, run, sites, message):
    passes = [Calibrate(), PerSite(EXPRESSIONS | {"odd": [Prune("2:5")]}, sites=sites), Fuse()]
    with pytest.raises(RecipeError, match=message):
        run(network, batches, passes)


def test_each_expression_must_be_in_an_order_that_works():
    with pytest.raises(RecipeError, match="expression 'a': low_rank has no error to correct"):
        check_order([Calibrate(), PerSite({"a": [LowRank(), Quantize()]}, default="a")])
    with pytest.raises(RecipeError, match="expression 'a': quantize appears twice"):
        check_order([Quantize(), PerSite({"a": [Quantize()]}, default="a")])


@pytest.mark.parametrize(
    ("later", "message"),
    [
        (Quantize(bits=4), "quantize appears twice"),
        (Prune("2:4"), "prune appears twice"),
        (Compensate(), "compensate comes after quantize"),
        (PER_SITE, "per_site appears twice"),
    ],
)
def test_what_follows_must_go_with_every_expression(later: Pass, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_order([Calibrate(), PER_SITE, later])
    check_order([Calibrate(), PerSite({"a": [Quantize()], "b": [Prune()]}, default="a"), LowRank(), Tune()])


def test_widths_need_codes_in_every_expression() -> None:
    with pytest.raises(RecipeError, match="nothing makes codes: put quantize after it"):
        check_order([Calibrate(), AllocateBits(), PerSite({"a": [Quantize("gptq")], "b": [Prune()]}, default="a")])

"""From what choices cost to a recipe that carries them out, and what budgets are refused."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import slimc
from slimc import api, recipes
from slimc.errors import FormatError, InputError, RecipeError
from slimc.passes import Activations, Calibrate, Fuse, LowRank, PerSite, Quantize
from slimc.planning.check import measured_damage
from slimc.planning.menu import JUDGED, PRESET, Menu
from slimc.planning.plan import Sensitivities
from slimc.planning.sensitivity import Choice, SiteChoices
from slimc.progress import SilentProgress
from slimc.runtime.formats import LinearFormat, WeightFormat

MENU = {"int2": [Quantize(bits=2, group=8)], "int4": [Quantize(bits=4, group=8)]}


def _site(name: str, damages: dict[str, float]) -> SiteChoices:
    """Return a site of 8 x 8 weights: 128 bytes dense, 48 and 32 with a scale of two bytes a row."""
    bits = {"dense": None, "int4": 4, "int2": 2}
    forms = {one: LinearFormat(WeightFormat(8, 8, bits=bits[one], dtype=torch.bfloat16)) for one in damages}
    choices = tuple(Choice(one, forms[one], damage, 0.1) for one, damage in damages.items())
    return SiteChoices(name, (8, 8), (name,), choices)


@pytest.fixture
def found() -> Sensitivities:
    sites = (
        _site("a", {"dense": 0, "int2": 9.0, "int4": 1.0}),
        _site("b", {"dense": 0, "int2": 0.5, "int4": 0.2}),
    )
    return Sensitivities(sites, Menu.load(MENU), exclude=("left",))


def _choices(plan) -> dict[str, str]:
    return {site.name: site.choice.name for site in plan.sites}


@pytest.mark.parametrize(
    ("budget", "choices"),
    [
        ("4bpw", {"a": "int2", "b": "int2"}),
        ("0.08kB", {"a": "int4", "b": "int2"}),
        ("6bpw", {"a": "int4", "b": "int4"}),
        ("0.625x", {"a": "dense", "b": "int2"}),
        ("0.7x", {"a": "dense", "b": "int4"}),
    ],
)
def test_the_bytes_go_where_they_save_most(found, budget, choices):
    plan = found.plan(budget)
    assert _choices(plan) == choices
    assert plan.nbytes == sum(site.choice.nbytes for site in plan.sites)
    assert plan.damage == pytest.approx(sum(site.choice.damage for site in plan.sites))


@pytest.mark.parametrize(("budget", "expression"), [("4bpw", "int2"), ("5.9bpw", "int2"), ("6bpw", "int4")])
def test_of_single_expressions_the_least_damage_within_the_budget_is_taken(found, budget, expression):
    assert _choices(found.uniform(budget)) == {"a": expression, "b": expression}
    assert found.plan(budget).damage <= found.uniform(budget).damage


def test_an_expression_that_some_site_cannot_have_is_not_for_all_of_them(found):
    sites = (replace(found.sites[0], choices=found.sites[0].choices[:2], refused={"int4": "too thin"}), found.sites[1])
    plans = replace(found, sites=sites)
    assert _choices(plans.uniform("6bpw")) == {"a": "int2", "b": "int2"}
    assert str(plans.plan("6bpw")).endswith("Not to be had at 1 layer: int4 (too thin)")
    assert replace(found, sites=(replace(sites[0], choices=sites[0].choices[:1]),)).uniform("16bpw") is None


def test_the_recipe_names_each_site_and_leaves_dense_what_the_plan_leaves(found):
    recipe = found.plan("0.7x").recipe
    assert recipe.exclude == ["left", "a"]
    (per_site,) = (one for one in recipe.build() if isinstance(one, PerSite))
    assert per_site == PerSite({"int4": MENU["int4"]}, sites={"b": "int4"})


def test_the_plan_is_printed_as_a_table_with_its_totals(found):
    lines = str(found.plan("5bpw")).splitlines()
    assert lines[0].split("  ")[0] == "layer"
    assert [word for line in lines[1:3] for word in line.split()[:1]] == ["a", "b"]
    assert lines[-2].startswith("2 layers, 0.000 MB, 5.000 bits a weight (budget 5bpw), predicted damage 1.5")
    assert lines[-1] == "int4 x 1, int2 x 1."


def test_a_budget_below_the_menu_is_refused_with_the_least_that_it_reaches(found):
    with pytest.raises(
        RecipeError, match=r"The budget 3bpw is 4.8e-05 MB, and the least .* is 6.4e-05 MB \(4.000 bits a weight\)"
    ):
        found.plan("3bpw")


def test_a_budget_that_leaves_all_dense_is_refused(found):
    with pytest.raises(RecipeError, match="leaves all layers dense"):
        found.plan("1x")


def test_a_budget_in_time_needs_a_target_in_time(found):
    with pytest.raises(RecipeError, match="budget 2ms is a time, and the target 'size' counts bytes"):
        found.plan("2ms")
    with pytest.raises(RecipeError, match="target 'decode' needs times"):
        found.plan("4bpw", target="decode")


def test_a_head_that_is_the_embedding_too_can_save_time_but_no_bytes(found):
    tied = replace(found, sites=(found.sites[0], replace(found.sites[1], embedding="embed")))
    for plan in (tied.plan, tied.uniform):
        with pytest.raises(RecipeError, match="'b' shares its weight with the embedding 'embed', which stays as it is"):
            plan("4bpw")
    times = _times(tied, {"dense": 10, "int4": 5, "int2": 3})
    assert _choices(tied.plan("6us", target="decode", times=times)) == {"a": "int2", "b": "int2"}
    with pytest.raises(RecipeError, match="plan for time"):
        tied.plan("4bpw", target="decode", times=times)


def test_sensitivities_are_the_same_after_a_file(found, tmp_path: Path):
    sites = (replace(found.sites[0], refused={"int4": "why not"}), replace(found.sites[1], embedding="embed"))
    saved = replace(found, sites=sites, include=("b",), model="Model", weights="1f")
    saved.save(tmp_path / "found.json")
    assert Sensitivities.load(tmp_path / "found.json") == saved


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{}", "has no format_version, so it holds no sensitivities"),
        ('{"format_version": 9}', "has format version 9, but .* reads version 1; upgrade slimc"),
        ('{"format_version": 1}', "slimc_version: Field required; the file is damaged or was edited"),
    ],
)
def test_a_file_without_sensitivities_is_refused(tmp_path: Path, content, message):
    if content is not None:
        (tmp_path / "found.json").write_text(content)
    with pytest.raises(FormatError, match=message):
        Sensitivities.load(tmp_path / "found.json")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda file: file.update(sites=[]), "sites: List should have at least 1 item"),
        (lambda file: file["sites"].append(file["sites"][0]), "'a' is there twice"),
        (lambda file: file["sites"][0]["choices"].pop(0), "the choices at 'a' are not 'dense' first"),
        (lambda file: file["sites"][1]["choices"].append(file["sites"][1]["choices"][1]), "the choices at 'b' are not"),
        (lambda file: file["sites"][0]["choices"][1].update(name="int3"), "the choices at 'a' are not"),
        (lambda file: file["sites"][0].update(shape=[8, 16]), "the form of 'dense' at 'a' is not of its shape"),
        (lambda file: file["sites"][0]["choices"][1]["format"]["weight"].update(bits=99), "cannot have 99 bits"),
        (lambda file: file["sites"][0]["choices"][1].update(damage=-1.0), "greater than or equal to 0"),
        (lambda file: file["menu"].update(passes=["fuse"]), "fuse has nothing to fuse"),
    ],
)
def test_edited_sensitivities_are_refused(found, tmp_path: Path, edit, message):
    path = tmp_path / "found.json"
    found.save(path)
    file = json.loads(path.read_text())
    edit(file)
    path.write_text(json.dumps(file))
    with pytest.raises(FormatError, match=f"found.json: .*{message}.*; the file is damaged or was edited"):
        Sensitivities.load(path)


def _times(found: Sensitivities, by_name: dict[str, float]) -> dict[LinearFormat, float]:
    return {choice.format: by_name[choice.name] for site in found.sites for choice in site.choices}


@pytest.mark.parametrize(
    ("budget", "choices", "spent"),
    [
        ("6us", {"a": "int2", "b": "int2"}, 6),
        ("0.4x", {"a": "int4", "b": "int2"}, 8),
        ("0.0115ms", {"a": "int4", "b": "int4"}, 10),
    ],
)
def test_a_budget_in_time_is_spent_where_it_saves_most(found, budget, choices, spent):
    plan = found.plan(budget, target="decode", times=_times(found, {"dense": 10, "int4": 5, "int2": 3}))
    assert _choices(plan) == choices
    assert plan.microseconds == spent
    assert f"and {spent} us (budget {plan.budget})" in plan.summary()


def test_with_a_target_in_time_nothing_becomes_slower_than_it_is(found):
    plan = found.plan("6bpw", target="decode", times=_times(found, {"dense": 10, "int4": 11, "int2": 3}))
    assert _choices(plan) == {"a": "int2", "b": "int2"}


def test_with_a_target_in_time_sites_that_share_an_input_share_their_expression(found):
    together = replace(found, sites=tuple(replace(site, group=("a", "b")) for site in found.sites))
    plan = together.plan("8us", target="decode", times=_times(found, {"dense": 10, "int4": 5, "int2": 3}))
    assert _choices(plan) == {"a": "int2", "b": "int2"}


def test_a_time_below_the_menu_is_refused_with_the_least(found):
    with pytest.raises(RecipeError, match="budget 5us is 5 us, and the least .* is 6 us, of 20 us dense"):
        found.plan("5us", target="decode", times=_times(found, {"dense": 10, "int4": 5, "int2": 3}))


@pytest.mark.parametrize(
    ("menu", "message"),
    [
        ({}, "must map names to lists"),
        ({"dense": [Quantize()]}, "is on every menu already"),
        ({"a": ["quantise"]}, "did you mean 'quantize'"),
        ([Calibrate(), Quantize(), Fuse()], "one per_site.*has 0"),
        ([PerSite(MENU), Fuse()], "starts with calibrate"),
        ([Calibrate(), PerSite(MENU), LowRank(), Fuse()], "'low_rank' beside per_site"),
        ("slim-w4", "one per_site.*has 0"),
        ("none.yaml", "there is no recipe file 'none.yaml'"),
    ],
)
def test_a_menu_that_cannot_be_used_is_refused(menu, message):
    with pytest.raises(RecipeError, match=message):
        Menu.load(menu)


def test_a_menu_may_be_a_whole_recipe_which_the_plan_fills_in(found, tmp_path: Path):
    passes = [Calibrate(samples=8), PerSite(MENU), Activations(), Fuse()]
    lines = [one.to_config() for one in passes]
    recipe = recipes.Recipe(name="menu", passes=lines, exclude=["x"], include=["lm_head"])
    (tmp_path / "menu.yaml").write_text(recipe.to_yaml())
    menu = Menu.load(tmp_path / "menu.yaml")
    assert menu == Menu(tuple(passes), ("lm_head",), ("x",))
    assert menu.calibrated(samples=4).calibrate == Calibrate(samples=4)
    planned = menu.planned({"a": "int4"})
    assert planned == [passes[0], PerSite({"int4": MENU["int4"]}, {"a": "int4"}), *passes[2:]]


def test_choices_are_judged_by_data_that_nothing_is_fitted_to():
    assert Menu.load(MENU).measuring.held_out == JUDGED
    assert Menu((Calibrate(held_out=0.5), PerSite(MENU), Fuse())).measuring.held_out == 0.5
    assert Menu.load(MENU).calibrate == Menu.load(PRESET).calibrate == Calibrate(samples=64, length=512)


# ------------------------------------------------------------------------------------------------ with a model


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 8)).eval()


@pytest.fixture(scope="module")
def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 64, generator=generator) for _ in range(4)]


def test_a_planned_model_takes_what_the_plan_promised(network, batches, tmp_path: Path):
    plan = slimc.plan(network, batches, budget="5bpw")
    path = tmp_path / "plans" / "plan.yaml"
    plan.save(path)
    assert recipes.load(path) == plan.recipe
    small = slimc.compile(network, batches, path)
    bits = {row.name: row.bits for row in slimc.report(small).sites}
    assert bits == pytest.approx({site.name: site.bits for site in plan.sites if site.choice.name != "dense"})
    assert plan.bits_per_weight <= 5


@pytest.mark.parametrize("rows", [2, 8])
def test_a_plan_needs_no_more_than_two_samples(network, batches, rows):
    assert slimc.plan(network, batches[0][:rows], budget="6bpw", menu=MENU).measured > 0


def test_one_sample_is_too_few_for_a_plan(network, batches):
    with pytest.raises(InputError, match="is held out to judge choices by, which leaves none of 1 to fit them to"):
        slimc.plan(network, batches[0][:1], budget="6bpw", menu=MENU)


def test_a_budget_in_place_of_passes_is_the_same_plan(network, batches):
    plan = slimc.plan(network, batches, budget="4bpw")
    planned = slimc.compile(network, batches, budget="4bpw")
    recipe = slimc.report(planned).recipe
    assert recipe == [one.to_config() for one in plan.recipe.build()]


@pytest.mark.parametrize("form", ["plan", "recipe"])
def test_what_a_plan_is_can_be_carried_out_as_it_is(network, batches, form):
    plan = slimc.plan(network, batches, budget="9bpw", exclude="2")
    small = slimc.compile(network, batches, plan if form == "plan" else plan.recipe)
    bits = {row.name: row.bits for row in slimc.report(small).sites}
    assert "2" not in bits
    assert bits == pytest.approx({site.name: site.bits for site in plan.sites if site.choice.name != "dense"})


def test_one_measurement_serves_plans_of_several_budgets(network, batches, tmp_path: Path, monkeypatch):
    kept = tmp_path / "found.json"
    first = slimc.plan(network, batches, budget="6.5bpw", menu=MENU, sensitivities=kept, check=False)
    found = Sensitivities.load(kept)
    monkeypatch.setattr(api, "measure", lambda *_, **__: pytest.fail("it was measured again"))
    for given in (kept, str(kept), found):
        again = slimc.plan(network, sensitivities=given, budget="6.5bpw", check=False)
        assert again == first
    assert slimc.plan(network, sensitivities=kept, budget="8bpw", check=False).damage < first.damage
    assert slimc.plan(network, batches, sensitivities=kept, budget="6.5bpw").measured > 0


def test_a_tied_head_is_refused_before_anything_is_measured(tiny_llama_folder: Path, monkeypatch):
    from slimc.backends import hf

    monkeypatch.setattr(api, "measure", lambda *_, **__: pytest.fail("it was measured"))
    model, tokenizer = hf.load_model(tiny_llama_folder)
    for run in (slimc.plan, slimc.compile):
        with pytest.raises(RecipeError, match="'lm_head' shares its weight with the embedding 'model.embed_tokens'"):
            run(model, tokenizer=tokenizer, budget="4bpw", include="lm_head")


def test_sensitivities_come_with_their_menu_and_belong_to_a_model(network, batches, tmp_path: Path):
    found = slimc.sensitivities(network, batches, menu=MENU)
    with pytest.raises(RecipeError, match="have a menu, include and exclude of their own"):
        slimc.plan(network, sensitivities=found, budget="4bpw", menu=MENU)
    with pytest.raises(InputError, match="another model, a Sequential whose '0' is 96 x 64; Linear has no such layer"):
        slimc.plan(nn.Linear(64, 96), sensitivities=found, budget="4bpw")
    with pytest.raises(InputError, match="another model, a Sequential of other weights or in another dtype"):
        slimc.plan(copy.deepcopy(network).double(), sensitivities=found, budget="4bpw")
    with pytest.raises(InputError, match="sensitivities is of type int; give what slimc.sensitivities returned"):
        slimc.plan(network, batches, sensitivities=3, budget="4bpw")
    with pytest.raises(InputError, match="there is no folder"):
        slimc.plan(network, batches, sensitivities=tmp_path / "none" / "found.json", budget="4bpw")


def test_a_model_writes_its_own_text_once_for_plan_and_compression(tiny_llama_folder: Path, monkeypatch):
    from slimc import api
    from slimc.backends import hf

    model, tokenizer = hf.load_model(tiny_llama_folder)
    calls = []
    sample = api.self_sampled_batches
    monkeypatch.setattr(api, "self_sampled_batches", lambda *a, **k: calls.append(1) or sample(*a, **k))
    menu = Menu.load(None).calibrated(samples=4, length=32, batch=1)
    monkeypatch.setattr(Menu, "load", lambda _: menu)
    small = slimc.compile(model, tokenizer=tokenizer, budget="4bpw")
    assert len(calls) == 1
    assert slimc.report(small).bits_per_weight <= 4


def test_passes_and_a_budget_exclude_each_other(network, batches):
    with pytest.raises(RecipeError, match="target='decode' is of a plan, which is made for a budget"):
        slimc.compile(network, batches, target="decode")
    with pytest.raises(RecipeError, match="exclude each other"):
        slimc.compile(network, batches, "rtn-w4", budget="4bpw")


def test_a_model_that_cannot_write_needs_calibration(network):
    with pytest.raises(InputError, match="cannot write its own calibration text"):
        slimc.plan(network, budget="4bpw")


def test_a_checked_plan_is_no_worse_than_the_best_single_expression(network, batches):
    menu = {"int2": [Quantize(bits=2, group=8)], "int4": [Quantize(bits=4, group=8)]}
    checked = slimc.plan(network, batches, budget="6bpw", menu=menu)
    found = api.sensitivities(network, batches, menu=menu)
    uniform = api._try(network, found.uniform("6bpw"), found.menu, batches, device=None, progress=SilentProgress())
    assert 0 < checked.measured <= uniform.measured
    assert f"measured {checked.measured:.4g}" in checked.summary()


def test_the_measured_damage_of_logits_is_a_divergence_and_nothing_for_the_same_model(network, batches):
    calls = [((batch,), {}) for batch in batches]
    assert measured_damage(network, network, calls, vocabulary=None) == 0
    with torch.no_grad():
        exact = [network(batch) for batch in batches]
    size = exact[0].shape[-1]
    assert measured_damage(network, network, calls, vocabulary=size) == 0
    other = nn.Sequential(network, nn.Softplus())
    with torch.no_grad():
        scores = [one.flatten(0, -2) for one in exact]
        pairs = [(one.log_softmax(-1), nn.functional.softplus(one).log_softmax(-1)) for one in scores]
    wanted = torch.cat([(one.exp() * (one - found)).sum(-1) for one, found in pairs]).mean()
    assert measured_damage(network, other, calls, vocabulary=size) == pytest.approx(float(wanted), rel=1e-4)

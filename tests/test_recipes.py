from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import slimc
from slimc import passes, recipes
from slimc.errors import RecipeError
from slimc.passes import Calibrate, Compensate, Fuse, LowRank, Permute, Prune, Quantize


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_the_default_preset_solves_jointly_and_slims_own_stays_the_papers() -> None:
    assert recipes.DEFAULT == recipes.names()[0] == "joint-w4-2x4"
    kinds = [type(one) for one in recipes.load(recipes.DEFAULT).build()]
    assert kinds == [Calibrate, Permute, Compensate, Quantize, Prune, LowRank, Fuse]
    paper = [Quantize("slim", bits=4), Prune("2:4", "wanda"), LowRank("slim", rank=0.1, bits=4, rounds=4)]
    assert recipes.load("slim-w4-2x4").build()[1:-1] == paper


@pytest.mark.parametrize("name", recipes.names())
def test_presets_teach_and_have_an_order_that_works(name: str) -> None:
    recipe = recipes.load(name)
    assert recipe.name == name
    assert len(recipe.description) > 80
    assert recipe.build()


SIDE = 256
"""Of the square layer whose bits are counted."""

VECTORS = 16 * 2 * SIDE / SIDE**2
"""Bits a weight of two vectors in 16 bits, one along each side."""

ADAPTERS = 25 * 2 * SIDE * 4 / SIDE**2 + 16 * (25 * SIDE / 64 + SIDE) / SIDE**2
"""Of 4-bit factors of rank 25, a tenth: R has a scale for 64 columns, L one a row, for the rank is less than 64."""

PROMISED = {
    "joint-w4-2x4": 2 + 1 + 16 / 128 + ADAPTERS,
    "slim-w4-2x4": 2 + 1 + ADAPTERS,
    "slim-w4-2x4-grouped": 2 + 1 + 16 / 64 + ADAPTERS,
    "slim-w4": 4 + 16 / 128 + ADAPTERS,
    "wanda-2x4": 8 + 1,
    "rtn-w4": 4 + 16 / 64,
    "gptq-w4": 4 + 16 / 32,
    "slim-llm-w2": 2 + (16 + 8) / 64,
    "slim-llm-w3": 3 + (16 + 8) / 64,
    "mixed-w2": 2 + (16 + 8) / 128,
    "mixed-w3": 3 + (16 + 8) / 128,
    "mixed-w4": 4 + (16 + 8) / 128,
    # The published ratio counts signs and their magnitudes, but no mask.
    "slab-50": 8 + 1,
    "slab-2x4": 8 + 1 + 1 + VECTORS,
    "slab-2x4-w4": 2 + 1 + 16 / 64 + 1 + VECTORS,
}
"""Bits a weight: codes or values, mask, scales (16 bits) and zero points (8), adapters, signs."""


@pytest.mark.parametrize("name", recipes.names())
def test_a_preset_stores_the_bits_that_it_promises(name: str) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(SIDE, SIDE, bias=False)).bfloat16()
    inputs = torch.randn(2, 2 * SIDE, SIDE).bfloat16() * torch.randn(SIDE).exp().bfloat16()
    bits = slimc.report(slimc.compile(layer, [inputs], name)).bits_per_weight
    assert bits == pytest.approx(PROMISED[name], rel=0.01)


@pytest.mark.parametrize("name", recipes.names())
def test_yaml_reads_back_to_the_same_recipe(name: str, tmp_path: Path) -> None:
    recipe = recipes.load(name)
    assert recipes.load(write(tmp_path, recipe.to_yaml())) == recipe


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_line_is_what_its_pass_prints(name: str) -> None:
    built = recipes.load(name).build()
    assert passes.from_config([one.to_config() for one in built]) == built


def test_a_file_may_leave_out_its_name_and_the_options(tmp_path: Path) -> None:
    recipe = recipes.load(write(tmp_path, "passes: [calibrate, {quantize: }, {prune: {pattern: 2:4}}, fuse]"))
    assert recipe.name == "mine"
    assert recipe.build() == [Calibrate(), Quantize(), Prune("2:4"), Fuse()]


def test_numbers_are_what_they_look_like(tmp_path: Path) -> None:
    """YAML 1.1 would read 2:4 as 124, 010 as 8, 1e-2 as text and no as false."""
    text = "passes: [{p: {a: 2:4, b: 010, c: 1e-2, d: no, e: null, f: -3, g: .5, h: true, i: '4'}}]"
    (entry,) = recipes.load(write(tmp_path, text)).passes
    assert entry == {
        "p": {"a": "2:4", "b": 10, "c": 0.01, "d": "no", "e": None, "f": -3, "g": 0.5, "h": True, "i": "4"}
    }


class TestOverride:
    def test_changes_one_option_and_keeps_the_rest(self) -> None:
        recipe = recipes.load("slim-w4-2x4").override(["quantize.bits=3", "low_rank.bits=null", "prune.pattern=0.5"])
        _, quantize, prune, low_rank, _ = recipe.build()
        assert quantize == Quantize(method="slim", bits=3)
        assert prune == Prune(0.5)
        assert isinstance(low_rank, LowRank)
        assert low_rank.bits is None
        assert recipes.load("slim-w4-2x4").build()[1] == Quantize(method="slim", bits=4)

    @pytest.mark.parametrize("setting", ["quantize.bits", "bits=3", "quantize.bits.deep=3", "", "=", "a b.c=1"])
    def test_refuses_what_is_no_setting(self, setting: str) -> None:
        with pytest.raises(RecipeError, match=r"write PASS\.OPTION=VALUE, for example quantize\.bits=3"):
            recipes.load("rtn-w4").override([setting])

    def test_names_the_closest_pass(self) -> None:
        with pytest.raises(RecipeError, match=r"no pass 'quantise' to change \(did you mean 'quantize'\?\)"):
            recipes.load("rtn-w4").override(["quantise.bits=3"])

    def test_names_the_closest_option(self) -> None:
        with pytest.raises(RecipeError, match=r"no option 'bit' \(did you mean 'bits'\?\)"):
            recipes.load("rtn-w4").override(["quantize.bit=3"]).build()

    def test_refuses_a_value_that_is_no_yaml(self) -> None:
        with pytest.raises(RecipeError, match=r"value of quantize\.bits.*not valid YAML"):
            recipes.load("rtn-w4").override(["quantize.bits=[3"])


class TestExtends:
    def test_changes_the_options_of_inherited_passes(self, tmp_path: Path) -> None:
        text = "extends: slim-w4-2x4\ndescription: mine\npasses: [{quantize: {bits: 3}}]\nexclude: ['*.0.*']"
        recipe = recipes.load(write(tmp_path, text))
        assert (recipe.name, recipe.description, recipe.exclude) == ("mine", "mine", ["*.0.*"])
        assert recipe.passes == recipes.load("slim-w4-2x4").override(["quantize.bits=3"]).passes

    def test_a_file_beside_it_and_added_patterns(self, tmp_path: Path) -> None:
        write(tmp_path, "passes: [quantize, fuse]\nexclude: [a]\ninclude: [b]\ndescription: base", "base.yml")
        recipe = recipes.load(write(tmp_path, "extends: base.yml\nexclude: [c]"))
        assert (recipe.exclude, recipe.include, recipe.description) == (["a", "c"], ["b"], "base")
        assert recipe.build() == [Quantize(), Fuse()]

    def test_a_circle(self, tmp_path: Path) -> None:
        write(tmp_path, "extends: b.yaml", "a.yaml")
        write(tmp_path, "extends: a.yaml", "b.yaml")
        with pytest.raises(RecipeError, match="is it a circle"):
            recipes.load(tmp_path / "a.yaml")

    def test_a_pass_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match="there is no pass 'prune' to change.*write the whole list"):
            recipes.load(write(tmp_path, "extends: rtn-w4\npasses: [{prune: {pattern: 0.5}}]"))

    def test_a_pass_that_is_there_twice(self, tmp_path: Path) -> None:
        write(tmp_path, "passes: [quantize, prune, quantize]", "base.yaml")
        with pytest.raises(RecipeError, match="'quantize' stands there 2 times"):
            recipes.load(write(tmp_path, "extends: base.yaml\npasses: [{quantize: {bits: 3}}]"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pases: [fuse]", r"unknown key 'pases' \(did you mean 'passes'\?\)"),
        ("name: x", "has no 'passes' list"),
        ("passes: []", "passes: List should have at least 1 item"),
        ("passes: fuse", "passes: Input should be a valid list"),
        ("passes: [{quantize: {}, fuse: {}}]", "each entry names one pass"),
        ("passes: [3]", r"passes\.0: "),
        ("passes: [fuse]\nexclude: '*'", "exclude: Input should be a valid list"),
        ("passes: [fuse]\nname: 3", "name: Input should be a valid string"),
        ("extends: [rtn-w4]", "'extends' takes one recipe's name"),
        ("extends: rtn-w", r"there is no recipe 'rtn-w' \(did you mean 'rtn-w4'\?\)"),
        ("extends: rtn-w4\npasses: [{quantize: 3}]", "takes options as a mapping"),
        ("- fuse", "must be a mapping with the keys .*; found list"),
        ("", "is empty; 'slimc recipes joint-w4-2x4' prints one"),
        ("# nothing", "is empty"),
        ("passes: [fuse", "line 1: not valid YAML"),
        ("passes: [fuse]\npasses: [quantize]", "line 2: not valid YAML: 'passes' stands there twice"),
        ("passes: [fuse]\n? [a, b]\n: c", "a key must be a plain word"),
        ("passes: &x [fuse]\nexclude: *x", r"aliases \(\*name\) are not allowed"),
        ("passes: !!python/object/apply:os.system ['true']", "not valid YAML: could not determine a constructor"),
        ("passes: " + "[" * 10_000, "nested too deeply"),
        ("passes: [fuse]\nname: \x00", "not valid YAML"),
        ("passes: [{p: {a: " + "9" * 5_000 + "}}]", "not valid YAML"),
        ("# " + "x" * 2**20, "larger than 1024 KiB"),
    ],
)
def test_a_bad_file_is_refused_with_its_reason(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(RecipeError, match=message):
        recipes.load(path)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"passes: \xff\xfe")
    with pytest.raises(RecipeError, match="is not UTF-8 text"):
        recipes.load(path)


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    message = r"no recipe 'slim-w4-24' \(did you mean 'slim-w4-2x4'\?\); presets: joint-w4-2x4, "
    with pytest.raises(RecipeError, match=message):
        recipes.load("slim-w4-24")
    with pytest.raises(RecipeError, match="there is no recipe file"):
        recipes.load(tmp_path / "other.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("passes: [quantize, prune]", r"recipe 'mine': prune needs calibrate before it"),
        ("passes: [{quantise: {bits: 4}}]", r"recipe 'mine': .*no pass 'quantise' \(did you mean 'quantize'\?\)"),
        ("passes: [{quantize: {bits: 99}}]", "recipe 'mine': quantize: "),
        ("passes: [fuse, quantize]", "recipe 'mine': .*fuse"),
    ],
)
def test_passes_that_cannot_be_built_name_the_recipe(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        recipes.load(write(tmp_path, text)).build()


@given(st.text(max_size=50) | st.text(alphabet="passes: [{}]-\n&*!?|>#'\"0.,", max_size=100))
def test_no_text_does_anything_but_load_or_be_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("recipe") / "mine.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    with contextlib.suppress(RecipeError):
        recipes.load(path)

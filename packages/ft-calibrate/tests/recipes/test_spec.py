import pytest
from ft_calibrate.recipes.spec import RECIPES, parse_recipe, recipe_names, recipe_rows
from hypothesis import given
from hypothesis import strategies as st
from vfm_core.errors import UserError

FREE = ["seen-loss", "bn-frozen", "l2sp", "distill", "distill-absent", "swa", "wise", "source-ensemble", "lolsgd"]


def test_every_recipe_of_the_papers_and_the_baselines_is_there():
    assert set(recipe_names()) == {
        *("ft", "lp", "frozen-head", "lp-ft", "bn-frozen", "cosine-head", "seen-loss", "wise", "swa", "ema", "l2sp"),
        *("distill", "distill-absent", "rank", "lolsgd", "oracle-ft", "source-ensemble", "bit-fit", "lora"),
    }
    for row in recipe_rows():
        assert row["what"] and any(word in row["from"] for word in ("FTC", "HT", "common baseline", "ours"))


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_name_alone_takes_the_defaults(name):
    recipe = parse_recipe(name)
    assert recipe.parts == {name: {k: o.default for k, o in RECIPES[name].options.items()}}
    assert recipe.text == name and name in recipe


def test_options_by_place_and_by_name():
    assert parse_recipe("wise:0.25")["wise"] == {"a": 0.25}
    assert parse_recipe("distill:T=4,lambda=1e+1+rank:lambda=.5").parts == {
        "distill": {"T": 4.0, "lambda": 10.0},
        "rank": {"lambda": 0.5},
    }
    recipe = parse_recipe(" lolsgd:M=2 , E=3 + distill ")
    assert recipe["lolsgd"] == {"M": 2, "E": 3, "rho": 0.3, "T": None} and recipe.scheme == "ft"
    assert parse_recipe("source-ensemble:logit")["source-ensemble"] == {"mean": "logit"}
    assert parse_recipe("frozen-head+distill+rank").scheme == "frozen-head"


def test_options_as_arguments():
    recipe = parse_recipe("lolsgd+distill", {"M": 2, "distill__T": 3, "lambda_": 0.5})
    assert recipe["lolsgd"]["M"] == 2 and recipe["distill"] == {"T": 3.0, "lambda": 0.5}
    assert parse_recipe("distill-absent", {"distill_absent__T": 3})["distill-absent"]["T"] == 3


@given(st.lists(st.sampled_from(FREE), min_size=1, unique=True), st.floats(0, 1), st.integers(1, 99))
def test_the_canonical_text_parses_to_the_same_recipe(names, share, number):
    values = {"wise": f"a={share}", "swa": f"start={share}", "lolsgd": f"M={number},rho={share}", "l2sp": f"{number}"}
    text = "+".join(f"{n}:{values[n]}" if n in values else n for n in names)
    recipe = parse_recipe(text)
    again = parse_recipe(recipe.text)
    assert list(again.parts) == names
    for name in names:
        assert again[name] == recipe[name], "not even the last digit is lost"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fft", r"unknown recipe: 'fft'; did you mean"),
        ("lolsgd+distil", r"unknown recipe in 'lolsgd\+distil': 'distil'; did you mean distill"),
        ("", "empty part"),
        ("ft++rank", "empty part"),
        ("ft+ft", "names a part twice"),
        ("ft:0.5", "a part without options"),
        ("wise:b=1", "unknown option of wise"),
        ("wise:2", "a out of range.*from 0 to 1"),
        ("wise:x", "a out of range"),
        ("wise:nan", "a out of range"),
        ("lolsgd:M=2.5", "M out of range.*whole number"),
        ("lolsgd:M=1,M=2", "option given twice"),
        ("distill:2,3", "unknown option of distill"),
        ("source-ensemble:max", "unknown mean.*softmax"),
        ("lp+frozen-head", "exclude each other"),
        ("swa+ema", "two averages"),
        ("lp+rank", "features that do not move"),
        ("frozen-head+cosine-head", "new head that is not trained"),
        ("lora+l2sp", "drop l2sp"),
    ],
)
def test_what_cannot_be_is_told(text, message):
    with pytest.raises(UserError, match=message):
        parse_recipe(text)


def test_options_without_an_owner_or_with_two():
    with pytest.raises(UserError, match=r"unknown option.*'Q'"):
        parse_recipe("distill", {"Q": 1})
    with pytest.raises(UserError, match=r"option of several parts.*lolsgd__T"):
        parse_recipe("lolsgd+distill", {"T": 1})
    with pytest.raises(UserError, match="unknown option"):
        parse_recipe("ft", {"lambda_": 1})

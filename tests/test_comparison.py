"""Two arms are set side by side in one place: it prints the committed tables to the character, from
the numbers beside them."""
import json
from pathlib import Path

import pandas as pd
import pytest

from unloc.comparison import Comparison, compare, compare_each, counted, sifted
from unloc.levels import PAIR
from unloc.statistics import Paired, Undefined

FIGURES = Path(__file__).resolve().parents[1] / "figures"
PROFILES = "tiny", "tofu-20"
MARGINS = {"AUES": (.02, 3), "MU95": (1., 2)}  # and digits
TESTS = ["difference [95 %]", "p", "p Holm", "p TOST", "verdict", "detectable"]
FEW = "fewer than three pairs at the level; take more seeds, longer runs or another level"


def stored(profile, name):
    about = json.loads((FIGURES / profile / f"{name}.json").read_text("utf-8"))
    data = pd.read_csv(FIGURES / profile / f"{name}_data.csv")
    return pd.DataFrame(about["rows"]), data, about

@pytest.mark.parametrize("profile", PROFILES)
def test_table_2_is_printed_to_the_character(profile):
    printed, data, about = stored(profile, "table2_oracle_random")
    columns = ["Random", "Oracle", "|difference|", *TESTS]
    for metric, (margin, digits) in MARGINS.items():
        found = compare(data, ["arch", "objective"], metric, margin)
        rows = printed[printed.metric == metric]
        assert found.table(digits)[columns].values.tolist() == rows[columns].values.tolist()
        assert found.verdicts == about["verdicts"][metric] and len(rows) >= 4

@pytest.mark.parametrize("profile", PROFILES)
def test_table_3_is_printed_to_the_character(profile):
    printed, data, about = stored(profile, "table3_recovery")
    by = ["arch", "objective", "attack"]
    ends, areas = (
        compare(data, by, outcome, about["margin"], where="met").table(2, few=FEW)
        for outcome in ("recovered", "area"))
    columns = ["pairs", "Random", "Oracle", *TESTS]
    assert ends[columns].values.tolist() == printed[columns].values.tolist()
    for name in ("difference [95 %]", "p Holm", "detectable"):
        assert areas[name].tolist() == printed[f"area, {name}"].tolist()
    for arm in PAIR:
        back = counted(data[(data.arm == arm) & data.met], by, "resurfaced", "forgotten")
        assert back.tolist() == printed[f"back, {arm}"].tolist()

@pytest.mark.parametrize("profile", PROFILES)
def test_arms_against_oracle_are_printed_to_the_character(profile):
    printed, data, _ = stored(profile, "table4_arms")
    against = {arm: "Oracle" for arm in data.arm.unique() if arm != "Oracle"}
    for metric, (margin, digits) in MARGINS.items():
        found = compare_each(data, ["arch", "objective"], metric, margin, against).table(
            digits, TESTS)
        rows = printed[(printed.metric == metric) & (printed.arm != "Oracle")]
        assert found[["arm", *TESTS]].values.tolist() == rows[["arm", *TESTS]].values.tolist()
        assert len(rows)

# --- pairs

def runs(**more):
    return pd.DataFrame(
        {
            "arch": "llama",
            "seed": [*range(4)] * 2,
            "arm": [PAIR[0]] * 4 + [PAIR[1]] * 4,
            "AUES": [.3, .5, .4, .2, .1, .5, .3, .3]}
        | more)

def test_a_pair_is_named_by_any_columns():
    levels = pd.concat([runs().assign(base=base) for base in range(2)])
    with pytest.raises(ValueError, match="two rows of seed 0, arm Oracle"):
        compare(levels, ["arch"], "AUES", .02)
    test, = compare(levels, ["arch"], "AUES", .02, pair=["base", "seed"]).tests.values()
    assert isinstance(test, Paired) and test.n == 8

def test_the_order_of_the_rows_changes_nothing():
    shuffled = runs().sample(frac=1, random_state=0)
    assert (
        compare(shuffled, ["arch"], "AUES", .02).tests
        == compare(runs(), ["arch"], "AUES", .02).tests)

def test_what_was_never_measured_keeps_its_row():
    asked = pd.concat([runs(), runs().assign(arch="olmo2")])
    found = compare(runs(), ["arch"], "AUES", .02, expected=asked)
    assert found.tests["olmo2",] == Undefined(
        0, "0 of 4 pairs have both values, expected at least 3")
    assert found.p_holm.keys() == {("llama",)}
    assert found.table().verdict.tolist() == [found.tests["llama",].verdict, "–"]

def test_a_run_counts_only_where_it_met_the_level():
    found = compare(runs(met=[True] * 7 + [False]), ["arch"], "AUES", .02, where="met")
    assert found.tests["llama",].n == 3

def test_two_comparisons_become_one_family():
    one, two = (
        compare(runs().assign(arch=arch), ["arch"], "AUES", .02) for arch in ("llama", "olmo2"))
    whole = compare(pd.concat([runs(), runs().assign(arch="olmo2")]), ["arch"], "AUES", .02)
    assert (one + two).p_holm == whole.p_holm and isinstance(one + two, Comparison)
    other = compare(runs().assign(level=0), ["arch", "level"], "AUES", .02)
    with pytest.raises(ValueError, match="expected the same groups"): one + other

def test_a_table_whose_attacks_are_all_unfit_has_columns_and_no_row():
    arms = [(arm, seed) for arm in (*PAIR, "Restore") for seed in range(3)]
    frame = pd.DataFrame(arms, columns=["arm", "seed"]).assign(
        arch="llama", attack="relearn", recovered=.1, area=.1, met=True)
    fit, _, _ = sifted(frame, ["arch", "attack"])
    none, areas, told = sifted(frame, ["arch", "attack"], least=.5)
    assert (len(fit.table()), len(none.table()), len(areas.table())) == (1, 0, 0)
    assert [*none.table()] == [*fit.table()] and [*none.table(columns=["p"])][2:] == ["p"]
    assert [row["of Restore"] for row in told["unfit"]] == ["0.10"]

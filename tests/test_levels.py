"""Effects keep their size and coverage over bases, the model of nested levels is the closed form,
and a word, a base or a pair is never lost without a reason."""
import warnings

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from unloc.figures import forest, markdown_table
from unloc.levels import (
    DASH, LEVELS, UNDECIDED, WITHHELD, Effect, Excluded, Rule, _restricted, admit, base_means,
    claim_table, doubts, effect_table, effects, excluded_table, family, nested, over_bases)

WORDS = "Oracle ahead", "Random ahead", "no difference beyond ±0.02"


@pytest.fixture
def rng(): return np.random.default_rng(20)

def planted(rng, shape, sd, effect=0., draws=()): # [*draws, bases, injections, repeats]
    bases, injections, repeats = shape
    one = rng.normal(size=(*draws, bases, 1, 1))
    two = rng.normal(size=(*draws, bases, injections, 1))
    return effect + sd[0] * one + sd[1] * two + sd[2] * rng.normal(size=(*draws, *shape))

def as_pairs(differences):
    places = pd.MultiIndex.from_product(map(range, differences.shape), names=LEVELS)
    return pd.DataFrame({"Oracle": .5 + differences.ravel(), "Random": .5}, places)

def as_runs(differences, **names):
    wide = as_pairs(differences).reset_index()
    return wide.melt(list(LEVELS), var_name="arm", value_name="AUES").assign(**names)

def uneven(rng, sd, effect=0., bases=5): # 1 to 8 injections, 1 to 3 repeats
    pairs = as_pairs(planted(rng, (bases, 8, 3), sd, effect))
    injections, repeats = rng.integers(1, 9, bases), rng.integers(1, 4, (bases, 8))
    base, injection, repeat = (pairs.index.get_level_values(name) for name in LEVELS)
    return pairs[(injection < injections[base]) & (repeat < repeats[base, injection])]

def codes(pairs): # difference and injection of each pair, base of each injection
    injection, places = pd.factorize(pairs.index.droplevel("repeat"))
    return (pairs.Oracle - pairs.Random).to_numpy(), injection, np.array([p[0] for p in places])

def simple(y): # [draws, bases, injections, repeats] -> mean, error and df over means of bases
    means = y.mean(axis=(-1, -2))
    return means.mean(-1), means.std(-1, ddof=1) / np.sqrt(y.shape[-3]), y.shape[-3] - 1

def closed(y): # the same -> mean, its error, variances of base, injection and repeat [3, draws]
    """REML of balanced nested levels: mean squares, pooled with the next where they are not in
    order (Thompson 1962)"""
    bases, injections, repeats = y.shape[-3:]
    one, two = y.mean((-1, -2), keepdims=True), y.mean(-1, keepdims=True)
    sums = np.array([
        ((y - two)**2).sum((-1, -2, -3)), repeats * ((two - one)**2).sum((-1, -2, -3)),
        injections * repeats * ((one - y.mean((-1, -2, -3), keepdims=True))**2).sum((-1, -2, -3))])
    free = np.array([
        bases * injections * (repeats - 1), bases * (injections - 1), bases - 1], float)
    def mean_square(i, j): return sums[i:j + 1].sum(0) / free[i:j + 1].sum()
    ms = [np.max([np.min([mean_square(i, j) for j in range(k, 3)], 0) for i in range(k + 1)], 0)
        for k in range(3)]
    parts = (ms[2] - ms[1]) / injections / repeats, (ms[1] - ms[0]) / repeats, ms[0]
    return y.mean((-1, -2, -3)), np.sqrt(ms[2] / (bases * injections * repeats)), np.array(parts)

def covers(mean, error, df, effect): # share of intervals that hold the effect
    return np.mean(abs(mean - effect) <= stats.t.ppf(.975, df) * error)


# --- two ways to the effect

SPREADS = [
    (.03, .02, .01), (0., .02, .01), (.03, 0., .01), (0., 0., .01), (.03, .02, 1e-6),
    (.03, .02, 3e-11), (.03, 1e-5, 1e-9)]

@pytest.mark.parametrize("sd", SPREADS)
@pytest.mark.parametrize("shape", [(3, 2, 2), (5, 4, 2), (12, 8, 3)])
def test_the_simple_way_is_scipys_and_the_model_is_the_closed_form(rng, shape, sd):
    for _ in range(3):
        y = planted(rng, shape, sd, .02)
        pairs = as_pairs(y)
        found, model = over_bases(pairs, .02), nested(pairs)
        test = stats.ttest_1samp(y.mean((1, 2)), 0)
        assert found.p_difference == pytest.approx(test.pvalue, rel=1e-6)
        assert found.interval95 == pytest.approx(tuple(test.confidence_interval(.95)), rel=1e-6)
        mean, error, variances = closed(y)
        assert (model.estimate, model.error) == pytest.approx((mean, error), rel=1e-5)
        assert [sd**2 for sd in model.spread.values()] == pytest.approx(
            variances, rel=1e-4, abs=1e-6 * variances.sum())
        assert model.df == found.n - 1 and sum(model.share.values()) == pytest.approx(1)
        reach = stats.t.ppf(.975, model.df) * error
        assert model.interval95 == pytest.approx((mean - reach, mean + reach), rel=1e-4)

def test_the_restricted_likelihood_is_that_of_the_whole_covariance(rng):
    pairs, costs = uneven(rng, (.03, .02, .01)), []
    d, injection, base = codes(pairs)
    for ratios in rng.exponential(2, (6, 2)):
        same_base = base[injection][:, None] == base[injection]
        v = np.eye(len(d)) + ratios[0] * (injection[:, None] == injection) + ratios[1] * same_base
        w, one = np.linalg.inv(v), np.ones(len(d))
        mean = one @ w @ d / (one @ w @ one)
        rest = (d - mean) @ w @ (d - mean) / (len(d) - 1)
        dense = (
            (len(d) - 1) * np.log(rest) + np.linalg.slogdet(v)[1] + np.log(one @ w @ one))
        cost, estimate, error, variance = _restricted(tuple(ratios), d, injection, base)
        assert (estimate, variance) == pytest.approx((mean, rest))
        assert error == pytest.approx(np.sqrt(rest / (one @ w @ one)))
        costs.append(cost - dense)
    assert np.ptp(costs) < 1e-8

def test_the_model_is_that_of_statsmodels_where_spreads_are_of_one_size(rng):
    from statsmodels.regression.mixed_linear_model import MixedLM
    pairs = uneven(rng, (.03, .03, .02), .02, 8)
    frame = pairs.reset_index().assign(d=(pairs.Oracle - pairs.Random).to_numpy() / .03)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = MixedLM.from_formula("d ~ 1", groups="base", re_formula="1",
            vc_formula={"injection": "0 + C(injection)"}, data=frame).fit(reml=True)
    ours = nested(pairs)
    of_base, of_injection, rest = theirs.cov_re.iloc[0, 0], theirs.vcomp[0], theirs.scale
    assert ours.estimate == pytest.approx(.03 * theirs.params["Intercept"], rel=5e-3)
    assert ours.error == pytest.approx(.03 * theirs.bse["Intercept"], rel=5e-3)
    assert list(ours.spread.values()) == pytest.approx(
        .03 * np.sqrt([of_base, of_injection, rest]), rel=.02)
    data = codes(pairs) # and ours is at least as likely
    base, injection, repeat = (sd**2 for sd in ours.spread.values())
    assert _restricted((injection / repeat, base / repeat), *data)[0] <= 1e-6 + _restricted(
        (of_injection / rest, of_base / rest), *data)[0]

def test_the_model_has_the_names_of_what_it_can_tell_apart(rng):
    y = planted(rng, (4, 3, 2), (.03, .02, .01))
    for part, names in (
        (y, [*LEVELS]), (y[:, :, :1], ["base", "injection + repeat"]),
        (y[:, :1], ["base + injection", "repeat"]), (y[:, :1, :1], ["base + injection + repeat"])):
        model = nested(as_pairs(part))
        assert [*model.spread] == [*model.share] == names
        assert model.interval95 == pytest.approx(over_bases(as_pairs(part), 1).interval95) or (
            model.spread[names[0]] == 0)

def test_repeats_to_the_bit_and_equal_differences_have_answers(rng):
    y = np.repeat(planted(rng, (5, 3, 1), (.03, .02, 0.), .02), 2, axis=2)
    model, once = nested(as_pairs(y)), nested(as_pairs(y[:, :, :1]))
    assert model.spread["repeat"] < 1e-6 * model.spread["base"]
    assert (model.estimate, model.error) == pytest.approx((once.estimate, once.error), rel=1e-4)
    assert model.spread["injection"] == pytest.approx(once.spread["injection + repeat"], rel=1e-4)
    flat = nested(as_pairs(np.full((4, 2, 2), .25)))
    assert (flat.estimate, flat.error, flat.interval95, flat.p) == (.25, 0, (.25, .25), 0)
    assert nested(as_pairs(np.zeros((4, 2, 2)))).p == 1

def test_units_order_and_names_do_not_matter(rng):
    pairs = uneven(rng, (.03, .02, .01), .02)
    model, test = nested(pairs), over_bases(pairs, .02)
    def alike(other, scale=1., sign=1.):
        found, again = nested(other), over_bases(other, .02 * scale)
        assert found.estimate == pytest.approx(sign * scale * model.estimate, rel=1e-5)
        assert found.error == pytest.approx(scale * model.error, rel=1e-4)
        assert again.difference == pytest.approx(sign * scale * test.difference)
        assert (again.p_difference, again.verdict) == (
            pytest.approx(test.p_difference), test.verdict)
    alike(pairs.sample(frac=1, random_state=0))
    alike(pairs * 1000, 1000)
    alike(pairs + 7)
    alike(pairs[["Random", "Oracle"]], sign=-1)
    alike(pairs.rename(lambda base: f"b{9 - base}", level="base"))


# --- size, coverage and power

@pytest.mark.parametrize("sd", [(0., .02, .01), (.01, .02, .01), (.03, .02, .01)])
@pytest.mark.parametrize("bases", [3, 5, 12])
def test_size_and_coverage(rng, bases, sd):
    """5 % of true nulls are rejected and 95 % of intervals cover; the model's interval, with the
    degrees of freedom of bases, covers at least about as often."""
    y = planted(rng, (bases, 4, 2), sd, .02, draws=(6000,))
    mean, error, df = simple(y)
    assert covers(mean, error, df, .02) == pytest.approx(.95, abs=.012)
    p = 2 * stats.t.sf(abs(mean - .02) / error, df)
    assert (p < .05).mean() == pytest.approx(.05, abs=.012)
    mean, error, _ = closed(y)
    assert covers(mean, error, df, .02) > .938

def test_pairs_taken_as_independent_are_too_narrow_when_bases_vary(rng):
    def coverage(sd): # of an interval over all injections
        y = planted(rng, (5, 4, 2), sd, .02, draws=(4000,)).mean(-1).reshape(4000, 20)
        return covers(y.mean(1), y.std(1, ddof=1) / np.sqrt(20), 19, .02)
    assert coverage((.03, .02, .01)) < .75
    assert coverage((0., .02, .01)) == pytest.approx(.95, abs=.015)

def test_uneven_pairs_keep_their_coverage(rng):
    sd = .02, .02, .01
    found = [uneven(rng, sd, .02) for _ in range(150)]
    tests, models = [over_bases(pairs, .02) for pairs in found], [nested(p) for p in found]
    for some in (tests, models):
        inside = [one.interval95[0] <= .02 <= one.interval95[1] for one in some]
        assert np.mean(inside) > .90

@pytest.mark.parametrize("bases", [3, 5, 12])
def test_a_planted_effect_is_found_with_the_power_that_is_promised(rng, bases):
    shape, sd = (bases, 4, 2), (.03, .02, .01)
    of_base = np.sqrt(sd[0]**2 + sd[1]**2 / 4 + sd[2]**2 / 8)
    y = planted(rng, shape, sd)
    found = over_bases(as_pairs(y), .02)
    one = found.smallest_detectable / found.sd_difference * of_base # at the true spread
    mean, error, df = simple(planted(rng, shape, sd, one, draws=(6000,)))
    found = (abs(mean) > stats.t.ppf(.975, df) * error).mean()
    assert found == pytest.approx(.8, abs=.02)

def test_few_words_are_printed_where_nothing_is_planted(rng):
    runs = [as_runs(planted(rng, (5, 3, 2), (.04, .03, .02)), draw=k) for k in range(150)]
    found = effects(pd.concat(runs), "AUES", "draw", margin=.02)
    said = [one.word for one in found]
    printed = [one.verdict for one in found if one.verdict.endswith("ahead")]
    assert .5 < said.count(UNDECIDED) / 150 < .999
    assert len(printed) <= sum(word.endswith("ahead") for word in said) <= .12 * 150
    assert len(printed) < .05 * 150


# --- the rule of a word

def by_repeat(first, second): # means of bases in each of two repeats
    return as_pairs(np.stack([first, second], axis=1)[:, None])

FIRM = [.050, .060, .040, .055, .065]
@pytest.mark.parametrize("pairs,word,why", [
    (by_repeat(FIRM, FIRM), WORDS[0], []),
    (by_repeat(np.negative(FIRM), np.negative(FIRM)), WORDS[1], []),
    (by_repeat([.001, -.002, .003, .0, .001], [.001, -.001, .0, .002, .0]), WORDS[2], []),
    (by_repeat([.008, .007, .008, .009, .007], [.008, .007, .008, .009, .007]), WORDS[2], []),
    (by_repeat([.05, -.04, .01, .06, .0], [.05, -.04, .01, .06, .0]), UNDECIDED, []),
    (by_repeat(FIRM, [.05, -.02, .06, .03, .00]), WORDS[0], ["repeat 1 alone: undecided"]),
    (by_repeat([.06, .02, .025, .03, .004], [.06, .02, .025, .03, .004]), WORDS[0], [
        "without base 1, 2, 3: undecided"]),
    (by_repeat(FIRM, FIRM).query("base < 3"), WORDS[0], ["bases: 3, a word needs 4"]),
    (by_repeat(FIRM, FIRM).query("repeat == 1"), WORDS[0], [
        "repeats on three bases: 1, a word needs 2"]),
    (by_repeat(FIRM, FIRM).query("repeat == 0 or base < 2"), WORDS[0], [
        "repeats on three bases: 1, a word needs 2"]),
    (by_repeat(FIRM, FIRM).query("base < 2"), UNDECIDED, []),
])
def test_a_word_holds_in_each_repeat_and_without_any_base(pairs, word, why):
    one = Effect((), (), "AUES", ("Oracle", "Random"), .02, pairs)
    assert one.words == WORDS and one.word == word and one.withheld == why
    printed = DASH if not one.test else WITHHELD if why else word
    assert one.verdict == printed

def test_the_arm_with_less_can_be_ahead():
    pairs = by_repeat(FIRM, FIRM)
    one = Effect((), (), "recovered", ("Oracle", "Random"), .02, pairs, lower_is_better=True)
    assert one.verdict == "Random ahead"

@pytest.mark.parametrize("wrong", [{"bases": 3}, {"repeats": 0}, {"bases": 4.5}])
def test_a_rule_cannot_be_bent_too_far(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .*expected a whole number"):
        Rule(**wrong)

def test_a_stricter_rule_withholds_more():
    pairs = by_repeat(FIRM, FIRM)
    assert doubts(pairs, .02, WORDS, Rule(bases=6)) == ["bases: 5, a word needs 6"]
    assert doubts(pairs.query("repeat == 0"), .02, WORDS, Rule(repeats=1)) == []


# --- what is left out

@pytest.fixture
def bases():
    frame = pd.DataFrame([(b, i, arm) for b in range(4) for i in (0, 1) for arm in "OR"],
        columns=["base", "injection", "arm"])
    return frame.assign(RS=.95, FS=.05)

def test_what_passes_is_untouched(bases):
    kept, lines = admit(bases.assign(RS=.9, FS=.2), rs="RS", fs="FS", tuning=[7])
    assert len(kept) == len(bases) and lines == []

def test_each_unit_is_named_with_its_rule_and_value(bases):
    bases.loc[bases.base == 1, "RS"] = .899
    bases.loc[(bases.base == 2) & (bases.injection == 1), "FS"] = .201
    bases.loc[bases.base == 3, "RS"] = np.nan
    kept, lines = admit(bases, tuning=[0], rs="RS", fs="FS")
    assert kept[["base", "injection"]].drop_duplicates().to_numpy().tolist() == [[2, 0]]
    assert [tuple(line) for line in lines] == [
        ("base 0", "a base is for tuning or for comparing", "used for tuning"),
        ("base 1", "RS of the retained model of at least 0.9", "0.899"),
        ("base 3", "RS of the retained model of at least 0.9", DASH),
        ("base 2, injection 1", "FS of the original model of at most 0.2", "0.201")]
    lax, lines = admit(bases, rs="RS", fs="FS", least_rs=.8, most_fs=.3)
    assert len(lax) == 12 and [line.what for line in lines] == ["base 3"]

def test_a_base_of_one_architecture_is_not_that_of_another(bases):
    both = pd.concat([bases.assign(arch="llama"), bases.assign(arch="olmo2", RS=.5)])
    kept, lines = admit(both, rs="RS", within=["arch"])
    assert set(kept.arch) == {"llama"} and len(kept) == len(bases)
    assert [line.what for line in lines] == [f"arch olmo2, base {b}" for b in range(4)]

def test_pairs_that_lost_an_arm_are_named_by_base(rng):
    runs = as_runs(planted(rng, (5, 2, 2), (.01, .01, .01), .05), objective="npo")
    random = runs.arm == "Random"
    runs.loc[random & (runs.base == 1) & (runs.injection == 0), "AUES"] = np.inf
    runs = runs[~(random & (runs.base == 2)) & (runs.base != 3)]
    other = as_runs(planted(rng, (5, 2, 2), (.01, .01, .01), .05), objective="wga")
    npo, wga = effects(pd.concat([runs, other]), "AUES", "objective", margin=.02)
    assert [tuple(line) for line in npo.excluded] == [
        ("npo, base 1", "a pair counts where both arms have a value",
            "without Random in 2 of 4 pairs"),
        ("npo, base 2", "a pair counts where both arms have a value",
            "without Random in 4 of 4 pairs"),
        ("npo, base 3", "a pair counts where both arms have a value", "no run"),
        ("npo, all bases", "every base has as many pairs", "2 to 4; kept, a base counts once"),
        ("npo, all bases", "a word needs 4 bases", "3")]
    assert wga.excluded == () and len(wga.pairs) == 20 and [*npo.bases.index] == [0, 1, 4]
    table = excluded_table([Excluded("base 9", "rule", "value")], [npo, wga], [npo])
    assert len(table) == 6 and table.what[0] == "base 9"
    assert excluded_table([wga]).values.tolist() == [["nothing", DASH, DASH]]

def test_a_group_without_a_pair_keeps_its_row(rng):
    runs = as_runs(planted(rng, (4, 2, 2), (.01, .01, .01)), objective="npo")
    lone = runs[runs.arm == "Oracle"].assign(objective="wga")
    found = effects(pd.concat([runs, lone]), "AUES", "objective", margin=.02)
    assert found[1].test.reason == found[1].model.reason == "0 bases, expected at least 3"
    row = effect_table(found).iloc[1]
    assert (row.verdict, row["effect [95 %]"], row.withheld, row.pairs) == (
        DASH, DASH, "0 bases, expected at least 3", "0")
    assert excluded_table(found).value.tolist()[:4] == ["without Random in 4 of 4 pairs"] * 4
    forest(found)

@pytest.mark.parametrize("change,message", [
    (lambda f: f.drop(columns="repeat"), "no column 'repeat'"),
    (lambda f: f.drop(columns="AUES"), "no column 'AUES'"),
    (lambda f: pd.concat([f, f.iloc[:1]]), "two rows of base 0, injection 0, repeat 0, arm"),
    (lambda f: f.assign(base=f.base.where(f.base > 0)), "'base' is empty in 8 of 32 rows"),
    (lambda f: f[f.arm == "Oracle"], "expected two different values of column 'arm'"),
])
def test_what_would_change_an_average_is_refused(rng, change, message):
    runs = as_runs(planted(rng, (4, 2, 2), (.01, .01, .01)), objective="npo")
    with pytest.raises(ValueError, match=message):
        effects(change(runs), "AUES", ["objective"], margin=.02)


# --- effects, tables and claims

@pytest.fixture
def found(rng):
    parts = [
        as_runs(planted(rng, (6, 4, 2), (.01, .01, .005), .06), arch="llama", objective="wga"),
        as_runs(planted(rng, (6, 4, 2), (.06, .01, .005)), arch="llama", objective="npo"),
        as_runs(planted(rng, (3, 4, 2), (.01, .01, .005), .06), arch="olmo2", objective="wga")]
    return effects(pd.concat(parts), "AUES", ["arch", "objective"], margin=.02)

def test_groups_keep_their_order_and_the_base_is_the_unit(found):
    assert [one.key for one in found] == [("llama", "wga"), ("llama", "npo"), ("olmo2", "wga")]
    assert [one.test.n for one in found] == [6, 6, 3]
    for one in found:
        assert one.bases.mean() == pytest.approx(one.test.difference)
        assert [*base_means(one.pairs)] == ["Oracle", "Random"]

def test_the_order_of_rows_changes_no_effect(rng):
    runs = as_runs(planted(rng, (5, 3, 2), (.03, .01, .005)))
    one, = effects(runs, "AUES", [], margin=.02)
    other, = effects(runs.sample(frac=1, random_state=1), "AUES", [], margin=.02)
    assert one.key == () and other.test.difference == pytest.approx(one.test.difference)
    back, = effects(runs, "AUES", [], pair=("Random", "Oracle"), margin=.02)
    assert back.test.difference == pytest.approx(-one.test.difference)

def test_a_table_is_made_of_text_and_always_says_what_could_have_been_seen(found):
    table = effect_table(found)
    assert table.verdict.tolist() == ["Oracle ahead", UNDECIDED, WITHHELD]
    assert table.withheld.tolist() == ["", "", "Oracle ahead (bases: 3, a word needs 4)"]
    assert table.pairs.tolist() == ["48", "48", "24"] and [*table][:2] == ["arch", "objective"]
    for one, row in zip(found, table.to_dict("records")):
        low, high = one.test.interval95
        assert float(row["half width"]) == pytest.approx((high - low) / 2, abs=6e-4)
        assert float(row["detectable"]) == pytest.approx(one.test.smallest_detectable, abs=6e-4)
        assert row["effect [95 %]"] == f"{one.test.difference:+.3f} [{low:+.3f}, {high:+.3f}]"
        assert all(f"{level} " in row["spread"] for level in LEVELS)
    assert markdown_table(table.to_dict("records")).count("\n") == 4

def test_claims_of_all_pages_are_one_family(found):
    named = dict(zip("abc", found))
    p = [one.test.p_difference for one in found]
    assert [*family(named).values()] == pytest.approx(multipletests(p, method="holm")[1])
    p[1] = found[1].test.p_equivalence
    claimed = {"a": "Oracle ahead", "b": WORDS[2]}
    assert [*family(named, claimed).values()] == pytest.approx(multipletests(p, method="holm")[1])
    table = claim_table(named, claimed)
    assert table.holds.tolist() == ["yes", "no", "no"]
    assert table.says.tolist() == ["Oracle ahead", WORDS[2], "a difference"]
    assert claim_table({"a": found[0]}, {"a": "Random ahead"}).holds.tolist() == ["no"]

def test_a_claim_without_a_test_stays_in_the_table(found, rng):
    few, = effects(as_runs(planted(rng, (2, 2, 2), (.01, .01, .01))), "AUES", [], margin=.02)
    p = family({"a": found[0], "few": few})
    assert p["a"] == pytest.approx(found[0].test.p_difference) and np.isnan(p["few"])
    row = claim_table({"a": found[0], "few": few}).iloc[1]
    assert (row.p, row["p Holm"], row.verdict, row.holds) == (DASH, DASH, DASH, "no")
    assert np.isnan(family({"few": few})["few"])

@pytest.mark.parametrize("names,claimed,message", [
    ("ab", {"c": WORDS[0]}, "claimed 'c': expected one of a, b"),
    ("ab", {"a": "Oracle wins"}, "expected one of Oracle ahead, Random ahead, no difference"),
    ("aa", {}, "'a again' is a second name of a claim"),
])
def test_claims_that_nobody_made_are_refused(found, names, claimed, message):
    first, second = names
    other = f"{second} again" if second == first else second
    named = {first: found[0], other: found["ab".index(second)]}
    with pytest.raises(ValueError, match=message): family(named, claimed)

def test_a_forest_draws_what_the_table_says(found):
    import matplotlib.pyplot as plt
    figure = forest(found, "AUES")
    axis, = figure.axes
    dots = [one for one in axis.collections if len(one.get_offsets()) > 1]
    bars = [one.get_segments()[0] for one in axis.collections if hasattr(one, "get_segments")]
    for row, (one, drawn, bar) in enumerate(zip(found, dots, bars, strict=True)):
        assert sorted(drawn.get_offsets()[:, 0]) == pytest.approx(sorted(one.bases))
        assert bar.tolist() == [
            [pytest.approx(end), row] for end in one.test.interval95]
    assert [text.get_text() for text in axis.texts] == [
        "Oracle ahead", UNDECIDED, "(Oracle ahead)"]
    assert [text.get_color() for text in axis.texts] == ["black", "black", ".55"]
    assert [text.get_text() for text in axis.get_yticklabels()][0] == "Llama, WGA"
    plt.close("all")

def test_runs_that_only_measure_something_are_no_attack():
    import pandas
    from unloc.replicated import attack_claims
    shares = {"Oracle": .3, "Random": .5, "Restore": .7}
    rows = [{"objective": "npo", "arm": arm, "base": base, "injection": i, "met": True,
            "attack": attack, "recovered": share + .01 * base if attack == "again" else None}
        for arm, share in shares.items() for base in range(3) for i in range(2)
        for attack in ("again", None)]
    claims, out = attack_claims(pandas.DataFrame(rows), ["objective"], .05, .5, "again")
    assert out == [] and list(claims) == ["share recovered, npo"]
    assert claims["share recovered, npo"].test.difference == pytest.approx(-.2)
    claims, out = attack_claims(pandas.DataFrame(rows), ["objective"], .05, .8, "again")
    assert claims == {} and [one.what for one in out] == ["attack again"]

"""Each arm gets its own learning rate by one rule, on one grid; a rate at the edge is named, and a
rate whose runs never forget enough loses to any that does."""
import itertools, math

import numpy as np, pandas as pd, pytest

from unloc.levels import PAIR
from unloc.fronts import (
    AT_LEVEL, BELOW, at_level, choose_rates, front, grid_plot, rates_told)
from unloc.study import Study
from unloc.tradeoff import aues, area_up_to, retained_at

RATES = .25, .5, 1.

def one(arm, rate, fs, rs, objective="wga", seed=0):
    return pd.DataFrame({"epoch": range(len(fs)), "FS": fs, "RS": rs}).assign(
        objective=objective, arm=arm, rate=rate, seed=seed)

def line(arm, rate, fs, rs, **more): # from intact to one point
    return one(arm, rate, [.2, fs], [1., rs], **more)

GRID = { # (arm, rate): FS and RS at the end of each of two seeds
    ("Oracle", .25): [(.5, .95), (.5, .95)], ("Oracle", .5): [(.8, .9), (.8, .8)],
    ("Oracle", 1.): [(.9, .5), (.9, .5)], ("Random", .25): [(.5, .9), (.5, .9)],
    ("Random", .5): [(.8, .7), (.6, .9)], ("Random", 1.): [(.8, .6), (.8, .5)]}

def grid(cells=GRID, **more):
    return pd.concat([line(arm, rate, *end, seed=seed, **more)
        for (arm, rate), ends in cells.items() for seed, end in enumerate(ends)])

def one_line(call, *says):
    with pytest.raises(ValueError) as error: call()
    text = str(error.value)
    assert "\n" not in text and all(part in text for part in says), text

# --- one run at a level

@pytest.mark.parametrize("level, rs", [(.2, 1.), (.1, 1.), (.5, .8), (.8, .6), (.65, .7)])
def test_rs_at_a_level_is_read_from_the_line(level, rs):
    assert retained_at([.2, .8, .7, .9], [1., .6, .9, .1], level) == pytest.approx(rs, abs=1e-12)

def test_a_level_that_is_evaluated_is_read_exactly():
    assert retained_at([.2, .8, .9], [.9, .3, .9], .8) == .3

@pytest.mark.parametrize("seed", range(20))
def test_what_comes_after_the_level_does_not_count(seed):
    rng = np.random.default_rng(seed)
    fs, rs = np.r_[.1, rng.uniform(.1, .6, 5), .7], rng.uniform(0, 1, 7)
    for level in rng.uniform(.05, .7, 5):
        for measure in (retained_at, area_up_to):
            longer = np.r_[fs, rng.uniform(0, 1, 3)], np.r_[rs, rng.uniform(0, 1, 3)]
            assert measure(fs, rs, level) == measure(*longer, level)

@pytest.mark.parametrize("seed", range(20))
def test_the_partial_area_is_the_mean_of_the_rs_on_offer(seed):
    rng = np.random.default_rng(seed)
    fs, rs = np.sort(rng.uniform(.05, 1, 6)), np.sort(rng.uniform(0, 1, 6))[::-1]
    level = rng.uniform(.05, fs[-1])
    middle = (np.arange(200_000) + .5) * level / 200_000
    assert area_up_to(fs, rs, level) == pytest.approx(np.interp(middle, fs, rs).mean(), abs=1e-6)
    assert area_up_to(fs, rs, fs[-1]) * fs[-1] == pytest.approx(aues(fs, rs), abs=1e-12)

def test_what_has_no_value_at_a_level_says_so():
    for measure in (retained_at, area_up_to):
        one_line(lambda: measure([.2, .6], [1., .5], .7),
            "not reached: FS is 0.6 at most, expected 0.7")
        for level in (0, 1.1, 80, "half", math.nan):
            one_line(lambda: measure([.2, .6], [1., .5], level), "level must lie in (0, 1]")
        one_line(lambda: measure([.2, math.nan], [1., .5], .1), "forget_strength[1] is nan")

# --- the grid, read at a level

def test_each_run_is_read_at_its_level():
    found = at_level(grid(), level=.8).set_index(["arm", "rate", "seed"])
    assert list(found.columns) == ["objective", "level", "FS_max", AT_LEVEL, "reached"]
    assert found[AT_LEVEL]["Oracle", .5, 1] == .8 and found.FS_max["Oracle", 1., 0] == .9
    assert found[AT_LEVEL]["Oracle", 1., 0] == pytest.approx(1 - .5 * .6 / .7)
    assert not found.reached["Random", .5, 1] and np.isnan(found[AT_LEVEL]["Random", .5, 1])

def test_the_usual_level_is_close_below_that_of_each_retained_model():
    frame = pd.concat([grid().assign(arch="llama", retained_FS=.85),
        grid().assign(arch="olmo2", retained_FS=.55)])
    by = "arch", "objective", "arm"
    found = at_level(frame, by)
    assert found.groupby("arch")["level"].unique().map(list).to_dict() == {
        "llama": [.85 - BELOW], "olmo2": [.55 - BELOW]}
    assert found[found.arch == "olmo2"].reached.all()
    one_line(lambda: at_level(frame.drop(columns="retained_FS"), by), "no level is given")
    one_line(lambda: at_level(frame.assign(retained_FS=.05), by), "level must lie in (0, 1]")

def test_runs_that_share_a_name_are_refused():
    frame = pd.concat([grid().assign(arch="llama"), grid().assign(arch="olmo2")])
    one_line(lambda: at_level(frame, level=.8), "wga Oracle 0.25 0 names several runs", "epoch 0")
    assert len(at_level(frame, level=.8, run=("arch", "seed"))) == 24
    one_line(lambda: at_level(grid(), rate="lr", level=.8), "no column 'lr'")

# --- the rule

def test_the_highest_rs_at_the_level_wins_whatever_the_end_holds():
    chosen = choose_rates(grid(), level=.8).set_index("arm")
    assert list(chosen.columns) == ["objective", "rate", AT_LEVEL, "at_edge", "reached", "edge",
        "runs", "runs_reached"]
    oracle, random = chosen.loc["Oracle"], chosen.loc["Random"]
    assert (oracle.rate, oracle.at_edge, oracle.reached, oracle.runs_reached) == (
        .5, False, True, 2)
    assert oracle[AT_LEVEL] == pytest.approx(.85)
    assert (random.rate, random.edge, random.runs_reached) == (1., "highest", 2) # not (.7 + 0) / 2
    assert random[AT_LEVEL] == pytest.approx(.55)
    assert rates_told(choose_rates(grid(), level=.8)) == (
        "best rate at the edge of the grid: WGA Random (highest, 1)")

@pytest.mark.parametrize("seed", range(10))
def test_the_choice_is_that_of_every_rate_tried_by_hand(seed):
    rng = np.random.default_rng(seed)
    cells = {key: [tuple(rng.uniform(.5, 1, 2)) for _ in range(3)] for key in GRID}
    best = {}
    for arm in ("Oracle", "Random"):
        means = {}
        for rate in RATES:
            values = [1 - (1 - rs) * (.7 - .2) / (fs - .2) if fs >= .7 else 0.
                for fs, rs in cells[arm, rate]]
            means[rate] = sum(values) / 3
        best[arm] = max(means, key=means.get), max(means.values())
    chosen = choose_rates(grid(cells), level=.7)
    assert dict(zip(chosen.arm, chosen.rate)) == {arm: rate for arm, (rate, _) in best.items()}
    assert [*chosen[AT_LEVEL]] == pytest.approx([value for _, value in best.values()])

def test_a_rate_that_never_gets_there_loses_to_one_that_keeps_nothing():
    cells = {("Oracle", .5): [(.79, 1.)], ("Oracle", 1.): [(.8, 0.)]}
    row, = choose_rates(grid(cells), level=.8).itertuples()
    assert (row.rate, row.reached, row.runs_reached) == (1., True, 1)

def test_where_no_rate_gets_there_the_closest_is_given_and_named():
    cells = {("Oracle", .25): [(.3, 1.)], ("Oracle", .5): [(.7, .1)], ("Oracle", 1.): [(.6, .9)]}
    chosen = choose_rates(grid(cells), level=.8)
    assert chosen.rate[0] == .5 and not chosen.reached[0] and np.isnan(chosen[AT_LEVEL][0])
    assert rates_told(chosen) == "level not reached at any rate: WGA Oracle (closest at 0.5)"

def test_equal_rates_give_the_lower_one_and_one_rate_is_an_edge():
    cells = {("Oracle", rate): [(.8, .7)] for rate in RATES}
    chosen = choose_rates(grid(cells), level=.8)
    assert (chosen.rate[0], chosen.edge[0]) == (.25, "lowest")
    only = choose_rates(grid({("Oracle", .5): [(.8, .7)]}), level=.8)
    assert (only.edge[0], bool(only.at_edge[0])) == ("only", True)

def test_all_arms_of_an_objective_have_the_same_grid():
    less = {key: ends for key, ends in GRID.items() if key != ("Random", 1.)}
    for call in (choose_rates, front, grid_plot):
        one_line(lambda: call(grid(less), level=.8),
            "wga Random has 4 of the 6 points of its grid (rate, seed)", "as expected")
    other = pd.concat([grid(), grid({("Oracle", 2.): [(.8, .9)]}, objective="npo")])
    assert [*choose_rates(other, level=.8).rate] == [.5, 1., 2.] # another objective, another grid

def test_a_run_that_diverged_counts_as_one_that_does_not_get_there():
    points = pd.DataFrame([("wga", arm, rate, seed) for arm, rate, seed in itertools.product(
        ("Oracle", "Random"), RATES, range(2))], columns=["objective", "arm", "rate", "seed"])
    left = grid({key: ends for key, ends in GRID.items() if key != ("Random", 1.)})
    chosen = choose_rates(left, level=.8, expected=points).set_index("arm")
    assert (chosen.rate["Random"], chosen.runs_reached["Random"]) == (.5, 1)
    assert chosen[AT_LEVEL]["Random"] == pytest.approx(.35) # .7 and 0
    assert chosen.rate["Oracle"] == .5
    areas = front(left, level=.8, expected=points)
    assert len(areas) == 4 and areas.area.gt(0).all()

def test_a_frame_that_was_read_before_gives_the_same():
    read = at_level(grid(), level=.8)
    assert choose_rates(read).equals(choose_rates(grid(), level=.8))
    one_line(lambda: choose_rates(read.drop(columns="reached")), "no column 'reached'")

# --- over the whole grid

def test_the_area_over_a_grid_is_what_all_points_dominate():
    frame = front(grid(), level=.8).set_index(["arm", "seed"])
    # Oracle, seed 0: (.2, 1), (.5, .95), (.8, .9), (.9, .5) as (FS, RS)
    assert frame.area["Oracle", 0] == pytest.approx(.2 * .05 + .5 * .05 + .8 * .4 + .9 * .5)
    best = frame.loc[("Oracle", 0)]
    assert (best.rate, best.FS, best.RS) == (.5, .8, .9)
    assert frame.loc[("Random", 1), ["rate", "FS", "RS"]].tolist() == [1., .8, .5]
    assert front(grid(), level=.95)[["rate", "FS", "RS"]].isna().all(axis=None)

def test_more_rates_never_dominate_less():
    few = front(grid({key: ends for key, ends in GRID.items() if key[1] < 1}), level=.8)
    assert (front(grid(), level=.8).area >= few.area).all()

# --- the figure

def test_the_figure_draws_what_the_rule_compares():
    import matplotlib.pyplot as plt
    frame = pd.concat([grid(), grid(objective="npo")])
    figure = grid_plot(frame, level=.8)
    assert [axis.get_title() for axis in figure.axes] == ["WGA", "NPO"]
    oracle, few, ring, random, *_ = figure.axes[0].lines
    assert [*oracle.get_xdata()] == [*RATES]
    assert [*oracle.get_ydata()] == pytest.approx([0, .85, 1 - .5 * .6 / .7])
    assert ([*few.get_xdata()], [*ring.get_xdata()]) == ([.25], [.5])
    assert [*random.get_ydata()] == pytest.approx([0, .35, .55])
    assert figure.axes[-1].get_legend_handles_labels()[1] == ["Oracle", "Random"]
    plt.close(figure)
    alone = grid_plot(grid(), by=("arm",), level=.8)
    assert len(alone.axes) == 1
    plt.close(alone)

# --- the runs of a study

def test_the_curves_of_a_study_are_tuned_as_they_come(tmp_path, monkeypatch):
    monkeypatch.setenv("UNLOC_PROGRESS", str(tmp_path / "events")) # no bars
    study = Study(store=str(tmp_path), unlearn={"wga": {"lr": 5e-3, "epochs": 2}})
    def unlearned(arch, objective, arm, rate, seed):
        return study.unlearning(study.injection(arch, seed), arm, objective, rate)
    runs = study.sweep(study.grid(unlearned, arch=study.archs, objective=study.unlearn,
        arm=PAIR, rate=(.01, 1.), seed=range(1)))
    curves, by = runs.curves(), ("arch", "objective", "arm")
    retained = {arch: found["FS"] for arch, found in study.retained.items()}
    curves = curves.assign(retained_FS=curves.arch.map(retained))
    read = at_level(curves, by, expected=runs.points)
    assert read.level.tolist() == pytest.approx([retained[a] - BELOW for a in read.arch])
    ends = runs.tradeoff(more={"rs_at_fs": {"level": float(read.level[0])}})
    first = read.level == read.level[0]
    assert read[AT_LEVEL][first].tolist() == pytest.approx(
        ends.rs_at_fs[first].tolist(), abs=1e-12, nan_ok=True)
    chosen = choose_rates(curves, by, expected=runs.points)
    assert len(chosen) == 2 * len(study.archs) and {*chosen.rate} <= {.01, 1.}
    assert chosen.at_edge.all() and "best rate at the edge of the grid" in rates_told(chosen, by)
    areas = front(curves, by, expected=runs.points)
    both = curves.groupby([*by, "seed"], sort=False)
    assert areas.area.tolist() == [aues(own.FS, own.RS, "step") for _, own in both]
    one_line(lambda: choose_rates(runs.tradeoff(), by, level=.5), "no column 'FS'", "Runs.curves")

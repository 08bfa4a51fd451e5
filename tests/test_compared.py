"""Two computations of one profile are set side by side row by row: what changed by hand in real
tables is found, and nothing else; what cannot be compared is one line."""
import json, re, shutil, subprocess
from pathlib import Path

import pytest
from unloc import cli
from unloc.findings import LEVEL
from unloc.recomputed import (
    changed_since, claims, claims_text, naming, place_of, read_saved, side_by_side, text_of,
)

ROOT = Path(__file__).resolve().parents[1]
PROFILE = "tofu-20"
SAVED = ROOT / "figures" / PROFILE
MAIN = "table2_oracle_random"
ELSEWHERE = "pdp11"

def copied(to):
    return Path(shutil.copytree(SAVED, to, ignore=shutil.ignore_patterns("*.svg", "*.pdf")))

def edit(folder, name, change):
    file = folder / f"{name}.json"
    about = json.loads(file.read_text("utf-8"))
    change(about)
    file.write_text(json.dumps(about), "utf-8")

@pytest.fixture
def other(tmp_path): return copied(tmp_path / "there" / PROFILE)

def compared(other): return side_by_side(read_saved(SAVED), read_saved(other))

def first_row(about): return about["rows"][0]

def swapped(about): # another verdict, sign and p
    row = next(row for row in about["rows"] if row["verdict"] == "inconclusive")
    assert row["objective"] == "NPO" and row["difference [95 %]"].startswith("-")
    row |= {"verdict": "different", "p Holm": "0.001",
        "difference [95 %]": row["difference [95 %]"].replace("-", "+", 1)}

# --- rows

def test_a_computation_agrees_with_itself_in_every_row():
    found = compared(SAVED)
    tested = [row for about in read_saved(SAVED).about.values()
        for row in [*about.get("rows", []), *about.get("slopes", [])] if "verdict" in row]
    every = [row["verdict"] for row in tested] + [
        row["area, verdict"] for row in tested if "area, verdict" in row]
    assert len(found.rows) == sum(verdict != "–" for verdict in every) > 100
    assert all(row.agrees and not row.turned for row in found.rows)
    assert (found.settings, found.missing) == ({}, ([], []))

@pytest.mark.parametrize("profile", ["tiny", "tofu-20", "study", "related"])
def test_every_committed_table_names_its_rows(profile):
    saved = read_saved(ROOT / "figures" / profile)
    assert side_by_side(saved, saved).rows

@pytest.mark.parametrize("change", ["none", "order", "one more"])
def test_a_changed_verdict_is_found_wherever_its_row_stands(change, other):
    def act(about):
        swapped(about)
        if change == "order": about["rows"].reverse()
        if change == "one more": about["rows"].insert(0, first_row(about) | {"model": "Another"})
    edit(other, MAIN, act)
    found = compared(other)
    changed = [row for row in found.rows if row.in_both and not row.agrees]
    assert [(row.table, row.turned) for row in changed] == [(MAIN, True)]
    assert (changed[0].first.held, changed[0].second.held) == (False, True)
    assert changed[0].second.effect == -changed[0].first.effect
    alone = [row.name.split(", ")[0] for row in found.rows if not row.in_both]
    assert alone == (["Another"] if change == "one more" else [])
    lines = text_of(found)
    assert lines[lines.index("  in the second alone") + 1] == f"    {changed[0]}"
    assert "  in both" in lines and "  in the first alone" not in lines
    assert f"  {changed[0]}" in lines and "another sign of the effect: 1" in lines
    assert any(f"p Holm below {LEVEL}" in line and "1 in the second alone" in line
        for line in lines)

def test_a_family_of_its_own_is_compared_by_its_own_columns(other):
    table = "table3_recovery"
    edit(other, table, lambda about: first_row(about).update({"area, verdict": "different"}))
    changed = [row for row in compared(other).rows if not row.agrees]
    assert [row.name.split(", ")[-1] for row in changed] == ["area"]

def test_slopes_next_to_a_figure_are_compared(other):
    def act(about): about["slopes"][0] |= {"slope": "-9.000"}
    edit(other, "dose_response", act)
    turned = [row for row in compared(other).rows if row.turned]
    assert [row.table for row in turned] == ["dose_response"]
    assert any(line.startswith(f"  {turned[0].moved:g} in dose_response")
        for line in text_of(compared(other)))

def test_results_name_no_row():
    about = read_saved(SAVED).about
    names = [naming([about[name]["rows"]]) for name in about if "rows" in about[name]]
    assert {name for found in names for name in found} <= {
        "model", "objective", "metric", "arm", "region", "attack", "RS", "outcome", "inside",
        "way"}

def test_settings_that_differ_are_named(other):
    edit(other, MAIN, lambda about: about.update(seeds=3))
    assert compared(other).settings == {"seeds": [MAIN]}
    assert f"another setting: seeds, in {MAIN}" in text_of(compared(other))

def test_a_table_that_one_side_lacks_is_named(other):
    (other / f"{MAIN}.json").unlink()
    found = compared(other)
    assert found.missing == ([MAIN], []) and MAIN not in {row.table for row in found.rows}
    assert f"only in {SAVED}: {MAIN}" in text_of(found)

# --- what cannot be compared

@pytest.mark.parametrize(
    "how, says",
    [
        ("damaged", f"{MAIN}.json cannot be read .*restore it"),
        ("list", f"{MAIN}.json must hold a JSON object, got a list"),
        ("mixed", "holds figures of 2 profiles"),
        ("profile", f"is of profile {PROFILE}, .* of elsewhere; expected two computations of one"),
        ("no tables", "have no table with verdicts in common"),
        ("empty", "no figures in .*; give another folder"),
        ("parent", f"no figures in .*; give one of its folders: {PROFILE}"),
        ("gone", "is no folder; give one of figures"),
        ("store", "is a store of runs, which have no verdicts; draw its figures"),
        ("commit", f"git has no figures 0000000:figures/{PROFILE}")])
def test_what_cannot_be_compared_is_one_line(how, says, other, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    file, given = other / f"{MAIN}.json", other
    if how == "damaged": file.write_text(file.read_text("utf-8")[:500], "utf-8")
    if how == "list": file.write_text("[]", "utf-8")
    if how == "mixed": edit(other, MAIN, lambda about: about.update(profile="elsewhere"))
    if how in ("profile", "no tables", "empty", "store"):
        for each in other.glob("*.json"):
            if each.stem in (MAIN, "machine") and how != "empty" and how != "store": continue
            each.unlink()
    if how == "profile": edit(other, MAIN, lambda about: about.update(profile="elsewhere"))
    if how == "no tables": edit(other, MAIN, lambda about: about.update(rows=[]))
    if how == "parent": given = other.parent
    if how == "gone": given = other / "gone"
    if how == "store":
        (other / "31da5f64").mkdir()
        (other / "31da5f64" / "description.json").write_text("{}", "utf-8")
    if how == "commit": given = f"0000000:figures/{PROFILE}"
    assert cli.main(["compare-figures", str(SAVED), str(given)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("unloc: ") and err.count("\n") == 1
    assert re.search(says, err), err

# --- against a commit

def git(folder, *words):
    own = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *own, *words], check=True, capture_output=True)

@pytest.fixture
def checkout(tmp_path): # of figures that are committed
    if not shutil.which("git"): pytest.skip("needs git")
    folder = copied(tmp_path / "checkout" / "figures" / PROFILE)
    root = tmp_path / "checkout"
    git(tmp_path, "init", "-q", str(root))
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "figures")
    return folder

def elsewhere(folder, *names):
    file = folder / "machine.json"
    known = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(known | dict.fromkeys(names, ELSEWHERE)), "utf-8")

def test_figures_of_the_same_kind_of_machine_are_not_compared(checkout):
    edit(checkout, MAIN, swapped)
    assert changed_since(checkout, [MAIN]) == []

def test_a_verdict_that_another_kind_of_machine_changed_is_said(checkout, monkeypatch):
    edit(checkout, MAIN, swapped)
    elsewhere(checkout, MAIN)
    monkeypatch.chdir(checkout.parents[1])
    lines = changed_since(checkout, [MAIN])
    assert f"these are of {ELSEWHERE}: 1 of " in lines[0]
    assert "1 effects have another sign" in lines[0]
    assert lines[2].startswith(f"  {MAIN}: ") and "→ different" in lines[2]
    sides = lines[-1].split()[-2:] # the command that the last line names
    with place_of(sides[0]) as one, place_of(sides[1]) as two:
        rows = side_by_side(read_saved(*one), read_saved(*two)).rows
    assert [row.table for row in rows if not row.agrees] == [MAIN]

def test_only_what_was_computed_again_is_compared(checkout):
    edit(checkout, MAIN, swapped)
    elsewhere(checkout, "table4_arms")
    lines = changed_since(checkout, [MAIN, "table4_arms"])
    assert ": 0 of " in lines[0]

def test_many_changed_verdicts_are_counted(checkout):
    def all_of_them(about):
        for row in about["rows"]: row["verdict"] = "another"
    table = "table3_recovery"
    edit(checkout, table, all_of_them)
    elsewhere(checkout, table)
    lines = changed_since(checkout, [table])
    assert len(lines) < 15 and lines[-2] == "  and 20 more"

def test_reproduce_says_it_after_the_notebooks(checkout, monkeypatch):
    edit(checkout, MAIN, swapped)
    elsewhere(checkout, MAIN)
    page = ROOT / "nbs" / "21_oracle_random.ipynb"
    asked = cli.Order(
        chosen={page: {}}, jobs=1, store=checkout, figures=checkout.parent, copies=checkout,
        plugins=[])
    lines = []
    monkeypatch.setattr(cli, "_execute", lambda *given: lines.append("executed"))
    watch = type("Watch", (), {"say": lines.append, "begin": lambda label: None})
    cli._run_all(checkout.parents[1], asked, [], watch, PROFILE)
    said = next(i for i, line in enumerate(lines) if "git holds figures" in line)
    assert said > lines.index("executed")
    (checkout / f"{MAIN}.json").write_text("{", "utf-8")
    found = cli._since_commit(asked, PROFILE)
    assert len(found) == 1 and found[0].startswith("not compared with what git holds: ")
    asked.chosen[page] = {"demonstration": True}
    assert cli._since_commit(asked, PROFILE) == [], "a demonstration has no verdicts"

def test_without_git_nothing_is_compared(other):
    assert changed_since(other, [MAIN]) == []

# --- claims

def test_a_claim_that_holds_on_one_side_alone_is_named(other):
    page = ROOT / "nbs" / "90_findings.ipynb"
    here = claims(read_saved(SAVED), page)
    name = f"{PROFILE}.area.held are"
    assert here[name] and len(here) > 20 and all(x.startswith(f"{PROFILE}.") for x in here)
    edit(other, MAIN, swapped)
    there = claims(read_saved(other), page)
    lines = claims_text(here, there)
    assert name in next(line for line in lines if "in the first alone" in line)
    both = [one for one in here if here[one] and there[one]]
    assert lines[1] == f"  {len(both)} hold in both: {', '.join(both)}"

"""What pages, README and manuscript say is what the committed figures hold: each finding is
computed anew, every number cites one, and a claim that no longer holds stops its text."""
import json, re, shutil
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import pytest
from scipy.stats import ttest_1samp
from unloc.findings import load, quoted, unsupported
from unloc.manuscript import SMALLEST, smallest_font
from unloc.pages import execute_page
from unloc.profiles import profiles

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "figures" / "tiny"
EVERY = sorted((ROOT / "nbs").glob("[23][0-9]_*.ipynb"))
DRAWN = profiles(ROOT)["tiny"]["notebooks"] # the pages whose figures are committed
PAGES = {p.stem[:2]: p for p in EVERY if p.stem in DRAWN}
HELD = .05
COMMENT = re.compile("<!--.*?-->")
WORDS = ["none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def about(name): return json.loads((TINY / f"{name}.json").read_text("utf-8"))
def rows(name): return pd.DataFrame(about(name)["rows"])
def data(name): return pd.read_csv(TINY / f"{name}.csv")
def print_of(text): return str(text).replace("-", "−")
def signed(row): return print_of(row["difference [95 %]"].split(" ")[0])
def p(cells): return cells.replace({"<0.001": "0", "–": None}).astype(float)
def survives(frame, column="p Holm"): return frame[p(frame[column]) < HELD]

def finding(n):
    cells = [
        "".join(c["source"])
        for c in json.loads(PAGES[n].read_text("utf-8"))["cells"]
        if c["cell_type"] == "markdown"]
    found = [text for text in cells if text.startswith("## What we find")]
    assert len(found) == 1 and cells[-1] == found[0], "one finding, at the end of the page"
    return " ".join(COMMENT.sub("", found[0]).split())

def carries(n, *parts):
    text = finding(n)
    for part in parts: assert part in text, f"{PAGES[n].stem} should say: {part}"

@pytest.mark.parametrize("n", PAGES)
def test_every_page_ends_with_what_it_finds(n):
    assert "`tiny`" in finding(n) and len(finding(n).split()) > 20

def test_20_why_ten_percent():
    mean = data("injection_ratio").groupby(["model", "share", "arch", "metric"]).value.mean()
    def of(model, share, metric):
        return [f"{mean[model, share, arch, metric]:.2f}" for arch in ("llama", "olmo2")]
    (a, b), (c, d), (e, f) = (
        of("original", .1, "FS"),
        of("retained", .1, "FS"),
        of("original", .1, "RS"))
    g, h = of("original", 1., "RS")
    carries(
        "20",
        f"FS falls to {a} (Llama) and {b} (OLMo 2)",
        f"has {c} and {d}",
        f"RS is still {e} and {f}",
        f"an RS of {g} and {h}")

def test_21_oracle_against_random():
    areas = rows("table2_oracle_random").query("metric == 'AUES'")
    kept = survives(areas).set_index(["model", "objective"])
    assert {*kept.index} == {("Llama", "RMU"), ("Llama", "NPO")}
    equal = areas[areas.verdict == "equivalent"]
    assert equal[["model", "objective"]].values.tolist() == [["Llama", "WGA"]]
    carries(
        "21",
        f"better with RMU ({signed(kept.loc['Llama', 'RMU'])} AUES) and worse with NPO"
        f" ({signed(kept.loc['Llama', 'NPO'])})",
        f"the other {WORDS[len(areas) - len(kept)]} of {WORDS[len(areas)]} rows",
        "One row (Llama with WGA) is equivalent")

def test_22_trajectories():
    ends = (
        data("trajectories")
        .sort_values("epoch")
        .groupby(["arch", "objective", "seed", "arm"])
        .last())
    means = ends[["FS", "RS"]].groupby(["arch", "objective", "arm"]).mean().unstack()
    gaps = {name: (means[name].Oracle - means[name].Random).abs().max() for name in ("FS", "RS")}
    spans = [means.RS.xs(o, level="objective").to_numpy().ravel() for o in ("wga", "npo")]
    (a, b), (c, d) = ((f"{x.min():.2f}", f"{x.max():.2f}") for x in spans)
    assert means.FS.min().min() > .85, "far"
    carries(
        "22",
        f"at most {gaps['FS']:.2f} in FS and {gaps['RS']:.2f} in RS",
        f"WGA ends at an RS of {a} to {b}, NPO at {c} to {d}")

def test_23_direct_supervision():
    found = about("figure1_direct_supervision")
    def values(name, oracle):
        return [
            float(x[name])
            for end in found["ends"].values()
            for region, x in end.items()
            if (region == "Oracle") is oracle]
    oracle, random, kept = values("FS", True), values("FS", False), values("RS", False)
    goal = [float(x["FS"]) for x in found["retained"].values()]
    assert oracle == goal, "Oracle ends where the retained model is"
    carries(
        "23",
        f"Oracle ends at FS {oracle[0]:.2f} (Llama) and {oracle[1]:.2f} (OLMo 2)",
        f"FS {min(random):.2f} to {max(random):.2f}",
        f"RS {min(kept):.2f} to {max(kept):.2f}")

def test_24_localization():
    means = about("localization")["means"]
    def recall(name):
        return " and ".join(means[arch][name]["recall"] for arch in ("llama", "olmo2"))
    blind = [
        float(means[arch][x]["recall"])
        for arch in means
        for x in ("memflex", "wagle", "gradient", "fisher", "fisher_ratio")]
    others = [
        name
        for name in means["llama"]
        if name not in ("memflex", "wagle", "gradient", "fisher", "fisher_ratio", "random")]
    assert {*others} == {"weight_norm", "wanda", "activations", "integrated_gradients"}
    carries(
        "24",
        f"weight norm finds all of it (recall {recall('weight_norm')}, on",
        f"Wanda ({recall('wanda')})",
        f"activations ({recall('activations')})",
        f"integrated gradients ({recall('integrated_gradients')})",
        f"at most {max(blind):.2f}",
        f"chance is {about('localization')['chance']}")

def test_25_localizers():
    tested = rows("table1_localizers").query("verdict != '–'")
    areas, utility = tested[tested.metric == "AUES"], tested[tested.metric == "MU95"]
    kept, own = survives(areas), rows("table1_own_units")
    assert kept[["model", "region"]].values.tolist() == [["Llama", "WAGLE"]]
    assert survives(utility).empty
    assert survives(own).empty
    equal = (utility.verdict == "equivalent").sum()
    carries(
        "25",
        f"one of {len(areas)} comparisons",
        f"WAGLE on Llama ({signed(kept.iloc[0])} AUES)",
        f"{equal} of {len(utility)}")

def test_26_region_share():
    mean = data("region_share").groupby(["objective", "localizer", "share"]).AUES.mean()
    def of(objective, share):
        return [f"{mean[objective, name, share]:.2f}" for name in ("wagle", "random")]
    (a, b), (c, d) = of("wga", .01), of("wga", .1)
    (e, f), (g, h) = of("npo", .01), of("npo", .1)
    assert (data("region_share").groupby(["objective", "localizer", "share"]).size() == 1).all()
    for name in ("wagle", "random"):
        assert mean["wga", name][[.1, .25, .5, 1.]].is_monotonic_decreasing
    carries(
        "26",
        f"At 1 % it reaches AUES {a} against {b} (WGA) and {e} against {f} (NPO)",
        f"at 10 % {c} against {d} and {g} against {h}")

def test_27_arms():
    tested = rows("table4_arms").query("verdict != '–'")
    kept = survives(tested)
    assert kept[["objective", "metric", "arm"]].values.tolist() == [["NPO", "MU95", "All weights"]]
    areas = (tested.metric == "AUES").sum()
    carries(
        "27",
        f"none of {WORDS[areas]} arms",
        f"{signed(kept.iloc[0])} MU95",
        f"one of {len(tested)} comparisons")

def test_28_recovery():
    table, runs = rows("table3_recovery"), data("recovery").query("met")
    assert survives(table).empty and survives(table, "area, p Holm").empty
    strongest = "relearn forgotten facts, all weights"
    mean = runs[runs.attack == strongest].groupby(["objective", "arm"]).recovered.mean()
    for objective in ("wga", "npo"):
        best = (
            runs[(runs.objective == objective) & runs.arm.isin(["Random", "All weights"])]
            .groupby("attack")
            .recovered.mean())
        assert best.idxmax() == strongest, "the strongest attack"
    asked = table.drop_duplicates("attack").set_index("attack").Original
    ends = rows("table5_equal_retention")
    kept = survives(ends)
    assert kept[["objective", "RS", "outcome"]].values.tolist() == [["NPO", "end of the run", "FS"]]
    carries(
        "28",
        f"none of {len(table)} comparisons",
        f"{mean['wga', 'Oracle']:.2f} (Oracle) and {mean['wga', 'Random']:.2f} (Random)",
        f"{mean['wga', 'All weights']:.2f} of what",
        f"{print_of(asked['paraphrased'])} and {print_of(asked['few-shot'])}",
        f"({signed(kept.iloc[0])} FS")

def test_29_reversal():
    found, inside = about("reversal"), rows("table6_inside")
    cosine = [found["means"][o]["Oracle"]["cosine_to_reversal"] for o in ("wga", "npo")]
    words = found["correlation"]
    for text in words.values(): assert float(text.split("(p ")[1].split(",")[0]) > HELD
    over, within = (
        print_of(words[name].split(" ")[0])
        for name in ("over all runs", "within arm and objective"))
    kept = survives(inside).set_index(["objective", "inside"])
    assert {*kept.index} == {("NPO", "the answer itself, nats"), ("NPO", "depth")}
    carries(
        "29",
        f"{cosine[0]} (WGA) and {cosine[1]} (NPO)",
        f"{over} over all runs and {within} within",
        f"({signed(kept.loc['NPO', 'the answer itself, nats'])} nats)",
        f"({signed(kept.loc['NPO', 'depth'])})")

def test_30_dose_response():
    slopes = pd.DataFrame(about("dose_response")["slopes"])
    assert survives(slopes).empty
    top = slopes[slopes.outcome == "AUES"].iloc[
        slopes[slopes.outcome == "AUES"].slope.astype(float).argmax()]
    assert (top.objective, top.regions) == ("WGA", "and of localizers")
    carries(
        "30",
        f"none of {WORDS[len(slopes)]} slopes",
        f"{top.slope} AUES {print_of(top['95 %']).replace('[+', '[+')}")

def test_31_injection():
    found = rows("injection")
    kept = survives(found)
    assert kept[["outcome", "way"]].values.tolist() == [["AUES", "neurons"]]
    usual = found[found.way == "value vectors, 10 %, fine-tuned"].set_index("outcome")
    carries(
        "31",
        f"one of {len(found)} comparisons",
        f"({signed(kept.iloc[0])} AUES)",
        f"{signed(usual.loc['AUES'])} AUES and {signed(usual.loc['recovered'])} of what was"
        " forgotten")

# --- findings by name

FINDINGS = ROOT / "figures" / "findings" / "findings.json"
PAGE = ROOT / "nbs" / "90_findings.ipynb"
SAYING = [p for p in sorted((ROOT / "nbs").glob("[2-5][0-9]_*.ipynb"))
    if "## What we find" in p.read_text("utf-8")]
found = load(FINDINGS)

def computed(saved, out):
    execute_page(PAGE, {"saved": str(saved), "out": str(out)})
    return json.loads((out / "findings.json").read_text("utf-8"))

def test_findings_are_those_of_the_saved_figures(tmp_path):
    stored = json.loads(FINDINGS.read_text("utf-8"))
    again = computed(ROOT / "figures", tmp_path)
    assert again == stored, "call: unloc reproduce --profile findings"
    names = {name.removesuffix(".interval") for name in quoted(ROOT)}
    assert {name.removesuffix(".interval") for name in found} <= names, "nothing quotes a finding"

def test_what_is_not_saved_is_left_out_by_name(tmp_path):
    for name in ("table2_oracle_random", "localization"):
        for file in TINY.glob(f"{name}*"):
            (tmp_path / "figures/tiny").mkdir(parents=True, exist_ok=True)
            shutil.copy(file, tmp_path / "figures/tiny")
    about = computed(tmp_path / "figures", tmp_path / "out")
    names = {row["name"] for row in about["rows"]}
    assert "tiny.find.chance" in names and "tiny.recovery.held" not in names
    assert about["skipped"]["tiny: 28_recovery"] == (
        "no committed data: tiny/table3_recovery.json")
    assert "study/tuning.json" in about["skipped"]["study: 32_tuning"]

def said(page):
    cells = ("".join(c["source"]) for c in json.loads(page.read_text("utf-8"))["cells"])
    return next(text for text in cells if text.startswith("## What we find"))

@pytest.mark.parametrize("page", SAYING, ids=lambda page: page.stem)
def test_every_decimal_of_a_page_names_where_it_comes_from(page):
    assert unsupported(said(page), found, decimals=True) == []

DIRECTION = re.compile(
    r"\b(better|worse|more|most|less|ahead|nearer|nearest|farther|deeper|strongest|steepest"
    r"|overshoots|none|no)\b")

OTHERS = "56_unlearning_token" # its comparisons are of other runs, too

@pytest.mark.parametrize(
    "page", [p for p in SAYING if p.stem != OTHERS], ids=lambda page: page.stem)
def test_every_comparison_in_words_cites_a_finding(page):
    sentences = re.split(r"(?<=[.;])\s+", said(page))
    alone = [s for s in sentences if DIRECTION.search(COMMENT.sub("", s)) and not COMMENT.search(s)]
    assert alone == []

def test_all_pages_with_a_committed_result_are_read():
    assert len(SAYING) == 26 and OTHERS in {page.stem for page in SAYING}

VERSIONS = ("Python 3.11", "Llama 3.1", "torch 2.11.0", "CUDA 13.0", "5.17.0", "| 1.5 ×", "Phi 1.5",
    "Llama 3.2", "4.51 and", "torch 2.11", "transformers 5.17", "3.11, 3.12 and 3.13",
    "Python 3.12", "2.1 GB", "-3.13", "Apache-2.0", "OLMo 2", "95 %")

def test_every_decimal_of_the_readme_is_a_finding_or_a_version():
    assert unsupported((ROOT / "README.md").read_text("utf-8"), found, VERSIONS, True) == []

def test_every_decimal_of_the_index_is_a_finding_or_a_number_of_a_paper():
    cells = json.loads((ROOT / "nbs" / "index.ipynb").read_text("utf-8"))["cells"]
    text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    assert unsupported(text, found, ("2505.16252",), True) == []

def test_a_text_that_the_data_no_longer_support_is_named():
    text = said(PAGES["21"])
    other = dict(found)
    for name, value, printed in (
        ("tiny.area.llama.rmu", .051, "+0.051"),
        ("tiny.area.held are", False, "fails")):
        other[name] = type(found[name])(**vars(found[name]) | {"value": value, "printed": printed})
    problems = unsupported(text, other, decimals=True)
    names = [problem.split(":")[0] for problem in problems]
    assert names == ["tiny.area.llama.rmu", "tiny.area.held are", "0.047"]

# --- the manuscript

PAPER = ROOT / "paper" / "unloc.typ"
PRINTED = 6.8 # inches, the width of the text

def compiled(root):
    typst = pytest.importorskip("typst")
    return typst.compile(
        str(root / "paper" / "unloc.typ"), root=str(root), ignore_system_fonts=True,
        pdf_standards=["ua-1"])

def test_the_paper_compiles_from_the_findings_alone():
    made = compiled(ROOT)
    assert made.startswith(b"%PDF") and len(made) > 100_000
    if f"typst=={version('typst')}" in (ROOT / "requirements.txt").read_text("utf-8").split():
        same = made == PAPER.with_suffix(".pdf").read_bytes()
        assert same, "call: unloc reproduce --only paper"
    text = PAPER.read_text("utf-8")
    assert re.findall(r'(?:json|csv|read)\("([^"]+)"', text) == ["/figures/findings/findings.json"]
    assert found["default.alpha"].value == 1 and "NPO" in FINDINGS.read_text("utf-8")

def test_the_paper_is_short_and_its_abstract_shorter():
    assert sum(len(p.read_text("utf-8").splitlines()) for p in PAPER.parent.glob("*.typ")) <= 350
    abstract = re.search(r"Abstract\.\](.*?)\n\]", PAPER.read_text("utf-8"), re.S)[1]
    abstract = re.sub(r'#claim\((?:"[^"]*",?\s*)+\)', "", abstract)
    abstract = re.sub(r'#\w+\("[^"]*"\)', "7", abstract)
    assert 100 < len(abstract.split()) <= 160
    counted = rf"\b(?:{'|'.join(WORDS)}|\d[\d.]*)\b"
    assert len(re.findall(counted, abstract)) <= 8, "numbers in the abstract"
    assert abstract.split("Does localization inform unlearning?")[1].strip(), "the title's answer"

def test_the_paper_does_not_compile_with_a_claim_that_fails(tmp_path):
    pytest.importorskip("typst")
    shutil.copytree(ROOT / "paper", tmp_path / "paper")
    about = json.loads(FINDINGS.read_text("utf-8"))
    for image in (ROOT / one["image"].lstrip("/") for one in about["figures"].values()):
        (tmp_path / image.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, tmp_path / image.relative_to(ROOT))
    row = next(row for row in about["rows"] if row["name"] == "tiny.area.held are")
    (tmp_path / "figures/findings").mkdir(exist_ok=True)
    for printed in ("holds", "fails"):
        row["printed"] = printed
        (tmp_path / "figures/findings/findings.json").write_text(json.dumps(about), "utf-8")
        if printed == "holds": assert compiled(tmp_path).startswith(b"%PDF")
    with pytest.raises(Exception, match="no longer holds: tiny.area.held are"): compiled(tmp_path)

def test_every_number_in_the_manuscript_is_read():
    text = re.sub(r"^\s*//.*|```.*?```", "", PAPER.read_text("utf-8"), flags=re.M | re.S)
    prose = "\n".join(line for line in text.splitlines() if not line.startswith(("#let", "#set",
        "#show")))
    prose = re.sub(r'"[^"]*"|\$[^$]*\$|@\w+|\b(?:size|width|inset|size): [\d.]+\w*%?', "", prose)
    assert re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", prose) == []

def test_nothing_in_the_manuscript_is_set_below_the_smallest_size():
    text = PAPER.read_text("utf-8")
    sizes = [float(size) for size in re.findall(r"size: ([\d.]+)pt", text)]
    assert len(sizes) > 5 and min(sizes) >= SMALLEST
    figures = json.loads(FINDINGS.read_text("utf-8"))["figures"]
    drawn = re.findall(r'#drawn\("([^"]+)"', text)
    assert len(drawn) > 8 and "width: 100%" in text
    for name in drawn:
        svg = (ROOT / figures[name]["image"].lstrip("/")).read_text("utf-8")
        assert smallest_font(svg, PRINTED) >= SMALLEST, name

def test_the_manuscript_can_be_read_aloud():
    figures = json.loads(FINDINGS.read_text("utf-8"))["figures"]
    assert all(len(one.get("alt", one["caption"])) > 40 for one in figures.values())
    assert b"/StructTreeRoot" in compiled(ROOT), "tags"

def test_the_main_table_is_short_and_repeats_what_was_published():
    table = json.loads(FINDINGS.read_text("utf-8"))["tables"]["main"]
    assert len(table["rows"]) <= 12
    published = json.loads((ROOT / "paper" / "published.json").read_text("utf-8"))["AUES"]
    rows = [row for row in table["rows"] if "−" not in row[1]]
    assert [row[3] for row in rows] == [row["p"] for row in published]
    for row, theirs in zip(rows, published):
        gap = float(theirs["Oracle"].split(" ")[0]) - float(theirs["Random"].split(" ")[0])
        assert row[2] == print_of(f"{gap:+.3f}")
    areas = rows_of_tiny()
    assert [row[4].split(" ")[0] for row in rows] == areas

def rows_of_tiny():
    areas = rows("table2_oracle_random").query("metric == 'AUES'")
    return [signed(row) for _, row in areas.iterrows()]

def test_the_sign_by_objective_is_the_paired_contrast():
    runs = data("table2_oracle_random_data").query("arch == 'llama'")
    wide = runs.pivot(index="seed", columns=["objective", "arm"], values="AUES")
    gap = {o: wide[o].Oracle - wide[o].Random for o in ("npo", "rmu")}
    test = ttest_1samp(gap["rmu"] - gap["npo"], 0)
    ends = [print_of(f"{end:+.3f}") for end in test.confidence_interval(.95)]
    assert found["sign.tiny.llama"].value == pytest.approx((gap["rmu"] - gap["npo"]).mean())
    assert found["sign.tiny.llama.interval"].printed == f"[{', '.join(ends)}]"
    assert test.pvalue < HELD / 4 and found["sign.all held"].value

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
CLAIMED = "tofu-20" # the profile that draws conclusions on pages 20 to 31
SAVED = ROOT / "figures" / CLAIMED
SHOWN = "26" # the page that only the demonstration computes
EVERY = sorted((ROOT / "nbs").glob("[23][0-9]_*.ipynb"))
DRAWN = profiles(ROOT)["tiny"]["notebooks"] # the pages of the demonstration
PAGES = {p.stem[:2]: p for p in EVERY if p.stem in DRAWN}
HELD = .05
COMMENT = re.compile("<!--.*?-->")
WORDS = ["none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def about(name): return json.loads((SAVED / f"{name}.json").read_text("utf-8"))
def rows(name): return pd.DataFrame(about(name)["rows"])
def data(name, profile=CLAIMED): return pd.read_csv(ROOT / "figures" / profile / f"{name}.csv")
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
    profile = "tiny" if n == SHOWN else CLAIMED
    assert f"`{profile}`" in finding(n) and len(finding(n).split()) > 20

VERDICTS = re.compile("Holm|p-value|significan|equivalent|differs|better|worse|ahead")

def test_nothing_is_concluded_from_the_demonstration():
    assert profiles(ROOT)["tiny"]["demonstration"] is True
    texts = [finding(n) for n in PAGES]
    texts += [(ROOT / name).read_text("utf-8") for name in ("README.md", "paper/unloc.typ")]
    sentences = [s for text in texts for s in re.split(r"(?<=[.;])\s+", text) if "`tiny`" in s]
    assert len(sentences) > 3 and [s for s in sentences if VERDICTS.search(s)] == []
    names = {name for name in quoted(ROOT) if name.startswith("tiny.")}
    assert names and not any(isinstance(found[name].value, bool) for name in names)

def test_20_why_ten_percent():
    mean = data("injection_ratio").groupby(["model", "share", "metric"]).value.mean()
    def of(model, share, metric): return f"{mean[model, share, metric]:.2f}"
    carries(
        "20",
        f"FS falls to {of('original', .1, 'FS')}",
        f"has {of('retained', .1, 'FS')}, and RS is still {of('original', .1, 'RS')}",
        f"Through 30 % of them the facts are learnt completely, FS {of('original', .3, 'FS')}",
        f"an RS of {of('original', .3, 'RS')}",
        f"Through 3 % the model learns little: FS stays at {of('original', .03, 'FS')}")

def test_21_oracle_against_random():
    table = rows("table2_oracle_random")
    areas, utility = (table[table.metric == metric] for metric in ("AUES", "MU95"))
    kept = survives(areas).set_index("objective")
    assert {*kept.index} == {"RMU", "WGA"} and (areas.verdict != "equivalent").all()
    assert survives(utility).objective.tolist() == ["RMU"]
    gap = {row.objective: signed(dict(row)) for row in map(lambda r: r[1], areas.iterrows())}
    carries(
        "21",
        f"{WORDS[len(kept)]} of {WORDS[len(areas)]} objectives",
        f"RMU ({gap['RMU']} AUES) and WGA ({gap['WGA']})",
        f"NPO ({gap['NPO']}) and DPO ({gap['DPO']})",
        f"({signed(survives(utility).iloc[0])})")

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
    ends, goal = found["ends"]["llama"], found["retained"]["llama"]
    random = [end for region, end in ends.items() if region != "Oracle"]
    assert ends["Oracle"]["FS"] == goal["FS"], "Oracle ends where the retained model is"
    def span(name):
        values = sorted({end[name] for end in random})
        return values[0] if len(values) == 1 else f"{values[0]} to {values[-1]}"
    carries(
        "23",
        f"Oracle ends at FS {ends['Oracle']['FS']}",
        f"end at FS {span('FS')} and RS {span('RS')}")

def test_24_localization():
    means = about("localization")["means"]["llama"]
    blind = "memflex", "wagle", "gradient", "fisher", "fisher_ratio"
    assert {*means} - {*blind, "random"} == {
        "weight_norm", "wanda", "activations", "integrated_gradients"}
    def recall(name): return means[name]["recall"]
    carries(
        "24",
        f"weight norm finds all of it (recall {recall('weight_norm')})",
        f"Wanda ({recall('wanda')})",
        f"activations ({recall('activations')})",
        f"integrated gradients ({recall('integrated_gradients')})",
        f"at most {max(map(recall, blind))}",
        f"chance is {about('localization')['chance']}")

def test_25_localizers():
    tested = rows("table1_localizers").query("verdict != '–'")
    areas, utility = tested[tested.metric == "AUES"], tested[tested.metric == "MU95"]
    gaps = areas["difference [95 %]"].str.split(" ").str[0]
    assert len(survives(areas)) == len(areas) and gaps.str.startswith("+").all()
    assert survives(utility).empty
    gaps = sorted(gaps.str.lstrip("+"))
    own = data("table1_own_units_data", "tiny").groupby("localizer").AUES.mean()
    carries(
        "25",
        f"all {WORDS[len(areas)]} localizers trade better",
        f"by {gaps[0]} to {gaps[-1]} AUES",
        f"none of {WORDS[len(utility)]} differs",
        f"{own.wagle_weights:.2f} through the single weights",
        f"{own.random_weights:.2f} through random ones")

def test_26_region_share():
    points = data("region_share", "tiny").query("objective == 'wga'")
    mean = points.groupby(["localizer", "share"]).AUES.mean()
    assert (points.groupby(["localizer", "share"]).size() == 1).all()
    carries(
        "26",
        f"an AUES of {mean['wagle', .01]:.2f} at a share of 1 % and of {mean['wagle', .1]:.2f}",
        f"a random region has {mean['random', .01]:.2f} and {mean['random', .1]:.2f}")

def test_27_arms():
    tested = rows("table4_arms").query("verdict != '–'")
    areas = tested[tested.metric == "AUES"]
    kept = survives(tested)
    assert kept[["objective", "metric", "arm"]].values.tolist() == [["NPO", "AUES", "All weights"]]
    random = areas[areas.arm == "Random"].set_index("objective")
    carries(
        "27",
        f"one of {WORDS[len(areas)]} arms",
        f"({signed(kept.iloc[0])} AUES)",
        f"{signed(random.loc['WGA'])} AUES (p {random.loc['WGA', 'p Holm']})",
        f"{signed(random.loc['NPO'])} (p {random.loc['NPO', 'p Holm']})")

def test_28_recovery():
    table, runs = rows("table3_recovery"), data("recovery").query("met")
    assert survives(table).empty and survives(table, "area, p Holm").empty
    strongest = "relearn forgotten facts, target region"
    by_attack = runs[runs.arm != "Restore"].groupby("attack").recovered.mean()
    assert by_attack.idxmax() == strongest, "the strongest attack"
    mean = runs[runs.objective == "wga"].groupby(["attack", "arm"]).recovered.mean()
    weights = strongest.replace("target region", "all weights")
    asked = table.drop_duplicates("attack").set_index("attack").Original
    assert survives(rows("table5_equal_retention")).empty
    carries(
        "28",
        f"none of {len(table)} comparisons",
        f"{mean[strongest, 'Oracle']:.2f} (Oracle) and {mean[strongest, 'Random']:.2f} (Random)",
        f"{mean[weights, 'Oracle']:.2f} and {mean[weights, 'Random']:.2f}",
        f"{print_of(asked['paraphrased'])} and {print_of(asked['few-shot'])}")

def test_29_reversal():
    found, inside = about("reversal"), rows("table6_inside")
    cosine = [found["means"][o]["Oracle"]["cosine_to_reversal"] for o in ("wga", "npo")]
    words = found["correlation"]
    for text in words.values(): assert float(text.split("(p ")[1].split(",")[0]) > HELD
    over, within = (
        print_of(words[name].split(" ")[0])
        for name in ("over all runs", "within arm and objective"))
    kept = survives(inside)
    assert kept[["objective", "inside"]].values.tolist() == [["NPO", "logit lens, nats"]]
    carries(
        "29",
        f"{cosine[0]} (WGA) and {cosine[1]} (NPO)",
        f"{over} over all runs and {within} within",
        f"({signed(kept.iloc[0])} nats)")

def test_30_dose_response():
    slopes = pd.DataFrame(about("dose_response")["slopes"])
    assert survives(slopes).empty
    top = slopes[slopes.outcome == "AUES"].iloc[
        slopes[slopes.outcome == "AUES"].slope.astype(float).argmax()]
    assert (top.objective, top.regions) == ("WGA", "of known recall")
    carries(
        "30",
        f"none of {WORDS[len(slopes)]} slopes",
        f"{top.slope} AUES {print_of(top['95 %'])}")

def test_31_injection():
    found = rows("injection")
    kept = survives(found)
    assert kept[["outcome", "way"]].values.tolist() == [["AUES", "fine-tuned, after other facts"]]
    areas = found[found.outcome == "AUES"].set_index("way")
    heads = areas.loc["neurons and heads"]
    carries(
        "31",
        f"one of {WORDS[len(found)]} comparisons",
        f"({signed(kept.iloc[0])} AUES), barely (p {kept.iloc[0]['p Holm']})",
        f"{signed(heads)} AUES (p {heads['p Holm']})",
        f"mixed with retain facts {signed(areas.loc['mixed with retain facts'])}",
        f"({signed(areas.loc['into a region made free'])})")

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
        for file in SAVED.glob(f"{name}*"):
            (tmp_path / "figures" / CLAIMED).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, tmp_path / "figures" / CLAIMED)
    about = computed(tmp_path / "figures", tmp_path / "out")
    names = {row["name"] for row in about["rows"]}
    assert "tofu-20.find.chance" in names and "tofu-20.recovery.held" not in names
    assert about["skipped"]["tofu-20: 28_recovery"] == (
        "no committed data: tofu-20/table3_recovery.json")
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
        ("tofu-20.area.llama.rmu", .051, "+0.051"),
        ("tofu-20.area.held are", False, "fails")):
        other[name] = type(found[name])(**vars(found[name]) | {"value": value, "printed": printed})
    problems = unsupported(text, other, decimals=True)
    names = [problem.split(":")[0] for problem in problems]
    assert names == ["tofu-20.area.llama.rmu", "tofu-20.area.held are", "0.074"]

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
    row = next(row for row in about["rows"] if row["name"] == "tofu-20.area.held are")
    (tmp_path / "figures/findings").mkdir(exist_ok=True)
    for printed in ("holds", "fails"):
        row["printed"] = printed
        (tmp_path / "figures/findings/findings.json").write_text(json.dumps(about), "utf-8")
        if printed == "holds": assert compiled(tmp_path).startswith(b"%PDF")
    says = "no longer holds: tofu-20.area.held are"
    with pytest.raises(Exception, match=says): compiled(tmp_path)

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
    drawn = dict(re.findall(r'#drawn\("([^"]+)"(?:[^)]*share: (\d+)%)?', text))
    assert len(drawn) > 8 and "width: 100%" in text
    for name, share in drawn.items():
        svg = (ROOT / figures[name]["image"].lstrip("/")).read_text("utf-8")
        assert smallest_font(svg, PRINTED * int(share or 100) / 100) >= SMALLEST, name

def test_the_manuscript_can_be_read_aloud():
    figures = json.loads(FINDINGS.read_text("utf-8"))["figures"]
    assert all(len(one.get("alt", one["caption"])) > 40 for one in figures.values())
    assert b"/StructTreeRoot" in compiled(ROOT), "tags"

def test_the_main_table_is_short_and_repeats_what_was_published():
    table = json.loads(FINDINGS.read_text("utf-8"))["tables"]["main"]
    assert len(table["rows"]) <= 12
    published = json.loads((ROOT / "paper" / "published.json").read_text("utf-8"))["AUES"]
    rows_of_main = [row for row in table["rows"] if "−" not in row[1]]
    assert [row[3] for row in rows_of_main] == [row["p"] for row in published]
    for row, theirs in zip(rows_of_main, published):
        gap = float(theirs["Oracle"].split(" ")[0]) - float(theirs["Random"].split(" ")[0])
        assert row[2] == print_of(f"{gap:+.3f}")
    areas = rows("table2_oracle_random").query("metric == 'AUES'")
    ours = [row[4].split(" ")[0] for row in rows_of_main]
    assert ours[:len(areas)] == [signed(row) for _, row in areas.iterrows()]
    assert {*ours[len(areas):]} == {"–"}, "OLMo 2 is run in the demonstration alone"

def test_the_sign_by_objective_is_the_paired_contrast():
    runs = data("table2_oracle_random_data").query("arch == 'llama'")
    wide = runs.pivot(index="seed", columns=["objective", "arm"], values="AUES")
    gap = {o: wide[o].Oracle - wide[o].Random for o in ("npo", "rmu")}
    test = ttest_1samp(gap["rmu"] - gap["npo"], 0)
    ends = [print_of(f"{end:+.3f}") for end in test.confidence_interval(.95)]
    assert found["sign.tofu-20.llama"].value == pytest.approx((gap["rmu"] - gap["npo"]).mean())
    assert found["sign.tofu-20.llama.interval"].printed == f"[{', '.join(ends)}]"
    assert test.pvalue < HELD / 2 and found["sign.all held"].value

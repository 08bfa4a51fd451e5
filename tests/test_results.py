"""Result pages show what the committed profiles found, and nothing else"""
import json, re, shutil
from pathlib import Path

import pytest

from unloc.figures import Shown, label
from unloc.profiles import profiles, project_root
from unloc.project import pages_of
from unloc.results import saved_by, store_results, with_results
from unloc.study import Settings

ROOT = project_root(Path(__file__).parent)
PAGES = pages_of(ROOT)
each = pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])

@each
def test_a_page_shows_what_the_saved_files_hold(page):
    assert with_results(page, ROOT) == page.read_text("utf-8"), "call: make pages"

@each
def test_only_cells_that_save_are_tagged_and_show_something(page):
    for cell in json.loads(page.read_text("utf-8"))["cells"]:
        saves = cell["cell_type"] == "code" and bool(saved_by("".join(cell["source"])))
        assert saves == ("results" in cell["metadata"].get("tags", []))
        assert saves or not cell.get("outputs")

@pytest.fixture
def project(tmp_path):
    (tmp_path / "nbs").mkdir()
    shutil.copy(ROOT / "settings.ini", tmp_path)
    shutil.copy(ROOT / "nbs/25_localizers.ipynb", tmp_path / "nbs")
    for name in ("tofu-20/table1_localizers", "tiny/table1_localizers", "tiny/table1_own_units"):
        file = tmp_path / "figures" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "figures" / f"{name}.json", file)
    return tmp_path

def test_new_numbers_are_stored_and_a_second_time_changes_nothing(project):
    page = project / "nbs/25_localizers.ipynb"
    before = page.read_text("utf-8")
    file = project / "figures/tofu-20/table1_localizers.json"
    about = json.loads(file.read_text("utf-8"))
    assert [store_results(project), page.read_text("utf-8")] == [[], before]
    about["rows"][0] |= {about["columns"][-1]: "0.123456"}
    file.write_text(json.dumps(about), "utf-8")
    assert store_results(project) == [page]
    assert "0.123456" in page.read_text("utf-8") and "0.123456" not in before
    assert store_results(project) == []

def test_a_demonstration_is_shown_without_verdicts_and_only_where_nothing_else_is(project):
    page = project / "nbs/25_localizers.ipynb"
    def shown(): return json.dumps(json.loads(page.read_text("utf-8"))["cells"])
    first = shown()
    assert "Profile tofu-20" in first and "detectable</th>" in first and "verdict</th>" in first
    for file in project.glob("figures/tofu-20/*"): file.unlink()
    assert store_results(project) == [page]
    assert "Profile tofu-20" not in shown() and "Profile tiny" in shown()
    assert "verdict</th>" not in shown() and "detectable</th>" in shown()
    assert "no verdicts and no claims" in shown()

def test_what_no_profile_saved_leaves_its_cell_empty(project):
    for file in project.glob("figures/*/*"): file.unlink()
    [page] = store_results(project)
    assert not any(c.get("outputs") for c in json.loads(page.read_text("utf-8"))["cells"])

def test_a_table_shows_its_caption_profile_and_machine_as_plain_text():
    shown = Shown(ROOT / "figures/tiny", "table1_localizers")
    text = repr(shown)
    assert text.startswith("| ") and "Profile tiny" in text
    assert shown.about["caption"][:40] in text
    assert all("<script" not in bundle.get("text/html", "") for bundle in shown.bundles())

@pytest.mark.parametrize("profile, says", [("smoke", True), ("tiny", False)])
def test_a_page_at_smoke_size_says_that_nothing_in_it_is_a_result(profile, says, capsys):
    Settings.of_page({"profile": profile, "get_ipython": None})
    assert ("nothing on this page is a result" in capsys.readouterr().out) == says

# the findings of 53 are directions: tests/test_del.py
RELATED = [page for page in PAGES if page.stem[:2] in ("50", "51", "52", "54", "55", "56")]
@pytest.mark.parametrize("page", RELATED, ids=lambda page: page.stem)
def test_every_number_of_a_finding_stands_in_a_table_of_its_page(page):
    cells = json.loads(page.read_text("utf-8"))["cells"]
    code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    names = saved_by(code)
    text = "".join(
        file.read_text("utf-8") for name in names
        for file in (ROOT / "figures").glob(f"related*/{name}.csv")).replace("-", "−")
    finding, = ["".join(c["source"]) for c in cells if "## What we find" in "".join(c["source"])]
    numbers = re.findall(r"−?\d+\.\d+", re.sub("<!--.*?-->", "", finding))
    assert len(numbers) > 0
    assert [x for x in numbers if x not in text] == []

PLANNED = [
    "study-small", "study-small-controls", "study-small-neurons", "study-tofu", "study"]

@pytest.mark.parametrize("profile", PLANNED)
def test_the_rates_of_the_study_are_those_that_the_rule_chose(profile):
    own, chosen = profiles(ROOT)[profile], {}
    given = {"usual way": own["region_rates"]} | own.get("way_rates", {})
    arms = {label("arm", arm): arm for arm in own["region_rates"]["npo"]}
    labels = {label("objective", name): name for name in own["unlearn"]}
    for row in json.loads((ROOT / "figures" / profile / "tuning.json").read_text("utf-8"))["rows"]:
        arm = arms.get(row["arm"], row["arm"])
        chosen[row.get("way", "usual way"), labels[row["objective"]], arm] = float(row["rate"])
    tuned = {arm for _, _, arm in chosen}
    assert {way for way, _, _ in chosen} == {*given}
    assert {*own.get("localizers", [])} <= tuned
    assert chosen == {
        (way, objective, arm): rate for way, rates in given.items()
        for objective, arms in rates.items() for arm, rate in arms.items() if arm in tuned}

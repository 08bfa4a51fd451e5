"""Lay out the pages that Sphinx reads: notebooks without nbdev's marks, with the stored results of
the figures folder; lists of pages; the gallery, the glossary and the reference."""
import json, os, re, shutil
from pathlib import Path

import api
from unloc.cli import artefacts
from unloc.results import shown_from

ROOT = Path(__file__).resolve().parents[2]
NBS = ROOT / "nbs"
FIRST = "tiny" # the profile of a page that shows nothing and names none
TEXTS = {"README.md": "guide", "CONTRIBUTING.md": "contributing", "CHANGELOG.md": "changelog"}
KINDS = {
    "localizer": "Localizers", "objective": "Objectives", "retain_term": "Retain terms",
    "editor": "Editors", "attack": "Attacks", "metric": "Metrics", "summary": "Summaries",
    "measurement": "Measurements", "dataset": "Data sets", "architecture": "Architectures"}

def notebooks():
    return [*sorted(NBS.glob("*.ipynb")), *sorted(NBS.glob("[a-z]*/*.ipynb"))]

class Page:
    "A notebook, and what the lists of pages say about it"
    def __init__(self, path):
        self.path, self.notebook = path, json.loads(path.read_text("utf-8"))
        self.name = path.relative_to(NBS).with_suffix("").as_posix()
        self.cells = [[c["cell_type"], "".join(c["source"]), c] for c in self.notebook["cells"]]
        first = self.cells[0][1]
        self.title = re.search(r"^# (.+)", first, re.M)[1]
        self.promise = re.search(r"^> (.+)", first, re.M)[1]
        self.code = "\n".join(text for kind, text, _ in self.cells if kind == "code")
        number = re.match(r"\d\d", path.stem)
        self.number = number[0] if number and path.parent == NBS else ""
        module = re.search(r"^#\|\s*default_exp ([\w.]+)", self.code, re.M)
        self.module = f"unloc.{module[1]}" if module else None

    @property
    def kinds(self):
        "Name the kinds of method that the page registers"
        found = re.findall(r"\b(\w+)\(\s*label=", self.code)
        return [kind for kind in KINDS if kind in found]

    @property
    def is_result(self): return bool(self.number) and self.number >= "20"

    @property
    def artefacts(self): # names in the folder of figures
        saved = [name.partition(".")[0] for name in artefacts(self.path)]
        return [name for name in dict.fromkeys(saved) if folder_of(name)]

    @property
    def profile(self):
        "Name the profile whose figures the page shows, or else the one that it tells of"
        if self.artefacts: return folder_of(self.artefacts[0]).name
        text = "\n".join(text for kind, text, _ in self.cells if kind == "markdown")
        named = re.search(r"--profile ([\w.-]+)", text)
        return named[1] if named else FIRST

    @property
    def command(self):
        "Give the command that reproduces the page"
        if self.is_result:
            return f".venv/bin/unloc reproduce --profile {self.profile} --only {self.path.stem}"
        return f".venv/bin/nbdev-test nbs/{self.name}.ipynb"

def folder_of(artefact): return shown_from(ROOT, artefact)

# --- links

class Site:
    "The folder that Sphinx reads, new"
    def __init__(self, folder):
        self.folder = Path(folder)

    def write(self, name, text):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")

    def copy(self, file): # of the repository, to the same place in the site
        "Take a file along, and give its place"
        place = file.relative_to(ROOT)
        to = self.folder / "files" / place
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, to)
        return Path("files") / place

    def link(self, target, page, home):
        "Turn a link of the repository into one of the site"
        if re.match(r"[a-z]+:|#", target): return target
        target, mark, anchor = target.partition("#")
        file = (home / target).resolve()
        if not file.is_file() or ROOT not in file.parents: return target + mark + anchor
        name = file.relative_to(ROOT).as_posix()
        if name in TEXTS: place = Path(f"{TEXTS[name]}.md")
        elif NBS in file.parents and file.suffix == ".ipynb": place = file.relative_to(NBS)
        else: place = self.copy(file)
        return Path(os.path.relpath(place, Path(page).parent)).as_posix() + mark + anchor

    def relinked(self, text, page, home): # page: its place in the site; home: of the text
        "Turn the links of a text into those of the site, outside of code"
        def turn(match): return f"]({self.link(match[1], page, home)})"
        parts = re.split(r"(```.*?```|`[^`\n]*`)", text, flags=re.S)
        return "".join(p if p[:1] == "`" else re.sub(r"\]\(([^)\s]+)\)", turn, p) for p in parts)

    def download(self, file, label, page):
        place = os.path.relpath(self.copy(file), Path(page).parent)
        return f"{{download}}`{label} <{Path(place).as_posix()}>`"

# --- results

def table(rows):
    def line(cells): return f"| {' | '.join(str(c).replace('|', chr(92) + '|') for c in cells)} |"
    head = [line(rows[0]), "|" + " --- |" * len(rows[0])]
    return "\n".join([*head, *(line(row.values()) for row in rows)])

def about(artefact):
    return json.loads((folder_of(artefact) / f"{artefact}.json").read_text("utf-8"))

def is_table(artefact): return "columns" in about(artefact)

def data_of(site, artefact, page):
    folder = folder_of(artefact)
    found = [folder / f"{artefact}{end}" for end in (".pdf", ".csv", "_data.csv", ".tex", ".json")]
    links = [site.download(f, f.name.removeprefix(artefact), page) for f in found if f.is_file()]
    kind = "Table" if is_table(artefact) else "Figure"
    text = f"{kind} `{artefact}` of profile `{folder.name}`: {', '.join(links)}"
    return f":::{{container}} data\n{text}\n:::"

def caption(text): return f":::{{container}} caption\n{api.escaped(text)}\n:::"

def result(site, artefact, page):
    "Show a figure or a table of the figures folder, with its caption"
    told = about(artefact)
    if is_table(artefact): shown = f":::{{container}} numbers\n{table(told['rows'])}\n:::"
    else:
        picture = site.link(f"{folder_of(artefact)}/{artefact}.svg", page, ROOT)
        shown = f"![{artefact.replace('_', ' ')}]({picture})"
    return "\n\n".join([shown, caption(told["caption"]), data_of(site, artefact, page)])

def results(site, page):
    "Show what a result page does not show by itself"
    shown = "".join(text for kind, text, _ in page.cells if kind == "markdown")
    stored = any("text/html" in o.get("data", {}) for *_, c in page.cells
        for o in c.get("outputs", []))
    missing = [name for name in page.artefacts
        if f"/{name}.svg" not in shown and not (stored and is_table(name))]
    if not missing: return []
    parts = [f"## The result of `{page.profile}`", *(result(site, a, page.name) for a in missing)]
    return ["\n\n".join(parts)]

# --- pages

def tools(site, page):
    "Offer the notebook of a page, and the command that reproduces it"
    links = [site.download(page.path, "Download this notebook", page.name)]
    if page.module:
        up = "../" * page.name.count("/")
        name = page.module.removesuffix(".__init__")
        links.append(f"[reference of `{name}`]({up}api/{page.module}.md)")
    command = ["```sh", page.command, "```"] if page.code else []
    return "\n".join([":::{container} page-tools", " · ".join(links), "", *command, ":::"])

def cell(kind, text, given=None, tags=()):
    kept = {"cell_type": kind, "source": text, "metadata": {"tags": [*tags]}}
    if kind == "code": kept |= {"outputs": given.get("outputs", []), "execution_count": None}
    return kept

def only_imports(text):
    return all(re.match(r"(import|from)\s|    |\)|#|$", line) for line in text.split("\n"))

def staged(site, page):
    "Give the cells of a page as the site shows them"
    found = []
    for kind, text, given in page.cells:
        if re.match(r"#\|\s*(hide|default_exp)", text): continue
        imports = text.startswith("#| export") and only_imports(text)
        text = re.sub(r"^#\|.*\n?", "", text, flags=re.M)
        if kind == "markdown": text = site.relinked(text, page.name, page.path.parent)
        if text.startswith("## What we find"):
            found += [cell("markdown", part) for part in results(site, page)]
        fold = page.is_result or page.name == "index" or imports
        found.append(cell(kind, text, given, ["hide-input"] * (fold and kind == "code")))
    if page.name != "index":
        first = found[0]["source"]
        promise = re.search(r"^> .+\n?", first, re.M).end()
        found[0]["source"] = f"{first[:promise]}\n{tools(site, page)}\n{first[promise:]}"
    return found

def write_page(site, page, *more):
    cells = staged(site, page) + [cell("markdown", text) for text in more]
    for i, one in enumerate(cells): one["id"] = f"c{i}"
    head = {"nbformat": 4, "nbformat_minor": 5, "metadata": page.notebook["metadata"]}
    site.write(f"{page.name}.ipynb", json.dumps(head | {"cells": cells}))

def tree(names, caption=None, hidden=True): # names: of pages, or 'title <name>'
    options = [":hidden:"] * hidden + ([f":caption: {caption}"] if caption else [])
    return "\n".join(["```{toctree}", *options, "", *names, "```"])

def entry(page): return f"{page.number} {page.title} </{page.name}>".strip()

def listing(pages, up=""):
    lines = [f"- [{entry(p).rpartition(' <')[0]}]({up}{p.name}.ipynb): {p.promise}" for p in pages]
    return "\n".join(lines)

def overview(site, name, title, lead, groups): # groups: {heading or '': pages}
    lines = [f"# {title}", "", f"> {lead}", ""]
    pages = {p.name: p for group in groups.values() for p in group}
    for heading, group in groups.items():
        lines += [f"## {heading}", ""] * bool(heading) + [listing(group), ""]
    site.write(f"{name}.md", "\n".join([*lines, tree(map(entry, pages.values()))]))

def by_kind(pages):
    found = {title: [p for p in pages if kind in p.kinds] for kind, title in KINDS.items()}
    found["Shared"] = [p for p in pages if not p.kinds]
    return {title: group for title, group in found.items() if group}

def gallery(site, pages):
    lines = ["# Gallery", "", "> Every figure with its caption, and the data of every table", ""]
    for page in pages:
        if not page.artefacts: continue
        lines += [f"## [{entry(page).rpartition(' <')[0]}]({page.name}.ipynb)", ""]
        for name in page.artefacts:
            show = data_of if is_table(name) else result
            lines += [show(site, name, "gallery"), ""]
    site.write("gallery.md", "\n".join(lines))

def as_glossary(text):
    "Turn the tables of words and meanings into definitions that other pages can link"
    def turn(match):
        rows = [re.split(r"(?<!\\)\|", line)[1:3] for line in match[0].strip().split("\n")[2:]]
        terms = [f"{a.strip()}\n  {b.strip()}\n" for a, b in rows]
        return "\n".join(["", "```{glossary}", *terms, "```", ""])
    return re.sub(r"(?:^\|.*\|\n?)+", turn, text, flags=re.M)

def reference(site, pages):
    made = [p for p in pages if p.module]
    for page in made:
        path = page.module.replace(".", "/")
        source = (ROOT / f"{path}.py").read_text("utf-8")
        name = page.module.removesuffix(".__init__")
        text = api.reference(name, source, f"../{page.name}.ipynb", f"nbs/{page.name}.ipynb")
        site.write(f"api/{page.module}.md", text)
    called = {p.module: p.module.removesuffix(".__init__") for p in made}
    lines = [f"- [`{called[p.module]}`]({p.module}.md): {p.promise}" for p in made]
    names = [f"{name} <{module}>" for module, name in called.items()]
    site.write("api/index.md", "\n".join(
        ["# Reference", "", "> Every public name, with what its parameters and results are", "",
            "In the order of the alphabet: {ref}`genindex`.", "", *lines, "", tree(names)]))

def stage(folder):
    "Write all that Sphinx reads into a folder"
    site, pages = Site(folder), [Page(path) for path in notebooks()]
    for page in pages:
        if page.name == "glossary":
            page.cells = [[kind, as_glossary(text), c] for kind, text, c in page.cells]
        if page.name != "index": write_page(site, page)
    for name, to in TEXTS.items():
        text = (ROOT / name).read_text("utf-8")
        if to == "guide": text = re.sub(r"\A# .*", "# Guide", text)
        site.write(f"{to}.md", site.relinked(text, f"{to}.md", ROOT))
    top = [p for p in pages if p.number]
    def folder_pages(name): return [p for p in pages if p.name.startswith(f"{name}/")]
    found = [p for p in top if p.is_result]
    overview(site, "results", "Results", "One page a question, each with the figure or table that "
        "answers it, and what we find", {"": found})
    overview(site, "chapters", "Chapters", "The package, in the order in which it is built: a "
        "chapter uses only chapters before it", {"": [p for p in top if not p.is_result]})
    overview(site, "methods", "Methods", "One page a method, each in a few lines of code",
        by_kind(folder_pages("methods")))
    overview(site, "steps", "Steps", "The kinds of run that an experiment is made of",
        {"": folder_pages("steps")})
    start = ["guide", "glossary"]
    if lessons := folder_pages("tutorials"):
        overview(site, "tutorials", "Tutorials", "Small tasks from beginning to end", {"": lessons})
        start = ["tutorials", *start]
    gallery(site, found)
    reference(site, pages)
    index = next(p for p in pages if p.name == "index")
    write_page(site, index, tools(site, index), tree(start, "Start"),
        tree(["results", "gallery", "preregistration"], "The study"),
        tree(["chapters", "methods", "steps", "api/index"], "The package"),
        tree(["contributing", "changelog"], "The project"))

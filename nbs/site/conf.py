"""Sphinx's settings. Nothing on a page comes from another machine: no font, script or tracker; and
formulas are MathML, which browsers draw by themselves."""
import html
from docutils.nodes import SkipNode
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util.nodes import make_refnode

project = "unloc"
html_title = "unloc"
copyright = "The unloc contributors, Apache-2.0"
extensions = ["myst_nb", "sphinx_copybutton"]
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_favicon = "static/mark.svg"
html_copy_source = False
html_show_sphinx = False
html_math_renderer = "mathml"
smartquotes_action = "D" # dashes, as in lists of parameters; quotes stay as they are
exclude_patterns = ["files"] # what pages offer to download
nb_execution_mode = "off" # pages show their stored results
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
nb_render_markdown_format = "myst" # also in outputs, with tables
myst_enable_extensions = ["colon_fence", "dollarmath", "fieldlist"]
myst_heading_anchors = 3
copybutton_selector = "div:not(.output) > div.highlight pre"
pygments_dark_style = "github-dark"
python_maximum_signature_line_length = 60
add_module_names = False
toc_object_entries_show_parents = "hide"
suppress_warnings = ["misc.highlighting_failure", "mystnb.unknown_mime_type", "ref.python"]


def formula(tex, block):
    "Write a formula as MathML, or as code where docutils does not know a command"
    try: return tex2mathml(tex.replace(r"\dots", r"\ldots"), as_block=block)
    except MathError: return f"<code>{html.escape(tex)}</code>"

def visit_math(writer, node):
    writer.body.append(formula(node.astext(), False))
    raise SkipNode

def visit_display(writer, node):
    writer.body.append(f'<div class="formula">{formula(node.astext(), True)}</div>')
    raise SkipNode


def find_type(app, env, node, content):
    "Link a type of a signature to the one class of the package that has its name"
    if node.get("refdomain") != "py" or node.get("reftype") not in ("class", "obj"): return
    target = node["reftarget"]
    found = [
        (name, entry)
        for name, entry in env.domains["py"].objects.items()
        if name.rpartition(".")[2] == target and entry.objtype == "class"]
    if len(found) != 1: return
    (name, entry), = found
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, content, name)

def setup(app):
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_display, None))
    app.connect("missing-reference", find_type)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

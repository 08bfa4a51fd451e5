"""Every lesson of every module page runs in a fresh kernel, offline, and says to the letter what
the page says; of models trained on the page, all but the digits."""
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import pytest

nbformat = pytest.importorskip("nbformat", reason="lessons run in kernels")
NotebookClient = pytest.importorskip("nbclient", reason="lessons run in kernels").NotebookClient

NBS = Path(__file__).resolve().parents[1] / "nbs"
# a hundred steps of descent end in other digits on another kind of processor
TRAINED = (
    "10_training", "10_unlearning_run", "11_direct_supervision",
    "11_scene", "12_asking", "12_edit_metrics", "12_inside", "12_quantization",
    "12_relearn", "12_retaught",
    "13_layerwise", "13_neurons", "13_restoring", "13_tracing", "13_unlearning_token", "13_values",
    "14_deletion",
    *(f"methods/{name}" for name in (
        "benign", "krs", "layer_gradients", "lora", "restoring", "tgl")),
    *(f"methods/{name}" for name in ("alphaedit", "deletion", "forget_and_utility", "ft_l", "ft_m",
        "memit", "reset", "rome", "unierase")),
    *(f"steps/{p.stem}" for p in NBS.glob("steps/*.ipynb") if p.stem != "steps"))
PAGES = {
    p.relative_to(NBS).with_suffix("").as_posix(): p
    for p in [
        NBS / "index.ipynb",
        *sorted(NBS.glob("[01][0-9]_*.ipynb")),
        *sorted(NBS.glob("[a-z]*/*.ipynb"))]
    if p.parent.name != "tutorials"} # these have a test of their own


def said(cell): # texts as they are; of an image only that there is one
    out = []
    for o in cell.get("outputs", []):
        if o.output_type == "stream" and out and out[-1][:2] == ("stream", o.name):
            out[-1] = ("stream", o.name, out[-1][2] + o.text) # a kernel may flush in pieces
        elif o.output_type == "stream": out.append(("stream", o.name, o.text))
        else:
            out.append(
                (
                    o.output_type,
                    {
                        kind: content if kind.startswith("text/") else None
                        for kind, content in o.get("data", {}).items()}))
    return out

def lesson(path, env, folder=NBS): # what each code cell says: on the page, and now
    page = nbformat.read(path, 4)
    code = [cell for cell in page.cells if cell.cell_type == "code"]
    stored = [said(cell) for cell in code]
    NotebookClient(
        page,
        timeout=3600,
        startup_timeout=1200,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        extra_arguments=["--log-level=ERROR"]).execute(env=env)
    return [(cell.source, before, said(cell)) for cell, before in zip(code, stored)]

@pytest.fixture(scope="module")
def lessons(request, guarded): # two kernels at a time, those of the selected tests
    env = {k: v for k, v in guarded.items() if k != "UNLOC_TOFU"} | {"OMP_NUM_THREADS": "1"}
    with ThreadPoolExecutor(2) as pool:
        yield {
            name: pool.submit(lesson, path, env)
            for name, path in PAGES.items()
            if any(item.name == f"test_lesson[{name}]" for item in request.session.items)}
        pool.shutdown(cancel_futures=True)

@pytest.mark.parametrize("name", PAGES)
def test_lesson(lessons, name):
    digits = (
        (lambda x: re.sub(r"\d+(\.\d+)?|\binf\b", "#", str(x)))
        if name in TRAINED
        else (lambda x: x))
    for source, page, now in lessons[name].result(): assert digits(now) == digits(page), source

def test_no_lesson_left_the_machine(lessons, guarded):
    for future in lessons.values(): future.exception()
    assert Path(guarded["UNLOC_TEST_SOCKETS"]).read_text("utf-8") == ""

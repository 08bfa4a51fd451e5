"""Progress, as a person sees it: two bars in a terminal of any width, lines in a pipe, one output
in JupyterLab, and no word in a kernel that nobody watches."""
import contextlib, fcntl, os, pty, re, struct, subprocess, sys, termios
import pytest

WATCHED = """
import time
from unloc.progress import Watch, report
with Watch(pages=2) as watch:
    watch.begin('[1/2] 23_direct_supervision_of_a_long_name')
    report(stage='unlearn', ids=['a', 'b'], before=2, of=4)
    report(run='a', fraction=.5)
    time.sleep(.6)
    watch.say('  note: between the bars')
    for run in 'ab': report(run=run, fraction=1.)
    time.sleep(.6)
"""
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

def in_terminal(code, width, **env): # what the terminal got
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    kept = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen([sys.executable, "-c", code], stdin=other, stdout=other,
        stderr=other, env=kept | {"TERM": "xterm-256color"} | env)
    os.close(other)
    found = b""
    while True:
        try: part = os.read(main, 65536)
        except OSError: break # the terminal's other end is closed
        if not part: break
        found += part
    os.close(main)
    assert process.wait(60) == 0, found
    return found.decode("utf-8")

def drawn(text): # lines without colours and movements
    return [line for line in re.split(r"[\r\n]+", ESCAPES.sub("", text)) if line.strip()]

@pytest.mark.parametrize("width", [40, 80, 200])
def test_two_bars_fit_into_a_terminal(width):
    lines = drawn(in_terminal(WATCHED, width))
    assert max(map(len, lines)) <= width, lines
    bars = [line for line in lines if line.rstrip().endswith("left")]
    assert any(re.match(r"\[1/2\].* 31% .*:.*left", line) for line in bars), bars
    assert any(re.match(r"unl.* 0\.5 of 2 runs .*left", line) for line in bars), bars
    assert any("2.0 of 2 runs" in line for line in bars) and any(" 50%" in line for line in bars)
    assert all(re.search(r"\d:\d\d:\d\d +\S+ left", line) for line in bars) or width == 40
    assert "  note: between the bars" in lines
    assert not any("direct_supervision_of_a_long_name" in line for line in lines) or width > 80

def test_nothing_stays_of_the_bars_but_the_notes():
    text = in_terminal(WATCHED, 80)
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1, "the cursor is hidden and back"
    after = text.rpartition("left")[2]
    assert "\x1b[2K" in after and not ESCAPES.sub("", after).strip()

def test_a_dumb_terminal_and_a_pipe_get_lines():
    page = r"\[1/2\] 23_direct_supervision_of_a_long_name"
    want = page + r" unlearn 2\.0 of 2 runs, \d+ s so far, 0 s left"
    note = "  note: between the bars"
    piped = subprocess.run([sys.executable, "-c", WATCHED], capture_output=True, encoding="utf-8",
        env=os.environ | {"FORCE_COLOR": "1"})
    assert piped.stderr == "" and "\x1b" not in piped.stdout
    for lines in (piped.stdout.splitlines(), drawn(in_terminal(WATCHED, 80, TERM="dumb"))):
        assert len(lines) == 2 and lines[0] == note and re.fullmatch(want, lines[1]), lines

def test_lines_come_every_half_a_minute(monkeypatch, capsys):
    from unloc.progress import Lines
    now = [0.]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    shown = Lines()
    shown.page("page", 0, 1)
    shown.stage("attack", 4)
    for now[0], n in ((10., .5), (31., 1.), (40., 1.5), (62., 2.)): shown.reach(n, n / 4)
    assert capsys.readouterr().out.splitlines() == [
        "page attack 1.0 of 4 runs, 31 s so far, 93 s left",
        "page attack 2.0 of 4 runs, 62 s so far, 62 s left"]

def test_an_event_that_is_written_in_parts_is_read_whole(capsys):
    import time
    from unloc.progress import Lines, Watch
    with Watch(shown=Lines()) as watch:
        for part in ('{"note": "half', ' a line"}\n{"note": ', '"another"}\n'):
            with open(watch.path, "a", encoding="utf-8") as file: file.write(part)
            time.sleep(.5)
    assert [line.strip() for line in capsys.readouterr().out.splitlines()] == [
        "note: half a line", "note: another"]

# --- a sweep by itself

SWEPT = """
import json, tempfile, time
from unloc.runs import Store, sweep
def compute(description, parent, folder, progress):
    time.sleep(.4)
    (folder / 'result.json').write_text(json.dumps({}), 'utf-8')
folder = tempfile.TemporaryDirectory()
runs = [{'kind': 'child', 'n': n, 'parent': {'kind': 'first'}} for n in range(2)]
for _ in range(2): found = sweep(Store(folder.name + '/runs'), runs, compute=compute)
"""

def test_a_sweep_in_a_terminal_shows_its_own_bars():
    lines = drawn(in_terminal(SWEPT, 80))
    for want in (r"all runs.* 33%", r"first.* of 1 runs", r"child.*1\.0 of 2 runs", r".* 100%"):
        assert any(re.match(want, line) for line in lines), (want, lines)
    assert sum("first" in line for line in lines) < 20, "a second sweep has nothing to show"

def test_a_sweep_in_a_pipe_says_nothing():
    done = subprocess.run([sys.executable, "-c", SWEPT], capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

# --- in a kernel

@contextlib.contextmanager
def kernel(**env): # its client and its manager
    jupyter_client = pytest.importorskip("jupyter_client")
    kept = {k: v for k, v in os.environ.items() if k not in ("JPY_SESSION_NAME", "UNLOC_PROGRESS")}
    manager = jupyter_client.KernelManager(kernel_name="python3")
    manager.start_kernel(env=kept | env)
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=300)
        yield client, manager
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)

def in_kernel(code, **env): # its messages
    found = []
    with kernel(**env) as (client, _):
        client.execute_interactive(code, timeout=300, output_hook=found.append)
    assert not [m for m in found if m["msg_type"] == "error"], found
    return [m for m in found if m["msg_type"] in ("stream", "display_data", "update_display_data")]

def test_a_notebook_with_a_person_shows_bars_in_one_output_and_keeps_nothing():
    found = in_kernel(SWEPT, JPY_SESSION_NAME="here.ipynb")
    kinds = [m["msg_type"] for m in found]
    assert kinds.count("display_data") == 1 and {*kinds[1:]} == {"update_display_data"}
    texts = [m["content"]["data"].get("text/plain", "") for m in found]
    assert any(re.search(r"all runs.* 33%.*\n.*child.* of 2 runs", text) for text in texts), texts
    assert found[-1]["content"]["data"] == {} and not any("\x1b" in text for text in texts)

def test_a_notebook_that_nobody_watches_has_no_output():
    assert in_kernel(SWEPT) == []

LONG = """
import json, tempfile, time
from unloc.runs import Store, sweep
done, folder = [], tempfile.TemporaryDirectory()
def compute(description, parent, folder, progress):
    time.sleep(.5)
    (folder / 'result.json').write_text(json.dumps({}), 'utf-8')
    done.append(description['n'])
runs = [{'kind': 'child', 'n': n} for n in range(6)]
"""
CELL = "found = sweep(Store(folder.name + '/runs'), runs, compute=compute)"

def test_a_cell_that_is_stopped_has_one_line_and_goes_on_where_it_was():
    with kernel(JPY_SESSION_NAME="here.ipynb") as (client, manager):
        client.execute_interactive(LONG, timeout=300)
        errors, stopped = [], []
        def watch(message):
            text = str(message["content"].get("data", {}))
            if message["msg_type"] == "error": errors.append(message["content"])
            if re.search(r"[1-4]\.0 of 6 runs", text) and not stopped:
                stopped.append(text)
                manager.interrupt_kernel()
        client.execute_interactive(CELL, timeout=300, output_hook=watch)
        assert [error["traceback"] for error in errors] == [
            ["Interrupted: finished runs are kept; run the cell again to go on"]]
        said = []
        client.execute_interactive(f"before = len(done)\n{CELL}\nprint(before, done, len(found))",
            timeout=300, output_hook=lambda m: said.append(m["content"].get("text", "")))
    before, rest = "".join(said).strip().split(" ", 1)
    assert 1 <= int(before) < 6 and rest == "[0, 1, 2, 3, 4, 5] 6"

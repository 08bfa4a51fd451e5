"""Build the site, offline, from the notebooks and their stored results: build.py [FOLDER]"""
import shutil, sys, tempfile, time
from pathlib import Path

from sphinx.cmd.build import main

from stage import ROOT, stage

def build(folder): # where the pages go; an earlier site there is replaced
    "Stage the pages and run Sphinx"
    with tempfile.TemporaryDirectory() as work:
        source, made = Path(work, "pages"), Path(work, "html")
        stage(source)
        options = ["-q", "-j", "2", "-b", "html", "-c", str(Path(__file__).parent)]
        if failed := main([*options, "-d", f"{work}/doctrees", str(source), str(made)]):
            return failed
        if (folder / ".buildinfo").is_file(): shutil.rmtree(folder) # Sphinx made it
        shutil.copytree(made, folder, dirs_exist_ok=True)
    return 0

if __name__ == "__main__":
    start, folder = time.perf_counter(), Path(sys.argv[1] if sys.argv[1:] else ROOT / "build/site")
    if failed := build(folder.resolve()): sys.exit(failed)
    print(f"{folder}/index.html, {time.perf_counter() - start:.0f} s")

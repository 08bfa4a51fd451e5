"""Build the site, offline, from the notebooks and their stored results: build.py [FOLDER]"""
import sys, time
from pathlib import Path

from sphinx.cmd.build import main

from stage import ROOT, stage

def build(folder): # where the pages go; what Sphinx reads is beside them
    "Stage the pages and run Sphinx"
    source = folder.with_name(f"{folder.name}-source")
    stage(source)
    here = str(Path(__file__).parent)
    return main(["-q", "-E", "-j", "2", "-b", "html", "-c", here, str(source), str(folder)])

if __name__ == "__main__":
    start, folder = time.perf_counter(), Path(sys.argv[1] if sys.argv[1:] else ROOT / "build/site")
    failed = build(folder.resolve())
    print(f"{folder}/index.html, {time.perf_counter() - start:.0f} s")
    sys.exit(failed)

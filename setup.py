"Let a wheel carry the result pages, their profiles and the manuscript; everything else is in pyproject.toml"
import shutil
from pathlib import Path
from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
CARRIED = "settings.ini", "nbs/[2-9][0-9]_*.ipynb"

class BuildWithPages(build_py):
    def run(self):
        super().run()
        if self.editable_mode: return
        for pattern in CARRIED:
            for file in sorted(ROOT.glob(pattern)):
                to = Path(self.build_lib, "unloc", "project", file.relative_to(ROOT))
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, to)

setup(cmdclass={"build_py": BuildWithPages})

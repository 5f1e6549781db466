"""The report of a run: report.html, one standalone page, and the picture for a README.

python -m kvsieve.compare.report RUN_FOLDER                              # writes RUN_FOLDER/report.html
python -m kvsieve.compare.report RUN_FOLDER --picture quickstart.png     # or .svg
"""

from pathlib import Path

from .. import files
from . import figure
from .folder import read
from .page import render

__all__ = ["write_picture", "write_report"]


def write_report(run_folder: Path) -> Path:
    """Write report.html into the folder of a run and return its path.

    Raises:
        UserError: the folder holds no summary, or the page cannot be written.
    """
    path = Path(run_folder) / "report.html"
    files.write(path, render(read(Path(run_folder))))
    return path


def write_picture(run_folder: Path, path: Path) -> Path:
    """Draw score against bytes read for needle and repetition (or the first two tasks): a .png or .svg file.

    Raises:
        UserError: as write_report; the file's name ends in something else; or it ends in .png and the extra
            `report` is not installed.
    """
    path = Path(path)
    files.write(path, figure.render(read(Path(run_folder)).results, path))
    return path

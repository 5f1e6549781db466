"""What a run shows: report.html, one standalone page, and the picture for a README.

python -m kvsieve.compare.report RUN_FOLDER                              # writes RUN_FOLDER/report.html
python -m kvsieve.compare.report RUN_FOLDER --picture quickstart.png     # or .svg
"""

from pathlib import Path

from ...errors import UserError
from .results import read

__all__ = ["write_picture", "write_report"]


def write_report(run_folder: Path) -> Path:
    """Write report.html into the folder of a run and return its path.

    Raises:
        UserError: the folder holds no summary, the page cannot be written, or the extra `report` is missing.
    """
    from .page import render  # needs the extra

    results = read(Path(run_folder))
    path = Path(run_folder) / "report.html"
    _write(path, render(results).encode())
    return path


def write_picture(run_folder: Path, path: Path) -> Path:
    """Draw score against bytes read for needle and repetition (or the first two tasks): a .png or .svg file.

    Raises:
        UserError: as write_report; or the file's name ends in something else.
    """
    from .picture import render

    path = Path(path)
    image = render(read(Path(run_folder)), path.suffix)
    _write(path, image)
    return path


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None

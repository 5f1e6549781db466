"""The command line of the report: `python -m kvsieve.compare.report`."""

import argparse
import sys
from pathlib import Path

from ...errors import UserError
from . import write_picture, write_report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kvsieve.compare.report", description="Report on a finished run."
    )
    parser.add_argument("run_folder", type=Path, help="the folder that holds summary.csv")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw this .png or .svg instead of report.html"
    )
    options = parser.parse_args(arguments)
    try:
        written = (
            write_picture(options.run_folder, options.picture)
            if options.picture
            else write_report(options.run_folder)
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(written)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The small trained model that ships, and the scripts that made it."""

from pathlib import Path

# Its name wherever a model is asked for.
NAME = "reference"
FOLDER = Path(__file__).parent / "model"

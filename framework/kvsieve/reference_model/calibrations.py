"""Measure the calibrations of the reference model: `python -m kvsieve.reference_model.calibrations`.

Again after every change of its weights; a test says when. On the text that it was trained on.
"""

from .. import calibration, corpus
from ..hf.models import load
from . import NAME

SAMPLES, LENGTH = 16, 512  # pieces of text, and tokens in each


def main() -> None:
    model, text = load(NAME), corpus.training_text()
    pieces = calibration.pieces(model, text, SAMPLES, LENGTH)
    calibration.SHIPPED.mkdir(exist_ok=True)
    for method, tensors in (
        ("double_sparsity", calibration.measure_channels(model, pieces, "qk")),
        ("duo_attention", calibration.measure_retrieval(model, pieces)),
        ("loki", calibration.measure_basis(model, pieces)),
    ):
        file = calibration.SHIPPED / f"{method}.safetensors"
        calibration.write(file, tensors, model, corpus.digest(text))
        print(file)


if __name__ == "__main__":
    main()

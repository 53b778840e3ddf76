"""The bundled model at sizes between the uniform ones."""

import math
from pathlib import Path

import pytest

from elutq.calibration import sample_text
from elutq.eval import evaluate
from elutq.models import bundled_model
from elutq.quantize import quantize
from elutq.runtime import load

pytest.importorskip("torch", reason="needs pip install '.[quantize]'")
pytest.importorskip("transformers")


@pytest.mark.slow
def test_better_than_between_uniform_models(tmp_path: Path) -> None:
    """Uniform 2 and 3 bits span a line of log KL over bits per weight; both targets are well below it."""
    full = load(bundled_model())
    ids = sample_text(full, 28, 160, seed=3)
    text = tmp_path / "calibration.txt"
    text.write_text("\n<|endoftext|>\n".join(full.tokenizer.decode(row[1:].tolist()) for row in ids[:12]))
    held_out = ids[12:].ravel().tolist()

    def kl(folder: Path) -> float:
        with load(folder) as model:
            return evaluate(model, held_out, 160, reference=full).kl or math.inf

    low, high = 2.375, 3.5
    for bits in (2, 3):
        quantize(bundled_model(), tmp_path / f"{bits}", bits=bits)
    log_low, log_high = (math.log(kl(tmp_path / f"{bits}")) for bits in (2, 3))
    for target in (2.5, 3.0):
        out = tmp_path / f"{target}"
        report = quantize(
            bundled_model(), out, target_bpw=target, calibration=[str(text)], calibration_length=64
        )
        assert 0.995 * target < report.summary.linear_bits_per_weight <= target
        share = (target - low) / (high - low)
        found = kl(out)
        assert math.log(found) < (1 - share) * log_low + share * log_high - 0.03
        assert report.sensitivity is not None
        assert report.sensitivity["expected_kl"] == pytest.approx(found, rel=0.5)

"""What a quantizer looks at: windows of tokens from files, data sets or the model's own words."""

from elutq.calibration.load import SELF, Calibration, load_calibration
from elutq.calibration.self_text import sample_text

__all__ = ["SELF", "Calibration", "load_calibration", "sample_text"]

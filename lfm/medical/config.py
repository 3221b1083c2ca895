"""What switches medical mode on, and how sure it must be."""

from pydantic import Field

from lfm.config import Config


class MedicalConfig(Config):
    mode: bool = False
    """Answer only with a calibrated probability, or abstain; needs what `lfm medical fit` and `calibrate` write."""
    safety_threshold: float = Field(default=0.85, gt=0, lt=1)
    """Least probability of being right with which an answer is given; the certified threshold applies where it is
    stricter."""

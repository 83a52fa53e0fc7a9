"""Position-aware entropy calibration: score, soft mask, anchor and penalty, on top of TokenStats."""

from paec_kernels.calibration.config import PAECConfig
from paec_kernels.calibration.paec import PAEC, PAECOutput, Plan

__all__ = ["PAEC", "PAECConfig", "PAECOutput", "Plan"]

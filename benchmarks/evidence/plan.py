"""The experiment, fixed before its runs: families, arms with their grids, seeds, outcomes, planned comparisons."""

import hashlib
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

from paec_kernels.train.config import TrainConfig
from paec_kernels.train.models.warm_start import first_solutions
from paec_kernels.train.presets import PRESETS
from paec_kernels.train.tasks.long_families import LONG_FAMILIES

FAMILIES = tuple(LONG_FAMILIES)
WARM_STARTS = 4  # seed s begins with that of s modulo this
GRID_SEEDS = range(100, 102)
SEEDS = range(16)


class Arm(NamedTuple):
    """An arm of `paec compare` but for its main coefficient, which is the best of a grid on seeds of their own."""

    what: str  # in words
    method: str  # NAME or NAME,FIELD=VALUE,...
    coefficient: str | None = None  # the field
    grid: tuple[float, ...] = ()

    def spelled(self, value: float | None) -> str:
        """Return the arm as `paec compare` reads it."""
        return self.method if self.coefficient is None else f"{self.method},{self.coefficient}={value:g}"

    @property
    def candidates(self) -> list[str]:
        return [self.spelled(value) for value in self.grid] or [self.method]


ARMS = {
    "grpo": Arm("GRPO with asymmetric clipping, nothing for entropy", "grpo"),
    "oracle": Arm(
        "PAEC whose mask is told: the forks and nothing else, with a floor there",
        "oracle",
        "paec.rho_min",
        (0.2, 0.4, 0.8),
    ),
    "global": Arm("a bonus on the entropy of all tokens", "global", "bonus.coef", (0.003, 0.01, 0.03)),
    "paec": Arm("PAEC at its defaults", "paec", "paec.lam", (0.2, 1, 5)),
    "paec-relative": Arm(
        "PAEC with the relative penalty", "paec,paec.penalty=relative", "paec.lam", (0.001, 0.005, 0.025)
    ),
    "paec-proportional": Arm(
        "PAEC with the proportional penalty", "paec,paec.penalty=proportional", "paec.lam", (0.05, 0.2, 0.8)
    ),
    "paec-integral": Arm(
        "PAEC with the integral penalty", "paec,paec.penalty=integral", "paec.lam", (0.001, 0.005, 0.025)
    ),
    "paec-batch-anchor": Arm(
        "PAEC whose anchor is the mean of four batches, not of four optimiser steps",
        "paec,paec.anchor_unit=rollout_batch",
        "paec.lam",
        (0.2, 1, 5),
    ),
    # Where fewer than a fifth of the tokens are uncertain, or many more, the default's threshold is no place between.
    "paec-sharp-mask": Arm("PAEC with a sharp mask, tau_m .01", "paec,paec.tau_m=0.01", "paec.rho", (0.7, 0.8, 0.9)),
    # Of all tokens, or of the top fifth, which harmless choices fill, the mean falls little while forks collapse. So a
    # floor at 0.8 of the anchor never acts, and lam is no dial: values of it that were run in carry+ gave the same run.
    "paec-hard-mask": Arm(
        "PAEC with a hard mask, the top fifth of the scores; penalty proportional, lam .2",
        "paec-hard-mask,paec.penalty=proportional,paec.lam=0.2",
        "paec.rho_min",
        (1, 1.2, 1.5),
    ),
    "paec-no-mask": Arm(
        "PAEC without a mask: one floor for all tokens; penalty proportional, lam .2",
        "paec-no-mask,paec.penalty=proportional,paec.lam=0.2",
        "paec.rho_min",
        (1, 1.2, 1.5),
    ),
    "paec-no-penalty": Arm(
        "PAEC without its floor: the bonus under the mask", "paec-no-penalty", "paec.beta", (0.003, 0.01, 0.03)
    ),
    "paec-scores": Arm(
        "PAEC whose mask is chosen by the initial policy's scores", "paec,paec.anchored=scores", "paec.lam", (0.2, 1, 5)
    ),
    "paec-positions": Arm(
        "as paec-scores, and a floor for each position: a share of the initial policy's entropy there",
        "paec,paec.anchored=positions",
        "paec.rho_min",
        (0.2, 0.4, 0.8),
    ),
    "siren": Arm("SIREN", "siren", "siren.coef", (0.005, 0.05, 0.5)),
    # For the same reason a target of 0.4, the reported one, may never act, and coef_step be no dial.
    "aer": Arm("AER, coef_step .05", "aer,aer.coef_step=0.05", "aer.target_ratio", (0.4, 0.9, 1.1)),
    "clip-cov": Arm("Clip-Cov", "clip-cov", "fraction", (2e-4, 2e-3, 2e-2)),
    "kl-cov": Arm("KL-Cov", "kl-cov", "fraction", (2e-4, 2e-3, 2e-2)),
    "cispo": Arm("CISPO", "cispo", "clip_high", (0.28, 1, 4)),
}
BASELINE = "grpo"
# Each outcome is tested over these alone, adjusted by Holm; all else is exploratory. The primary outcome decides, over
# all families together; single families and the other outcomes tell where and how.
PLANNED = (("oracle", "grpo"), ("paec", "grpo"), ("paec-positions", "grpo"), ("paec-positions", "paec"))
# Told beside each other arm's comparison with the baseline, unadjusted: what the mask's parts are worth.
EXPLORED = (
    ("paec-no-mask", "paec-proportional"),
    ("paec-no-mask", "paec"),
    ("paec-sharp-mask", "paec"),
    ("paec-hard-mask", "paec"),
    ("paec-hard-mask", "paec-proportional"),
    ("paec-hard-mask", "paec-no-mask"),  # the same penalty, strength and dial
    ("paec-no-penalty", "paec"),
    ("paec-scores", "paec"),
    ("paec-positions", "paec-hard-mask"),
    ("paec-positions", "global"),
)
PLANNED_ARMS = tuple(dict.fromkeys([BASELINE, *(arm for pair in PLANNED for arm in pair)]))
DISCOVERED = 0.75  # of prompts mostly right: the easy half, and half of the hard one
WINDOW = 10  # batches of a running mean
PRIMARY = "area"  # the mean of prompts mostly right over all batches, of what finds sooner and keeps it
OUTCOMES = (PRIMARY, "discovery", "maj@16", "pass@16")


def config(family: str, cache: Path) -> TrainConfig:
    """Return the options that all arms of a family share."""
    return replace(PRESETS["long"], tasks=(family,), cache=cache)


@cache
def fingerprint(family: str) -> str:
    """Return what tells a family's runs from those made before it was changed: a hash of what it asks and teaches."""
    drawn = first_solutions([LONG_FAMILIES[family]], PRESETS["long"].warm_start)
    return hashlib.sha256(json.dumps(drawn).encode()).hexdigest()[:12]

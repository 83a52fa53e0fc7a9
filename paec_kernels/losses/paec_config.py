"""The constants of PAEC."""

from dataclasses import dataclass

from paec_kernels import checks

NUCLEUS_NORMS = ("log_size", "log_vocab", "none")
ENTROPY_SUPPORTS = ("full", "nucleus")
PENALTIES = ("absolute", "relative", "proportional", "integral")
# Relative, a position where the anchor policy is certain has a floor near 0, of which any shortfall is all; an integral
# strength is one for all positions.
OF_POSITIONS = ("absolute", "proportional")
ANCHORED = ("mean", "scores", "positions")
ANCHOR_UNITS = ("optimiser_step", "rollout_batch")


@dataclass(frozen=True)
class PAECConfig:
    """Constants of PAEC (arXiv 2606.08543), each checked at construction.

    Marks: [paper] the abstract says so, [reported] public summaries of the text say so, [ours] a choice of
    this package where the text that we have is silent. Entropies and log-probabilities are in nats.

    Attributes:
        top_p: probability mass of the nucleus, in (0, 1]. Its use is [paper], the value [ours].
        nucleus_norm: what divides the nucleus entropy H_p: ``"log_size"`` (log|S|; the result is in [0, 1]),
            ``"log_vocab"`` (log of ``vocab_size``) or ``"none"``. That it is normalised is [reported], by
            what is [ours].
        alpha: weight in [0, 1] of the nucleus entropy in the score; 1 - alpha weighs the top-two competition.
            The weighted sum is [reported], the value [ours].
        tau_c: scale of the competition exp(-margin / tau_c), in nats, > 0. [ours]
        rho: quantile in [0, 1] of the scores at which the soft mask is 1/2; 0.8 keeps the top fifth.
            [reported]
        tau_m: width of the soft mask's sigmoid, in units of the score, > 0. A soft mask is [paper], the
            value [ours].
        beta: weight of the masked mean entropy (a bonus), >= 0, per nat. [ours]
        lam: weight of the penalty, >= 0; per square nat where that is absolute, a pure number where it is relative, per
            nat where it is proportional, per nat and step where it is integral. [ours]
        penalty: ``"absolute"``, max(0, floor - H_bar)^2 [reported]; ``"relative"``, max(0, 1 - H_bar / floor)^2
            [ours]; ``"proportional"``, max(0, floor - H_bar)^2 / floor [ours]. These are equal at a floor of 1 nat. At
            the same H_bar / floor the force of the absolute one falls with the floor, that of the relative one grows
            as 1 / floor, and that of the proportional one, 2 lam (1 - H_bar / floor), is the same at any floor.
            ``"integral"`` [ours] is -c H_bar, whose strength c is 0 at first and after each step becomes
            max(0, c + lam (1 - H_bar / floor)): it grows until the floor is reached, and stays where that takes force.
            All are nothing where the floor is 0. With ``anchored="positions"`` it is absolute or proportional.
        rho_min: the entropy floor as a fraction of the anchor, >= 0. The floor is [reported], the value
            [ours].
        anchored: what the anchor is [ours beyond the first]. ``"mean"``: a number, the masked mean entropy of the first
            steps [reported]. ``"scores"``: the position scores, too, are those of an anchor policy, such as a frozen
            copy of the initial one or the reference of a KL term, so that a fork whose entropy has collapsed stays
            selected. ``"positions"``: moreover each position has a floor of its own, rho_min times the anchor policy's
            entropy there, so that harmless choices cannot make up for a collapsed fork; ``anchor_steps`` is unused.
        anchor_steps: steps whose masked mean entropy is averaged into the anchor, >= 1. [reported]
        anchor_unit: what these steps are: ``"optimiser_step"``, or ``"rollout_batch"``, all optimiser steps that the
            trainer takes on a batch of rollouts. "Step" can be read either way, hence [ours].
        entropy_support: ``"full"``, the entropy of the whole distribution, or ``"nucleus"``, that of the
            nucleus. [ours]
        vocab_size: vocabulary size, >= 2; needed by ``nucleus_norm="log_vocab"``, otherwise unused. [ours]

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of its range; both name the field, its value and what was expected.
    """

    top_p: float = 0.95
    nucleus_norm: str = "log_size"
    alpha: float = 0.5
    tau_c: float = 1.0
    rho: float = 0.8
    tau_m: float = 0.05
    beta: float = 0.005
    lam: float = 1.0
    rho_min: float = 0.8
    anchor_steps: int = 4
    entropy_support: str = "full"
    vocab_size: int | None = None
    penalty: str = "absolute"
    anchor_unit: str = "optimiser_step"
    anchored: str = "mean"

    def __post_init__(self) -> None:
        checks.number_field(self, "top_p", above=0, most=1)
        for name in ("alpha", "rho"):
            checks.number_field(self, name, least=0, most=1)
        for name in ("tau_c", "tau_m"):
            checks.number_field(self, name, above=0)
        for name in ("beta", "lam", "rho_min"):
            checks.number_field(self, name, least=0)
        checks.integer_field(self, "anchor_steps", least=1)
        checks.one_of("PAECConfig.nucleus_norm", self.nucleus_norm, NUCLEUS_NORMS)
        checks.one_of("PAECConfig.entropy_support", self.entropy_support, ENTROPY_SUPPORTS)
        checks.one_of("PAECConfig.penalty", self.penalty, PENALTIES)
        checks.one_of("PAECConfig.anchor_unit", self.anchor_unit, ANCHOR_UNITS)
        checks.one_of("PAECConfig.anchored", self.anchored, ANCHORED)
        if self.anchored == "positions" and self.penalty not in OF_POSITIONS:
            raise ValueError(
                f"PAECConfig.penalty must be one of {OF_POSITIONS} with anchored='positions', got {self.penalty!r}"
            )
        if self.vocab_size is not None:
            checks.integer_field(self, "vocab_size", least=2)
        elif self.nucleus_norm == "log_vocab":
            raise ValueError("PAECConfig.vocab_size is None, but nucleus_norm='log_vocab' needs an int >= 2")

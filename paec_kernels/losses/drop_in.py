"""The drop-in: GRPO and PAEC from one pass over the logits."""

import torch.distributed as dist
from torch import Tensor, nn

from paec_kernels import checks
from paec_kernels.losses.paec import PAEC, PAECOutput
from paec_kernels.losses.paec_config import PAECConfig
from paec_kernels.losses.policy import check_numbers, grpo_loss
from paec_kernels.losses.ranks import mean_over_ranks
from paec_kernels.ops.operator import check_options, token_stats
from paec_kernels.types import TokenStats


class PAECLoss(nn.Module):
    """GRPO's loss plus PAEC's, of one optimiser step; the anchor is in ``state_dict``.

    ::

        out = loss_fn(logits, token_ids, advantages, valid, old_logp)
        out.loss.backward(); optimizer.step(); loss_fn.step()

    One call is a whole optimiser step, over the ranks of ``process_group``: the losses of all ranks average
    to that of the whole batch, as DistributedDataParallel averages their gradients. With gradient
    accumulation use ``token_stats``, ``grpo_loss(normalizer=...)`` and ``PAEC.observe/plan/term``.

    Args:
        config: PAEC's constants, ``top_p`` included.
        clip_low, clip_high, kl_coef: as in ``grpo_loss``.
        temperature, softcap, vocab_size, inplace_backward, backend: as in ``token_stats``; log-probabilities
            and entropies are those of the scaled logits.
        process_group, steps_per_batch: as in ``PAEC``.
        vocab_group: as in ``token_stats``, whose ranks have the same positions: ``process_group`` is then of those that
            have others, or of this rank alone.

    Raises:
        TypeError, ValueError: an option of the wrong type or range, by name, when the module is made.
    """

    def __init__(
        self,
        config: PAECConfig,
        *,
        clip_low: float = 0.2,
        clip_high: float = 0.28,
        kl_coef: float = 0.0,
        temperature: float | Tensor = 1.0,
        softcap: float | None = None,
        vocab_size: int | None = None,
        inplace_backward: bool = False,
        process_group: dist.ProcessGroup | None = None,
        vocab_group: dist.ProcessGroup | None = None,
        steps_per_batch: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.paec = PAEC(config, process_group, steps_per_batch=steps_per_batch, backend=backend)
        self.clip_low, self.clip_high, self.kl_coef, _ = check_numbers(clip_low, clip_high, kl_coef)
        _, self.temperature, self.softcap, self.vocab_size = check_options(
            config.top_p, temperature, softcap, vocab_size
        )
        checks.boolean("inplace_backward", inplace_backward)
        if vocab_group is not None:
            checks.instance("vocab_group", vocab_group, dist.ProcessGroup)
        self.inplace_backward = inplace_backward
        self.vocab_group = vocab_group
        self.backend = backend

    def forward(
        self,
        logits: Tensor,
        token_ids: Tensor,
        advantages: Tensor,
        valid: Tensor,
        old_logp: Tensor,
        ref_logp: Tensor | None = None,
        *,
        anchor_stats: TokenStats | None = None,
    ) -> PAECOutput:
        """Compute the loss of this rank's tokens, its mask, and the metrics of ``grpo_loss`` and ``PAEC``.

        Args:
            logits: ``[..., V]``, each row predicting the token of ``token_ids`` at the same place.
            token_ids: integer ``[...]``, the sampled tokens.
            advantages: ``[...]`` or ``[..., 1]``.
            valid: bool ``[...]``, True at response tokens; other rows of the logits are not read.
            old_logp, ref_logp: ``[...]``, of the sampling and of the reference policy, at ``temperature``.
            anchor_stats: as in ``PAEC.observe``, at ``temperature``.
        Returns:
            PAECOutput: loss 0-d, mask ``[...]``; the metrics also hold ``policy_loss`` and ``paec_loss``, of this rank.
        """
        for name, value in (("token_ids", token_ids), ("valid", valid)):
            if value is None:  # which `token_stats` would take
                raise TypeError(f"{name} must be a tensor, got None")
        stats = token_stats(
            logits,
            token_ids,
            valid=valid,
            top_p=self.paec.config.top_p,
            temperature=self.temperature,
            softcap=self.softcap,
            vocab_size=self.vocab_size,
            inplace_backward=self.inplace_backward,
            vocab_group=self.vocab_group,
            backend=self.backend,
        )
        policy_loss, metrics = grpo_loss(
            stats.logp,
            old_logp,
            advantages,
            valid,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            ref_logp=ref_logp,
            kl_coef=self.kl_coef,
            normalizer=mean_over_ranks(valid.sum(), self.paec.process_group),
        )
        calibrated = self.paec(stats, valid, anchor_stats=anchor_stats)
        metrics |= calibrated.metrics
        metrics |= {"policy_loss": policy_loss.detach(), "paec_loss": calibrated.loss.detach()}
        return PAECOutput(policy_loss + calibrated.loss, calibrated.mask, metrics)

    def step(self) -> None:
        """Commit this optimiser step's mean entropy; see ``PAEC.step``."""
        self.paec.step()

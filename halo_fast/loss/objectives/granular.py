"""Gran-DPO: the video and every patch have their own preference."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from halo_fast.loss import ops
from halo_fast.loss.inputs import Inputs
from halo_fast.loss.objectives.base import PairObjective, Table, logit_scale
from halo_fast.loss.reference import TableNumbers, table_of_volumes

__all__ = ["GranDPO", "fused_table"]

_CLASSES = {"pooled": "PooledDPO", "kto": "DiffusionKTO", "mapo": "MaPO", "regression": "WeightedRegression"}


@dataclass(frozen=True)
class GranDPO(PairObjective):
    """A granular DPO objective: weights, betas and link of the loss.

    One pair has the loss
        video_weight w_v phi(z_v) + patch_weight sum_p w_p phi(z_p) / sum_p w_p
        + sft_weight E(video winner) + patch_sft_weight mean of E_p over the pair's winning patches
        + anchor_weight (||o_a - o_ref,a||^2 + ||o_b - o_ref,b||^2) / N
    with z = -(beta kappa / 2) s D, s = sign(r_a - r_b), w = |r_a - r_b|^gamma where |r_a - r_b| > delta, else 0.

    Args:
        video_weight: weight of the video's term, at least 0.
        patch_weight: weight of the patches' term, at least 0.
        video_beta: above 0, multiplies half a MEAN squared error; ``convert_beta`` translates other conventions. A 0-d
            tensor may stand for a float: a schedule then compiles once.
        patch_beta: likewise; None is video_beta / sqrt(P).
        link: phi, one of sigmoid, conservative, robust, hinge, ipo, kto, poly.
        label_smoothing: share of wrong labels, in [0, 1/2); for the links conservative and robust only.
        patch_gamma: exponent of a patch's weight.
        patch_delta: a gap of patch rewards up to this is a tie.
        video_gamma: exponent of a video's weight.
        video_delta: a gap of video rewards up to this is a tie.
        sft_weight: weight of the error of the winning video.
        patch_sft_weight: weight of the mean error of the winning patches.
        anchor_weight: weight of the squared distance to the reference's predictions.
        loser_guard: "video" or "patch" scales the loser's gradient by clip((1 - loser_guard_mu) |g_w|^2 / <g_w, g_l>,
            0, 1) where <g_w, g_l> > 0, over the video or over each patch; None does not.
        form: always "H1"; other values raise. Kept for callers that pass it.
        loser_guard_mu: mu of the guard, between 0 and 1; at 1 a loser that opposes its winner has no gradient.
        poly_alpha: a of the link poly, softplus(-z) + a (1 - sigma(z)), at least -1: above 0 for noisy labels, below 0
            for pairs that are too easy; 0 is sigmoid.
        video_cap: above 0; the video's phi(z) becomes phi(min(z, video_cap)). A video whose logit is beyond the cap has
            no gradient from its preference; at the cap itself it has. It stays in the mean. None is no cap.
        patch_cap: likewise, for the logit of each patch.

    Raises:
        TypeError, ValueError: naming the field.

    Source: own formulation after HALO, arXiv 2502.06812; the guard is Diffusion-SDPO's, arXiv 2511.03317; poly is
    Poly-DPO's, arXiv 2604.24953.
    """

    form: str = "H1"

    def __post_init__(self) -> None:
        if self.form != "H1":
            names = _CLASSES.get(self.form, ", ".join(_CLASSES.values()))
            raise ValueError(
                f"form must be one of 'H1'; got {self.form!r}: use {names} of halo_fast.loss.objectives, or an "
                "Objective of your own"
            )
        super().__post_init__()

    def table(self, inputs: Inputs) -> Table:
        """Loss, coefficients and logits of B pairs."""
        log_ratio, error, loser_scale = self.errors(inputs)
        scale, numbers = _numbers(self, inputs)
        supervision = error if self.supervised or self.loser_guard else None
        tables = log_ratio, inputs.patch_rewards, inputs.video_rewards, scale, supervision, loser_scale
        # kernels know the sizes of patches that divide all frames
        found: tuple[Tensor, ...] = (
            table_of_volumes(*tables, inputs.volume(log_ratio), self.link, numbers)
            if inputs.given
            else ops.gran_dpo_table(*tables, inputs.latent_shape, self.link, numbers)
        )
        loss, coefficients, video_logits, patch_logits, active = found
        return Table(loss, coefficients, video_logits, patch_logits, active, log_ratio, error)


def fused_table(objective: object, policy: Tensor, inputs: Inputs) -> Table | None:
    """The table of a plain ``GranDPO`` from one operator, its loss differentiable in ``policy``; None of anything else.

    Args:
        objective: fused if it is a ``GranDPO`` without a loser guard, and no frame is given.
        policy: [2B, C, F, H, W], the prediction with its graph.
        inputs: of the same call.
    """
    if type(objective) is not GranDPO or objective.loser_guard or inputs.given:
        return None
    scale, numbers = _numbers(objective, inputs)
    loss, coefficients, video_logits, patch_logits, active, log_ratio, error = ops.gran_dpo(
        policy, inputs.reference, inputs.target, inputs.reference_error, inputs.patch_rewards, inputs.video_rewards,
        scale, inputs.grid, objective.link, numbers,
    )  # fmt: skip
    # where nothing needed the errors, the operator's table of them is empty
    known = error if inputs.reference is None or numbers.supervised else None
    return Table(loss, coefficients, video_logits, patch_logits, active, log_ratio, known)


def _numbers(objective: GranDPO, inputs: Inputs) -> tuple[Tensor | None, TableNumbers]:
    """What the operators take beside tables: the scale of the logits and the numbers."""
    video_beta, patch_beta, scale = logit_scale(objective, inputs, inputs.prediction.shape[0] // 2)
    numbers = TableNumbers(
        link_parameter=objective.link_parameter,
        video_weight=objective.video_weight,
        patch_weight=objective.patch_weight,
        video_beta=video_beta,
        patch_beta=patch_beta,
        video_gamma=objective.video_gamma,
        video_delta=objective.video_delta,
        patch_gamma=objective.patch_gamma,
        patch_delta=objective.patch_delta,
        sft_weight=objective.sft_weight,
        patch_sft_weight=objective.patch_sft_weight,
        video_cap=objective.caps[0],
        patch_cap=objective.caps[1],
    )
    return scale, numbers

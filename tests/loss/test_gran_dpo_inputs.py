"""Every argument wrong in the ways that happen: the error names the argument, what was expected, what came, what to
do.
"""

import pytest
import torch

from halo_fast import (
    GranDPO,
    gran_dpo,
    gran_dpo_coefficients,
    patch_error,
    patch_log_ratio,
    patch_weighted_mse,
    timestep_weight,
    unpack_tokens,
    using_backend,
)
from halo_fast.loss.objectives import local_dpo_rewards, video_dpo_rewards

SHAPE, GRID = (4, 3, 4, 5, 6), (2, 2, 3)
INF = float("inf")


def good():
    generator = torch.Generator().manual_seed(0)
    prediction, target, reference = torch.randn(3, *SHAPE, generator=generator)
    patch_rewards, video_rewards = torch.randn(4, *GRID, generator=generator), torch.randn(4, generator=generator)
    return {
        "prediction": prediction.requires_grad_(),
        "target": target,
        "reference": reference,
        "patch_rewards": patch_rewards,
        "video_rewards": video_rewards,
    }


def without_reference(**others):
    return {"reference": None, **others}


# name of the case: (changed arguments, error, what its message must contain: argument, expected, got, cure)
BAD = {
    "prediction is no tensor": ({"prediction": [1.0]}, TypeError, ["prediction", "torch.Tensor", "list"]),
    "prediction of integers": (
        {"prediction": torch.ones(SHAPE).long()},
        TypeError,
        ["prediction", "float32", "int64", "convert"],
    ),
    "prediction in float8": (
        {"prediction": torch.ones(SHAPE).to(torch.float8_e5m2)},
        TypeError,
        ["prediction", "float8"],
    ),
    "prediction of 4 dimensions": (
        {"prediction": torch.ones(SHAPE[1:])},
        ValueError,
        ["prediction", "5", "BCFHW", "(3, 4, 5, 6)"],
    ),
    "prediction with an empty side": ({"prediction": torch.ones(4, 3, 0, 5, 6)}, ValueError, ["prediction", "empty"]),
    "sparse prediction": ({"prediction": torch.ones(SHAPE).to_sparse()}, TypeError, ["prediction", "dense", "sparse"]),
    "odd batch": (
        {name: torch.ones(3, *SHAPE[1:]) for name in ("prediction", "target", "reference")},
        ValueError,
        ["prediction", "even", "3", "torch.cat"],
    ),
    "target is None": ({"target": None}, TypeError, ["target", "torch.Tensor", "NoneType"]),
    "target of another shape": (
        {"target": torch.ones(4, 3, 4, 5, 7)},
        ValueError,
        ["target", "(4, 3, 4, 5, 6)", "(4, 3, 4, 5, 7)"],
    ),
    "target of one sample": ({"target": torch.ones(1, *SHAPE[1:])}, ValueError, ["target", "(1, 3, 4, 5, 6)"]),
    "target requires grad": (
        {"target": torch.ones(SHAPE, requires_grad=True)},
        ValueError,
        ["target", "require grad", "target.detach()"],
    ),
    "target on another device": (
        {"target": torch.ones(SHAPE, device="meta")},
        ValueError,
        ["target", "cpu", "meta", "move"],
    ),
    "target of booleans": ({"target": torch.ones(SHAPE).bool()}, TypeError, ["target", "bool"]),
    "reference of another shape": (
        {"reference": torch.ones(4, 3, 4, 5, 5)},
        ValueError,
        ["reference", "(4, 3, 4, 5, 5)"],
    ),
    "reference in bf16": (
        {"reference": torch.ones(SHAPE).bfloat16()},
        TypeError,
        ["reference", "float32", "bfloat16", "precision"],
    ),
    "reference requires grad": (
        {"reference": torch.ones(SHAPE, requires_grad=True)},
        ValueError,
        ["reference", "reference.detach()"],
    ),
    "reference on another device": ({"reference": torch.ones(SHAPE, device="meta")}, ValueError, ["reference", "meta"]),
    "no reference": ({"reference": None}, ValueError, ["reference", "reference_error", "neither"]),
    "both references": (
        {"reference_error": torch.ones(4, *GRID)},
        ValueError,
        ["reference", "reference_error", "both"],
    ),
    "reference_error in bf16": (
        without_reference(reference_error=torch.ones(4, *GRID).bfloat16()),
        TypeError,
        ["reference_error", "float32", "bfloat16"],
    ),
    "reference_error of another grid": (
        without_reference(reference_error=torch.ones(4, 2, 2, 2)),
        ValueError,
        ["reference_error", "(2, 2, 3)", "(2, 2, 2)"],
    ),
    "reference_error per sample": (
        without_reference(reference_error=torch.ones(4)),
        ValueError,
        ["reference_error", "[4, f, h, w]", "(4,)"],
    ),
    "reference_error finer than the latent": (
        without_reference(reference_error=torch.ones(4, 5, 1, 1), patch_rewards=None),
        ValueError,
        ["reference_error", "5", "4 frames", "coarser"],
    ),
    "reference_error requires grad": (
        without_reference(reference_error=torch.ones(4, *GRID, requires_grad=True)),
        ValueError,
        ["reference_error", "detach"],
    ),
    "patch_rewards per pair": (
        {"patch_rewards": torch.ones(2, *GRID)},
        ValueError,
        ["patch_rewards", "(4, 2, 2, 3)", "(2, 2, 2, 3)"],
    ),
    "patch_rewards flat": (
        {"patch_rewards": torch.ones(4, 12)},
        ValueError,
        ["patch_rewards", "[4, f, h, w]", "(4, 12)"],
    ),
    "patch_rewards finer than the latent": (
        {"patch_rewards": torch.ones(4, 2, 9, 3)},
        ValueError,
        ["patch_rewards", "9", "5 rows"],
    ),
    "patch_rewards of no patch": (
        {"patch_rewards": torch.ones(4, 2, 2, 0)},
        ValueError,
        ["patch_rewards", "columns", "0"],
    ),
    "patch_rewards infinite": (
        {"patch_rewards": torch.full((4, *GRID), INF)},
        ValueError,
        ["patch_rewards", "NaN", "infinite", "drop"],
    ),
    "patch_rewards of booleans": (
        {"patch_rewards": torch.ones(4, *GRID).bool()},
        TypeError,
        ["patch_rewards", "bool", "1.0"],
    ),
    "patch_rewards is a list": ({"patch_rewards": [[1.0]]}, TypeError, ["patch_rewards", "list"]),
    "patch_rewards on another device": (
        {"patch_rewards": torch.ones(4, *GRID, device="meta")},
        ValueError,
        ["patch_rewards", "meta"],
    ),
    "patch_rewards require grad": (
        {"patch_rewards": torch.ones(4, *GRID, requires_grad=True)},
        ValueError,
        ["patch_rewards", "detach"],
    ),
    "video_rewards per pair": ({"video_rewards": torch.ones(2)}, ValueError, ["video_rewards", "(4,)", "(2,)"]),
    "video_rewards as a column": ({"video_rewards": torch.ones(4, 1)}, ValueError, ["video_rewards", "(4,)", "(4, 1)"]),
    "video_rewards infinite": (
        {"video_rewards": torch.tensor([1.0, INF, 0.0, 0.0])},
        ValueError,
        ["video_rewards", "infinite"],
    ),
    "video_rewards complex": ({"video_rewards": torch.ones(4).cfloat()}, TypeError, ["video_rewards", "complex"]),
    "no rewards": (
        {"patch_rewards": None, "video_rewards": None},
        ValueError,
        ["patch_rewards", "video_rewards", "at least one"],
    ),
    "unknown objective": ({"objective": "dpo"}, ValueError, ["objective", "diffusion_dpo", "'dpo'"]),
    "objective is a number": ({"objective": 500.0}, TypeError, ["objective", "GranDPO", "float"]),
    "unknown layout": ({"layout": "BTCHW"}, ValueError, ["layout", "BFCHW", "'BTCHW'"]),
    "wrong layout": ({"layout": "BCHW"}, ValueError, ["prediction", "4", "BCHW"]),
    "kappa per sample": ({"kappa": torch.ones(4)}, ValueError, ["kappa", "(2,)", "(4,)"]),
    "kappa infinite": (
        {"kappa": torch.tensor([1.0, INF])},
        ValueError,
        ["kappa must be finite; got an infinite", "clip"],
    ),
    "kappa negative": (
        {"kappa": torch.tensor([1.0, -2.0])},
        ValueError,
        ["kappa must be at least 0; got -2", "turn a preference round"],
    ),
    "kappa NaN": ({"kappa": torch.tensor([1.0, float("nan")])}, ValueError, ["kappa", "finite", "NaN", "clip"]),
    "diffusion_dpo on patch labels only": (
        {"objective": "diffusion_dpo", "video_rewards": None},
        ValueError,
        ["video_rewards must be given", "patch_weight is 0", "patch_rewards only", "pass"],
    ),
    "dense_dpo on video labels only": (
        {"objective": "dense_dpo", "patch_rewards": None},
        ValueError,
        ["patch_rewards must be given", "video_weight is 0", "video_rewards only", "pass"],
    ),
    "rwr on patch labels only": (
        without_reference(objective="rwr", video_rewards=None),
        ValueError,
        ["video_rewards must be given"],
    ),
    "patch_dpo on video labels only": (
        without_reference(objective="patch_dpo", patch_rewards=None),
        ValueError,
        ["patch_rewards must be given"],
    ),
    "kappa is a float": ({"kappa": 0.5}, TypeError, ["kappa", "torch.Tensor", "float"]),
    "mapo with a reference": ({"objective": "mapo"}, ValueError, ["reference", "mapo", "leave out"]),
    "mapo without video_rewards": (
        without_reference(objective="mapo", video_rewards=None),
        ValueError,
        ["video_rewards", "mapo"],
    ),
    "anchor on cached errors": (
        without_reference(reference_error=torch.ones(4, *GRID), objective=GranDPO(anchor_weight=1.0)),
        ValueError,
        ["anchor_weight", "reference"],
    ),
}


@pytest.mark.parametrize("call", [gran_dpo, gran_dpo_coefficients])
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case, call):
    changed, error, words = BAD[case]
    with pytest.raises(error) as caught:
        call(**(good() | changed))
    for word in words:
        assert word in str(caught.value)


OTHER = {
    "grid of two numbers": (lambda x: patch_error(x, x, (2, 2)), ValueError, ["grid", "three"]),
    "grid of a number": (lambda x: patch_error(x, x, 2), ValueError, ["grid", "three", "2"]),
    "grid larger than the latent": (
        lambda x: patch_error(x, x, (2, 6, 2)),
        ValueError,
        ["grid", "5 rows", "6", "coarser"],
    ),
    "grid of floats": (lambda x: patch_error(x, x, (2.0, 2, 2)), TypeError, ["grid", "integers", "2.0", "int()"]),
    "grid of text": (lambda x: patch_error(x, x, ("2", 2, 2)), TypeError, ["grid", "integers", "'2'"]),
    "grid of zero": (lambda x: patch_log_ratio(x, x, x, (0, 1, 1)), ValueError, ["grid", "frames", "0"]),
    "log ratio without reference": (lambda x: patch_log_ratio(x, x, None, GRID), TypeError, ["reference", "NoneType"]),
    "log ratio in two precisions": (
        lambda x: patch_log_ratio(x, x, x.half(), GRID),
        TypeError,
        ["reference", "float16"],
    ),
    "coefficients per sample": (
        lambda x: patch_weighted_mse(x, x, torch.ones(4)),
        ValueError,
        ["coefficients", "[4, f, h, w]"],
    ),
    "coefficients of the whole batch": (
        lambda x: patch_weighted_mse(x[:1], x[:1], torch.ones(4, *GRID)),
        ValueError,
        ["coefficients", "[1, f, h, w]", "(4, 2, 2, 3)"],
    ),
    "coefficients in half": (
        lambda x: patch_weighted_mse(x, x, torch.ones(4, *GRID).half()),
        TypeError,
        ["coefficients", "float16"],
    ),
    "tokens of another count": (
        lambda x: unpack_tokens(torch.ones(2, 7, 3), (2, 2, 2)),
        ValueError,
        ["tokens", "2 * 2 * 2", "7"],
    ),
    "tokens that do not divide": (
        lambda x: unpack_tokens(torch.ones(2, 8, 3), (2, 3, 2), (1, 2, 2)),
        ValueError,
        ["patch_size"],
    ),
    "latent shape of two sides": (
        lambda x: unpack_tokens(torch.ones(2, 8, 3), (2, 4)),
        ValueError,
        ["latent_shape", "three", "(2, 4)"],
    ),
    "patch size of zero": (
        lambda x: unpack_tokens(torch.ones(2, 8, 3), (2, 2, 2), (0, 1, 1)),
        ValueError,
        ["patch_size", "positive", "(0, 1, 1)"],
    ),
    "timestep weight of floats": (
        lambda x: timestep_weight("flow", "epsilon", 0.5, 0.5),
        TypeError,
        ["signal", "float tensor", "0.5"],
    ),
    "odd scores": (
        lambda x: video_dpo_rewards(torch.ones(3), torch.ones(4)),
        ValueError,
        ["video_rewards", "2B", "(3,)"],
    ),
    "no scores": (lambda x: video_dpo_rewards(torch.ones(4), torch.ones(0)), ValueError, ["scores", "at least one"]),
    "scores with NaN": (
        lambda x: video_dpo_rewards(torch.ones(4), torch.tensor([1.0, float("nan")])),
        ValueError,
        ["scores", "finite", "drop"],
    ),
    "a mask for each sample": (
        lambda x: local_dpo_rewards(torch.ones(4, 2, 2, 2), torch.ones(4)),
        ValueError,
        ["mask", "[B, F, H, W]", "(4, 2, 2, 2)"],
    ),
    "unknown backend": (lambda x: using_backend("cuda").__enter__(), ValueError, ["backend", "triton", "'cuda'"]),
    "coefficients with an anchor": (
        lambda x: gran_dpo_coefficients(**good(), objective=GranDPO(anchor_weight=1.0)),
        ValueError,
        ["anchor_weight", "gran_dpo"],
    ),
}


@pytest.mark.parametrize("case", OTHER)
def test_bad_arguments_of_the_other_calls_are_named(case):
    call, error, words = OTHER[case]
    with pytest.raises(error) as caught:
        call(good()["target"])
    for word in words:
        assert word in str(caught.value)


SETTINGS = {
    "form": ({"form": "H5"}, ValueError, "form must be one of 'H1'"),
    "link": ({"link": "logistic"}, ValueError, "link must be one of 'sigmoid'"),
    "guard": ({"loser_guard": "both"}, ValueError, "loser_guard must be one of None, 'video', 'patch'"),
    "negative beta": ({"video_beta": -1.0}, ValueError, "video_beta must be finite and above 0; got -1.0"),
    "zero beta": ({"patch_beta": 0.0}, ValueError, "patch_beta must be finite and above 0"),
    "infinite beta": ({"video_beta": INF}, ValueError, "video_beta must be finite"),
    "beta per pair": ({"video_beta": torch.ones(2)}, TypeError, "video_beta must be a number or a 0-d tensor"),
    "beta of text": ({"video_beta": "500"}, TypeError, "video_beta must be a number; got str '500'"),
    "tensor weight": ({"video_weight": torch.tensor(1.0)}, TypeError, "video_weight must be a number; got a tensor"),
    "negative weight": ({"patch_weight": -1.0}, ValueError, "patch_weight must be finite and at least 0"),
    "NaN delta": ({"patch_delta": float("nan")}, ValueError, "patch_delta must be finite"),
    "smoothing of one half": (
        {"link": "robust", "label_smoothing": 0.5},
        ValueError,
        "label_smoothing must be below 1/2",
    ),
    "smoothing without a link for it": (
        {"label_smoothing": 0.1},
        ValueError,
        "label_smoothing must be 0 with link 'sigmoid'.*conservative",
    ),
    "guard above one": ({"loser_guard_mu": 1.5}, ValueError, "loser_guard_mu must be between 0 and 1"),
    "KTO": ({"form": "kto"}, ValueError, "form must be one of 'H1'; got 'kto': use DiffusionKTO of halo_fast"),
    "a reading that went": ({"form": "H3"}, ValueError, "form must be one of 'H1'; got 'H3': use PooledDPO, .*MaPO"),
    "beta_dpo": ({"beta_dpo": 1.0}, TypeError, "beta_dpo"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_bad_settings_are_named(case):
    changed, error, message = SETTINGS[case]
    with pytest.raises(error, match=message.replace("'", ".")):
        GranDPO(**changed)


def test_a_forced_backend_that_cannot_run_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with using_backend("triton"), pytest.raises(RuntimeError, match="triton.*TRITON_INTERPRET.*reference"):
        gran_dpo(**good())
    monkeypatch.setenv("HALO_FAST_BACKEND", "cupy")
    with pytest.raises(ValueError, match="cupy"):
        gran_dpo(**good())


def test_integer_labels_and_float64_rewards_are_welcome():
    arguments = good()
    labels = torch.tensor([1, 0, 0, 1])
    out = gran_dpo(**(arguments | {"video_rewards": labels, "patch_rewards": None}))
    same = gran_dpo(**(arguments | {"video_rewards": labels.double(), "patch_rewards": None}))
    assert torch.equal(out.loss, same.loss) and out.loss.dtype == torch.float32

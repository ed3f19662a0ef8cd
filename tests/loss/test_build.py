"""From a setting to an objective, an objective of somebody else's, and what the presets' names stand for."""

import dataclasses
import math
import sys
import types

import cases
import pytest
import torch
from torch.nn.functional import softplus

from halo_fast import PRESETS, GranDPO, gran_dpo, gran_dpo_coefficients, patch_weighted_mse, registry
from halo_fast.loss.inputs import Inputs
from halo_fast.loss.objectives import DiffusionKTO, MaPO, Objective, PooledDPO, Table, WeightedRegression, build

SHAPE, GRID = (3, 4, 5, 6), (2, 2, 3)


@dataclasses.dataclass(frozen=True)
class SquaredMargin(Objective):
    """(z - 1)^2 on the margin of whole videos, z = scale s (ratio_a - ratio_b); nothing of it is in the package."""

    scale: float = 50.0

    @property
    def labels(self):
        return frozenset({"video"})

    @property
    def video_beta(self):
        return 2 * self.scale

    def table(self, inputs: Inputs) -> Table:
        log_ratio = inputs.log_ratio()
        volume = inputs.volume(log_ratio)
        a, b = (volume * log_ratio).flatten(1).sum(1).chunk(2)
        sign, _ = self.preferences(inputs)
        z = self.scale * sign * (a - b)
        active = (sign != 0).to(z.dtype)
        share = active / active.sum().clamp(min=1)
        # E is -log_ratio up to a constant
        slope = -(share * 2 * (z - 1) * self.scale * sign)[:, None, None, None] * volume
        patch_logits = torch.zeros(len(z), *inputs.grid, dtype=z.dtype)
        return Table((share * (z - 1) ** 2).sum(), torch.cat([slope, -slope]), z, patch_logits, active, log_ratio)


SOFTER = SquaredMargin(scale=5.0)


def by_autograd(policy, target, ref, video_rewards, scale):
    """The same loss on the prediction itself, its gradient by autograd."""
    gain = ((ref - target) ** 2 - (policy - target) ** 2).flatten(1).mean(1)
    a, b = gain.chunk(2)
    r_a, r_b = video_rewards.chunk(2)
    return ((scale * (r_a - r_b).sign() * (a - b) - 1) ** 2).mean()


def batch(dtype=torch.float64):
    policy, ref, target = cases.latents(SHAPE, 4, dtype)
    return policy.requires_grad_(), target, ref, *cases.rewards(GRID, 4, torch.float64)


@pytest.mark.parametrize(
    ("spec", "scale"),
    [
        (f"{__name__}:SquaredMargin", 50.0),
        (f"{__name__}:SOFTER", 5.0),
        (SquaredMargin(scale=9.0), 9.0),
        ({"preset": f"{__name__}:SquaredMargin", "scale": 7.0}, 7.0),
    ],
    ids=["class by name", "object by name", "object", "fields"],
)
def test_an_objective_from_outside_the_package(spec, scale):
    policy, target, ref, _, video_rewards = batch()
    out = gran_dpo(policy, target, ref, None, video_rewards, objective=spec)
    truth = by_autograd(policy, target, ref, video_rewards, scale)
    torch.testing.assert_close(out.loss, truth)
    (gradient,), (expected,) = (torch.autograd.grad(loss, policy) for loss in (out.loss, truth))
    torch.testing.assert_close(gradient, expected)
    assert out.metrics()["rewards/margins"].item() == pytest.approx(out.video_logits.mean().item())
    assert "_inputs" not in repr(out)  # predictions of a whole batch
    margin = out.metrics()["rewards/chosen"] - out.metrics()["rewards/rejected"]
    torch.testing.assert_close(margin, out.metrics()["rewards/margins"])
    coefficients, _ = gran_dpo_coefficients(policy, target, ref, None, video_rewards, objective=spec)
    by_coefficients = patch_weighted_mse(policy, target, coefficients)
    torch.testing.assert_close(torch.autograd.grad(by_coefficients, policy)[0], expected)


def test_what_it_needs_is_checked_and_its_coefficients_too():
    policy, target, ref, patch_rewards, video_rewards = batch()
    with pytest.raises(ValueError, match="video_rewards must be given: objective SquaredMargin uses no patch_rewards"):
        gran_dpo(policy, target, ref, patch_rewards, None, objective=SquaredMargin())

    class PerVideo(SquaredMargin):
        def table(self, inputs):
            table = super().table(inputs)
            return table._replace(coefficients=table.coefficients.flatten(1).sum(1))

    with pytest.raises(ValueError, match=r"PerVideo.table must give coefficients of shape \(4, 1, 1, 1\); got \(4,\)"):
        gran_dpo(policy, target, ref, None, video_rewards, objective=PerVideo())


def test_a_mapping_is_a_preset_with_fields_replaced():
    assert build({"preset": "halo"}) == build("halo") == GranDPO()
    assert build({"preset": "flow_dpo", "video_beta": 7.0}) == GranDPO(video_beta=7.0, patch_weight=0.0)
    assert build({"preset": "diffusion_kto", "video_delta": 0.5}) == DiffusionKTO(video_delta=0.5)
    given = GranDPO(video_beta=3.0)
    assert build(given) is given


def test_names_stand_for_one_thing():
    assert build("halo") == GranDPO()
    assert build("halo_sft") == GranDPO(patch_sft_weight=0.5)
    classes = {"dense_dpo": PooledDPO, "local_dpo": PooledDPO, "diffusion_kto": DiffusionKTO, "mapo": MaPO}
    classes |= {"rwr": WeightedRegression, "patch_dpo": WeightedRegression}
    assert {name: type(preset) for name, preset in PRESETS.items()} == {
        name: classes.get(name, GranDPO) for name in PRESETS
    }


@pytest.mark.parametrize("beta", [1e-3, 20.0, 1e6])
def test_halo_bounded_caps_each_logit_and_supervises_the_winning_patches(beta):
    policy, target, ref, patch_rewards, video_rewards = batch()
    error = torch.from_numpy(cases.loop_error(policy, target, GRID))
    gap = patch_rewards[:2] - patch_rewards[2:]
    winner = torch.where(gap > 0, error[:2], error[2:])
    weight = gap.abs() / gap.abs().flatten(1).sum(1)[:, None, None, None]
    plain, bounded = (
        gran_dpo(
            policy, target, ref, patch_rewards, video_rewards,
            objective={"preset": name, "video_beta": beta, "patch_beta": beta},
        )
        for name in ("halo", "halo_bounded")
    )  # fmt: skip
    video, patch = softplus(-plain.video_logits.clamp(max=1.5)), softplus(-plain.patch_logits.clamp(max=1.5))
    expected = video.mean() + (weight * patch).flatten(1).sum(1).mean() + 1.5 * winner.mean()
    torch.testing.assert_close(bounded.loss, expected)


def test_halo_sft_adds_half_the_mean_error_of_the_winning_patches():
    policy, target, ref, patch_rewards, video_rewards = batch()
    error = torch.from_numpy(cases.loop_error(policy, target, GRID))
    winner = torch.where(patch_rewards[:2] > patch_rewards[2:], error[:2], error[2:])
    plain, supervised = (
        gran_dpo(policy, target, ref, patch_rewards, video_rewards, objective=name) for name in ("halo", "halo_sft")
    )
    torch.testing.assert_close(supervised.loss, plain.loss + 0.5 * winner.mean())


BAD = {
    "unknown preset": ("dpo", ValueError, "one of halo, .*flow_dpo.*'dpo'"),
    "no preset": ({"video_beta": 3.0}, ValueError, "must name its .preset., one of halo"),
    "unknown field": (
        {"preset": "halo", "beta": 3.0},
        ValueError,
        "no field 'beta'; halo has video_weight, .*video_beta",
    ),
    "field of another": (
        {"preset": "mapo", "patch_beta": 3.0},
        ValueError,
        "no field 'patch_beta'; mapo has video_beta",
    ),
    "wrong value": ({"preset": "halo", "video_beta": 0.0}, ValueError, "video_beta must be finite and above 0"),
    "missing module": ("halo_fast.nowhere:Loss", ValueError, "'halo_fast.nowhere:Loss', which cannot be imported"),
    "missing attribute": (f"{__name__}:Nothing", ValueError, "cannot be imported.*Nothing"),
    "no objective": (f"{__name__}:batch", TypeError, "objective must be an Objective.*tuple"),
    "a class": (GranDPO, TypeError, "objective must be a preset's name.*got the class GranDPO: call it"),
    "a number": (500.0, TypeError, "objective must be a preset's name.*got float"),
}


@pytest.fixture
def plugin(monkeypatch):
    """A plugin that registers SOFTER; the registry is as it was afterwards."""
    module = types.ModuleType("own_plugin")
    module.TABLES = {"objective": {"softer": f"{__name__}:SOFTER", "squared": f"{__name__}:SquaredMargin"}}
    monkeypatch.setitem(sys.modules, "own_plugin", module)
    monkeypatch.setattr(registry, "_PLUGINS", ("own_plugin",))
    monkeypatch.setattr(registry, "_tables", {})
    registry._load_plugins.cache_clear()
    yield
    registry._load_plugins.cache_clear()


@pytest.mark.usefixtures("plugin")
def test_a_plugins_objectives_have_names_like_presets():
    assert build("softer") is SOFTER
    assert build("squared") == SquaredMargin()
    assert build({"preset": "softer", "scale": 7.0}) == SquaredMargin(scale=7.0)
    assert build("halo") == GranDPO()
    policy, target, ref, _, video_rewards = batch()
    named, given = (gran_dpo(policy, target, ref, None, video_rewards, objective=one) for one in ("softer", SOFTER))
    assert torch.equal(named.loss, given.loss)
    with pytest.raises(ValueError, match="one of halo, .*patch_dpo, softer, squared, a GranDPO.*got 'soft'"):
        build("soft")


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_setting_is_named(case):
    spec, error, message = BAD[case]
    with pytest.raises(error, match=message):
        build(spec)


def test_a_subclass_with_a_table_of_its_own_is_not_taken_for_the_plain_loss():

    class Doubled(GranDPO):
        def table(self, inputs):
            table = super().table(inputs)
            return table._replace(loss=2 * table.loss, coefficients=2 * table.coefficients)

    policy, target, ref, _, video_rewards = batch()
    plain = gran_dpo(policy, target, ref, None, video_rewards)
    doubled = gran_dpo(policy, target, ref, None, video_rewards, objective=Doubled())
    assert torch.equal(doubled.loss, 2 * plain.loss)
    gradients = [torch.autograd.grad(out.loss, policy)[0] for out in (plain, doubled)]
    torch.testing.assert_close(gradients[1], 2 * gradients[0])
    assert plain.loss.item() == pytest.approx(softplus(-plain.video_logits).mean().item())
    assert math.isfinite(doubled.metrics()["rewards/margins"].item())

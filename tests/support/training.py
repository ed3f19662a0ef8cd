"""Pairs, settings and arms that the tests of training share."""

import torch
from peft import LoraConfig, inject_adapter_in_model
from tiny import CHANNELS, OBJECTIVE, TINY_TRAIN

from halo_fast.data import Pair
from halo_fast.families import Family, family_of
from halo_fast.train.config import TrainConfig

CONFIG = TrainConfig(
    **TINY_TRAIN | {
        "reference_draws": None, "lora_alpha": 4, "learning_rate": 5e-3, "lr_warmup_steps": 2, "logging_steps": 4,
        "diagnostics_steps": 20,
    }
)  # fmt: skip


def objective_with(**changes):
    """The tests' objective with changes: betas that a tiny model feels."""
    return OBJECTIVE | changes


def make_pairs(family, count=6, seed=0, grid=(3, 2, 2)):
    generator = torch.Generator().manual_seed(seed)
    conditions = family.encode_prompts(["a red ball rolls", "a cube", "green ball jumps left"])
    return [
        Pair(
            latents=torch.randn(2, CHANNELS, 3, 4, 4, generator=generator),
            conditions=conditions[index % 3],
            patch_rewards=torch.rand(2, *grid, generator=generator) * 4 + 1,
            video_rewards=torch.rand(2, generator=generator) * 4 + 1,
        )
        for index in range(count)
    ]


def pairs_of_sizes(conditions, channels, sizes, seed=3):
    """Random pairs of several buckets: for each its latents (F, H, W), its grid and how many."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Pair(
            latents=torch.randn(2, channels, *shape, generator=generator),
            conditions=conditions[number % len(conditions)],
            patch_rewards=torch.rand(2, *grid, generator=generator) * 4 + 1,
            video_rewards=torch.rand(2, generator=generator) * 4 + 1,
        )
        for shape, grid, count in sizes
        for number in range(count)
    ]


def mixed_pairs(family):
    """Five pairs of a tiny Wan, of two latent shapes and grids, in no order by size."""
    conditions = family.encode_prompts(["a red ball rolls", "a cube"])
    pairs = pairs_of_sizes(conditions, CHANNELS, [((3, 4, 4), (3, 2, 2), 3), ((2, 6, 4), (2, 3, 2), 2)])
    return [pairs[index] for index in (3, 0, 1, 4, 2)]


def quiet(iterable, total, label):
    return iterable


ARMS = {
    "winning clips": {"video_weight": 0.0, "patch_weight": 0.0, "sft_weight": 1.0, "patch_sft_weight": 0.0},
    "winning patches": {"video_weight": 0.0, "patch_weight": 0.0, "patch_sft_weight": 1.0},
    "video": {"video_weight": 1.0, "patch_weight": 0.0, "patch_sft_weight": 0.0},
    "patches": {"video_weight": 0.0, "patch_weight": 1.0, "patch_sft_weight": 0.0},
    "both": {"video_weight": 0.25, "patch_weight": 1.0, "patch_sft_weight": 0.0},
    "both and winning patches": {"video_weight": 1.0, "patch_weight": 1.0, "patch_sft_weight": 0.5},
}


def softplus(x):
    return torch.nn.functional.softplus(x.double() if torch.is_tensor(x) else torch.tensor(x))


def with_random_adapter(model, name="other", seed=1):
    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    inject_adapter_in_model(config, model, name)


def run_model(pipeline):
    family = family_of(pipeline)
    noisy = torch.randn(2, CHANNELS, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    conditions = family.stack(family.encode_prompts(["a cube", "a red ball"]))
    with torch.no_grad():
        return family.predict(pipeline.transformer, noisy, torch.tensor([0.3, 0.8]), conditions)


def snapshot(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [(name, p.requires_grad) for name, p in model.named_parameters()]
    return state, flags, [module.training for module in model.modules()]


def same(one, two):
    return (
        one[0].keys() == two[0].keys()
        and all(torch.equal(v, two[0][k]) for k, v in one[0].items())
        and one[1:] == two[1:]
    )


class Plain(Family):
    """A model that is no diffusers pipeline: one linear layer over channels, conditioned on a number."""

    lora_targets = ("mix",)

    def __init__(self):
        super().__init__(None)
        torch.manual_seed(0)
        self.model = torch.nn.ModuleDict({"mix": torch.nn.Linear(3, 3)})

    @property
    def transformer(self):
        return self.model

    @property
    def shift(self):
        return 1.0

    def latent_shape(self, num_frames, height, width):
        return 3, num_frames, height, width

    def encode_prompts(self, prompts):
        return [{"length": torch.tensor(float(len(prompt)))} for prompt in prompts]

    def stack(self, conditions):
        return {"length": torch.stack([condition["length"] for condition in conditions])}

    def encode(self, videos):
        return videos.permute(0, 4, 1, 2, 3) / 127.5 - 1

    def decode(self, latents):
        return ((latents + 1) * 127.5).to(torch.uint8).permute(0, 2, 3, 4, 1)

    def predict(self, model, noisy, t, conditions):
        moved = (noisy + t.view(-1, 1, 1, 1, 1) + conditions["length"].view(-1, 1, 1, 1, 1)).movedim(1, -1)
        return model["mix"](moved).movedim(-1, 1)

    def sample(self, conditions, noise, *, video_size, num_inference_steps, guidance_scale):
        return noise


def at_step(step, act):
    """A progress display that acts before a step of training."""

    def cut(iterable, total, label):
        for item in iterable:
            if item == step and label == "train":
                act()
            yield item

    return cut

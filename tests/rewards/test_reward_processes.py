"""Reward training on two processes: the gradient of the whole batch, the model of one process, also after a kill."""

import json
import math
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launches import TORCHRUN, ended, kill_worker, launch
from moving_shapes import GRID, make_clips
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import softplus

from halo_fast import processes
from halo_fast.files import hash_tensors, read_checkpoint, write_json
from halo_fast.rewards import LabelledClips, RewardConfig, RewardModel, RewardModelConfig, train_reward_model
from halo_fast.rewards.shares import Share, add_up_gradients
from halo_fast.rewards.terms import Batch, loss_terms
from halo_fast.teachers import VIDEO_DIMENSIONS

COMPACT = RewardModelConfig(VIDEO_DIMENSIONS, width=8, pretrained=False)
CASES = {
    "killed": (
        COMPACT,
        RewardConfig(
            video_steps=10, patch_steps=30, batch_size=5, loss="combined", held_out_share=0.2, checkpointing_steps=12
        ),
    ),
    "one clip a step": (COMPACT, RewardConfig(video_steps=2, patch_steps=3, batch_size=1, held_out_share=0.0)),
    "frames": (
        replace(COMPACT, backbone="frames"),
        RewardConfig(
            video_steps=2, patch_steps=4, batch_size=7, loss="bradley_terry_ties", held_out_share=0.0,
            learning_rate=1e-4,  # a step grows the rounding of sums by as much as it is long
        ),
    ),
}  # fmt: skip
SCRIPT = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_reward_processes import train_together
train_together(Path(sys.argv[1]))
"""


def clips_with_gaps() -> LabelledClips:
    """Twenty clips; a third has no patch label, and two in five of all other labels are missing."""
    clips, generator = make_clips(20, seed=3), torch.Generator().manual_seed(0)
    severity = torch.from_numpy(clips.severity).float()
    parts = 1 - severity.mean(dim=(1, 2, 3)), torch.from_numpy(clips.aligned), torch.from_numpy(clips.moving)
    labels = 1 + 4 * torch.stack([part.float() for part in parts], dim=1), (5 - 4 * severity)[:, None]
    video, patches = (x.where(torch.rand(x.shape, generator=generator) > 0.4, math.nan) for x in labels)
    patches[::3] = math.nan
    return LabelledClips(torch.from_numpy(clips.videos), clips.prompts, video, patches, VIDEO_DIMENSIONS)


def train_together(folder: Path) -> None:
    """What each process of the launch does."""
    processes.join()
    for name, (model_config, config) in CASES.items():
        model, history = train_reward_model(
            model_config, clips_with_gaps(), config, 0, folder / name / "checkpoint.safetensors"
        )
        state = hash_tensors(str(model.config), model.state_dict())
        assert processes.by_first(lambda state=state: state) == state
        if processes.is_first():
            model.save(folder / name)
            write_json(folder / name / "history.json", history)
    found = gradients()
    if processes.is_first():
        save_file(found, folder / "gradients.safetensors")
    processes.leave()


class Colours(nn.Module):
    """Scores that are linear in the mean colours of clip and patch; the length of the prompt turns them."""

    negatives = 2

    def __init__(self, config: RewardModelConfig) -> None:
        super().__init__()
        self.config = config
        self.video, self.turn = (nn.Linear(3, len(config.video_dimensions)) for _ in range(2))
        self.patch = nn.Linear(3, len(config.patch_dimensions))

    def frozen_features(self, videos):
        return None

    def fit_closed_form(self, frozen, prompts, weight):
        return None

    def encode(self, videos, frozen, word_evidence=None):
        return videos.permute(0, 4, 1, 2, 3).double() / 255

    def logits(self, features, prompts, grid):
        patches = self.config.patches(grid, tuple(features.shape[2:])).pool(features).movedim(1, -1)
        own = self.video_logits_for(features, prompts, torch.arange(len(prompts))[:, None])[:, 0]
        return own, self.patch(patches).movedim(-1, 1)

    def video_logits_for(self, features, prompts, others):
        colours, lengths = features.mean(dim=(2, 3, 4))[:, None], torch.tensor([float(len(p)) for p in prompts])
        return self.video(colours) + lengths[others][..., None] * self.turn(colours)


SCALES = [0.7, 0.9, 1.1], [0.8, 0.6]
NAN = math.nan


def five_clips() -> LabelledClips:
    """Of two processes one has the labels of clips 0, 2 and 4, and the other those of 1 and 3."""
    generator = torch.Generator().manual_seed(5)
    videos = torch.randint(256, (5, 5, 16, 16, 3), generator=generator, dtype=torch.uint8)
    video = torch.tensor([[2, NAN, 5], [4.5, 4, 3], [NAN, NAN, 1], [1.2, 2, NAN], [3.3, 5, 4]], dtype=torch.float64)
    patches = 1 + 4 * torch.rand(5, 2, 2, 2, 2, generator=generator, dtype=torch.float64)
    patches[4], patches[2, 1], patches[1, 0, 0] = NAN, NAN, NAN
    prompts = ["a", "bbb", "a", "cc", "ddddd"]
    return LabelledClips(videos, prompts, video, patches, VIDEO_DIMENSIONS, ("quality", "sharpness"))


def small_model() -> RewardModel:
    torch.manual_seed(2)
    config = RewardModelConfig(VIDEO_DIMENSIONS, ("quality", "sharpness"), backbone=f"{__name__}:Colours")
    return RewardModel(config).double()


def gradients() -> dict[str, torch.Tensor]:
    """Gradient of the sum of all terms of the loss, by the processes that there are."""
    model, data = small_model(), five_clips()
    share = Share.of(len(data))
    batch = Batch(data.select(share.rows), data.without_frames(), share)
    torch.manual_seed(3)
    losses = loss_terms(model, batch, SCALES, True, RewardConfig(loss="combined"))
    torch.stack(list(losses.values())).sum().backward()
    add_up_gradients(list(model.parameters()))
    return {name: parameter.grad for name, parameter in model.backbone.named_parameters()}


def label_loss(logits, scores, scale):
    """Cross entropy above its minimum, and Bradley-Terry of each score with those up to half of all away."""
    single = []
    for z, score in zip(logits, scores, strict=True):
        t = (score - 1) / 4
        if not math.isnan(t):
            least = sum(p * math.log(p) for p in (t, 1 - t) if p)
            single.append(t * softplus(-z) + (1 - t) * softplus(z) + least)
    pairs, count = [], len(logits)
    partners = min(32, count // 2)
    for shift in {1 + index * (count // 2) // partners for index in range(partners)}:
        for one in range(count):
            gap = scores[one] - scores[one - shift]
            if abs(gap) > 0.2:  # False where either is not known
                pairs.append(softplus(-math.copysign(1, gap) * (logits[one] - logits[one - shift])))
    return sum(single) / max(1, len(single)) / scale + sum(pairs) / max(1, len(pairs))


def expected_gradients() -> dict[str, torch.Tensor]:
    """The same by the formulas of docs/rewards.md, clip by clip in float64."""
    weights, data = (
        {name: p.detach().requires_grad_() for name, p in small_model().backbone.named_parameters()},
        five_clips(),
    )
    frames, labels = data.videos.double() / 255, data.video_scores.tolist()

    def video(colour, prompt, d):
        z = weights["video.weight"][d] @ colour + weights["video.bias"][d]
        return z + len(prompt) * (weights["turn.weight"][d] @ colour + weights["turn.bias"][d])

    mean = [clip.mean(dim=(0, 1, 2)) for clip in frames]
    own = [[video(mean[n], data.prompts[n], d) for d in range(3)] for n in range(5)]
    loss = sum(label_loss([z[d] for z in own], [row[d] for row in labels], SCALES[0][d]) for d in range(3)) / 3
    boxes = [(t, 8 * y, 8 * x) for t in (slice(0, 1), slice(1, 5)) for y in range(2) for x in range(2)]
    patches = [clip[t, y : y + 8, x : x + 8].mean(dim=(0, 1, 2)) for clip in frames for t, y, x in boxes]
    for q in range(2):
        logits = [weights["patch.weight"][q] @ colour + weights["patch.bias"][q] for colour in patches]
        loss = loss + label_loss(logits, data.patch_scores[:, q].flatten().tolist(), SCALES[1][q]) / 2
    swaps = []
    for n in range(5):
        for other in (data.prompts[n - 1], data.prompts[n - 2]):
            fits = 0.0 if math.isnan(labels[n][1]) or other == data.prompts[n] else (labels[n][1] - 1) / 4
            swaps.append((fits, own[n][1] - video(mean[n], other, 1)))
    torch.manual_seed(3)
    moment = round(torch.rand(()).item() * 4)
    still = [video(frames[n, moment].mean(dim=(0, 1)), data.prompts[n], 2) for n in range(2)]  # a quarter, rounded up
    moved = [((labels[n][2] - 1) / 4, own[n][2] - still[n]) for n in range(2)]
    for preferences in (swaps, moved):
        total = max(1.0, sum(weight for weight, _ in preferences))
        loss = loss + sum(weight * softplus(-margin) for weight, margin in preferences) / total
    loss.backward()
    return {name: weight.grad for name, weight in weights.items()}


def assert_gradients(found: dict[str, torch.Tensor]) -> None:
    for name, expected in expected_gradients().items():
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-12)


def test_the_gradient_of_one_process_is_that_of_the_formulas():
    assert_gradients(gradients())


@pytest.mark.slow
def test_two_processes_train_the_model_of_one_also_after_a_kill(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    process = launch(TORCHRUN, tmp_path / "script.py", tmp_path)
    checkpoint = tmp_path / "killed" / "checkpoint.safetensors"
    kill_worker(process, 1, checkpoint.exists)
    killed = ended(process)
    assert killed.returncode != 0 and f"exitcode  : -{int(signal.SIGKILL)}" in killed.stderr
    rows = read_checkpoint(checkpoint)[1]["history"]
    assert 12 <= len(rows) < 40 and rows[-1]["phase"] == "patch"
    done = ended(launch(TORCHRUN, tmp_path / "script.py", tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    assert_gradients(load_file(tmp_path / "gradients.safetensors"))
    data = clips_with_gaps()
    for name, (model_config, config) in CASES.items():
        alone, history = train_reward_model(model_config, data, config, 0)
        model = RewardModel.load(tmp_path / name)
        for one, two in zip(history, json.loads((tmp_path / name / "history.json").read_text()), strict=True):
            assert two.pop("phase") == one.pop("phase")
            assert two == pytest.approx(one, rel=1e-5, abs=1e-5)
        for one, two in zip(
            alone(data.videos, data.prompts, GRID), model(data.videos, data.prompts, GRID), strict=True
        ):
            print(name, float((one - two).abs().max()), file=sys.stderr)
            torch.testing.assert_close(two, one, rtol=0, atol=1e-5)

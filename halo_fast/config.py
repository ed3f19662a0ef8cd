"""The settings of a run as dataclasses; the command line and the YAML files are built from these."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

__all__ = [
    "AnnotateConfig",
    "CacheConfig",
    "Config",
    "EvaluateConfig",
    "GenerateConfig",
    "ObjectiveConfig",
    "OpenAIConfig",
    "PairsConfig",
    "ReportConfig",
    "RewardConfig",
    "ScoreConfig",
    "TrainConfig",
    "check_numbers",
    "to_yaml",
]


@dataclass
class GenerateConfig:
    """Candidates of the base model.

    Args:
        num_prompts: prompts taken from the top of the prompt list.
        num_videos_per_prompt: candidates of each prompt.
        batch_size: clips sampled at once.
        num_inference_steps: denoising steps of a clip.
        guidance_scale: classifier-free guidance; 1 switches it off.
        num_frames: frames of a clip.
        height: pixels.
        width: pixels.
        fps: frames a second of the mp4 files.
    """

    num_prompts: int = 192
    num_videos_per_prompt: int = 2
    batch_size: int = 32
    num_inference_steps: int = 16
    guidance_scale: float = 1.0
    num_frames: int = 9
    height: int = 32
    width: int = 32
    fps: int = 8


@dataclass
class OpenAIConfig:
    """GPT-4o, or any model behind an OpenAI-compatible server; the key is read from OPENAI_API_KEY and nowhere else.

    Args:
        model: name of the model, best a dated one.
        base_url: address of the server, without credentials.
        api: "responses"; "chat" for servers that have chat completions only; "batch" for half the price within a day.
        budget: US dollars that the run directory may cost in all; nothing is sent that could exceed them.
        input_price: dollars for a million input tokens (gpt-4o's list price since October 2024); 0 for your own server.
        output_price: likewise of output tokens.
        image_tokens: tokens of any image, as OpenAI publishes them for gpt-4o.
        tile_tokens: likewise of each 512-pixel tile of an image in full detail.
        max_concurrency: requests at once.
        timeout: seconds until a request is given up.
        max_retries: times that a question is sent again after rate limits, server errors and timeouts.
        max_attempts: answers that are paid for one question when they are refusals, malformed or cut short.
        retry_delay: seconds before the first retry, doubled with every other one, unless the server says how long.
        max_frames: frames that stand for the whole clip, at equal steps.
        patch_frames: frames that show each span of patches, at equal steps.
        max_images: images in one request.
        max_patches: patches of a clip that are scored; null for all.
        max_output_tokens: length of an answer; models that reason need more.
        temperature: of sampling; null for models that take none.
        pairwise: whether the candidates of a prompt are also compared with each other, in both orders.
    """

    model: str = "gpt-4o-2024-11-20"
    base_url: str = "https://api.openai.com/v1"
    api: str = "responses"
    budget: float = 5.0
    input_price: float = 2.5
    output_price: float = 10.0
    image_tokens: int = 85
    tile_tokens: int = 170
    max_concurrency: int = 8
    timeout: float = 120.0
    max_retries: int = 8
    max_attempts: int = 3
    retry_delay: float = 1.0
    max_frames: int = 16
    patch_frames: int = 2
    max_images: int = 24
    max_patches: int | None = None
    max_output_tokens: int = 2000
    temperature: float | None = 0.0
    pairwise: bool = False


@dataclass
class AnnotateConfig:
    """Scores of videos and patches by a teacher.

    Args:
        teacher: name of the teacher; "demo" is the defect meter of the demo, "openai" a model that answers questions,
            "human:NAME" whoever scored on the page of halo label.
        noisy_share: share of clips on which the demo teacher errs as a person would.
        num_clips: clips that are annotated, drawn at random; null for all.
        batch_size: clips in one question to the demo teacher; each answer is kept at once.
        openai: the model that is asked, and what it may cost.
    """

    teacher: str = "demo"
    noisy_share: float = 0.2
    num_clips: int | None = None
    batch_size: int = 32
    openai: OpenAIConfig = field(default_factory=OpenAIConfig)


@dataclass
class RewardConfig:
    """Reward model: the video phase first, then the same weights in the patch phase.

    Args:
        video_steps: optimiser steps of the video phase.
        patch_steps: optimiser steps of the patch phase.
        learning_rate: peak of the schedule of either phase.
        batch_size: clips in a step.
        video_weight: weight of the video loss in the patch phase, where it keeps the video scores from being forgotten.
        patch_weight: weight of the patch loss in the patch phase.
        swap_weight: weight of the preference for a clip's own prompt over another clip's, in text_alignment.
        motion_weight: weight of the preference for a clip over a frozen copy of it, in dynamic_degree.
        mirror: clips are mirrored with their labels and the words left and right ("horizontal"), also upside down with
            up and down ("both"), which is false where things fall or stand on ground, or not ("none"); null: "both"
            in the demo, else "horizontal".
        loss: "regression", "bradley_terry", "bradley_terry_ties" or "combined" (regression and Bradley-Terry).
        tie_margin: scores that differ by no more are a tie to the preference losses.
        held_out_share: share of the prompts whose clips calibrate the scores instead of training them.
        examples: clips of the demo's world, damaged on purpose and scored by what was done to them, that train beside
            the run's own; null: 768 with the demo teacher. Other teachers go without: 0.
        pretrained: add pretrained frame features and a prompt encoder (the extra "reward").
        backbone: "compact", or a vision-language model of transformers: a folder or a hub name.
        lora_rank: rank of the LoRA matrices in such a model; 0 trains its whole language model.
        checkpointing_steps: steps between two checkpoints.
    """

    video_steps: int = 100
    patch_steps: int = 900
    learning_rate: float = 4e-3
    batch_size: int = 16
    video_weight: float = 1.0
    patch_weight: float = 10.0
    swap_weight: float = 1.0
    motion_weight: float = 1.0
    mirror: Literal["none", "horizontal", "both"] | None = None
    loss: str = "regression"
    tie_margin: float = 0.2
    held_out_share: float = 0.05
    examples: int | None = None
    pretrained: bool = True
    backbone: str = "compact"
    lora_rank: int = 0
    checkpointing_steps: int = 50


@dataclass
class ScoreConfig:
    """Rewards of every candidate.

    Args:
        batch_size: clips scored at once.
    """

    batch_size: int = 32


@dataclass
class PairsConfig:
    """Preference pairs out of the scored candidates.

    Args:
        patch_delta: patches whose rewards differ by no more than this are ties; the loss has its own, train.objective.
        video_delta: videos whose rewards differ by no more than this are ties; a pair of nothing but ties is left out.
        dimensions: weight of each video dimension in the video reward.
    """

    patch_delta: float = 0.4
    video_delta: float = 0.0
    dimensions: dict[str, float] = field(
        default_factory=lambda: {"visual_quality": 1.0, "text_alignment": 1.0, "dynamic_degree": 1.0}
    )


@dataclass
class CacheConfig:
    """Latents and text embeddings; nothing to set."""


@dataclass
class ObjectiveConfig:
    """Gran-DPO, under the names of halo_fast.GranDPO.

    Args:
        video_weight: weight of the video's preference.
        patch_weight: weight of the patches' preferences.
        video_beta: inverse temperature of the video's preference.
        patch_beta: inverse temperature of the patches' preferences; null for video_beta / sqrt(patches).
        patch_gamma: exponent of the reward gap that weighs a patch.
        patch_delta: patches whose rewards differ by no more than this teach nothing.
        video_delta: videos whose rewards differ by no more than this teach nothing.
        sft_weight: supervised term on the winning clip.
        patch_sft_weight: supervised term on the winning patches.
        anchor_weight: pull of both samples to the reference's predictions; needs the reference in the loop.
        loser_guard: "video" or "patch" scales the loser's gradient so that the winner's error does not rise; null: off.
    """

    video_weight: float = 0.05
    patch_weight: float = 1.0
    video_beta: float = 100.0
    patch_beta: float | None = 10.0
    patch_gamma: float = 0.0
    patch_delta: float = 0.4
    video_delta: float = 0.0
    sft_weight: float = 0.0
    patch_sft_weight: float = 0.5
    anchor_weight: float = 0.0
    loser_guard: Literal["video", "patch"] | None = None


@dataclass
class TrainConfig:
    """Training of a LoRA, or of the weights themselves.

    Args:
        objective: the loss.
        learning_rate: peak of the schedule.
        lr_scheduler: "constant", "linear" or "cosine" to 0, after the warm-up.
        lr_warmup_steps: steps of linear warm-up.
        max_train_steps: optimiser steps.
        reference_draws: noises and times of each pair at which the reference's errors are computed once, beforehand;
            null: new ones at each visit, with the reference in the loop.
        train_batch_size: pairs in a batch of one process.
        gradient_accumulation_steps: batches of each process in a step.
        rank: of the LoRA matrices; 0 trains the weights themselves, in float32.
        lora_alpha: LoRA scale times rank.
        target_modules: layers that get LoRA, by the end of their names; null for the attention of the model's family.
            At rank 0 the layers that are trained; null for all.
        max_grad_norm: gradients are clipped to this norm.
        schedule: "batched", all samples at once; "margin_first", one sample at a time with the same gradient; "auto":
            the first unless its activations do not fit.
        skip_below: margin_first draws a pair whose coefficients are below this share of their first values with a
            probability in proportion, so that it mostly needs no backward pass; 0: no pair is left out.
        gradient_checkpointing: recompute activations in the backward pass: "none", "full", or "selective", which keeps
            outputs that took much work for their size: of attention, and of layers wider in than out.
        offload_activations: keep activations in the CPU's memory until the backward pass.
        compile: compile the model's blocks.
        attention_backend: diffusers' name of it ("native", "flash", "xformers", ...); null: as the model has it.
        mixed_precision: "no" or "bf16", as in accelerate.
        auto_beta: steer video_beta, and patch_beta with it, so that the mean gradient factor is this; null: constant.
        checkpointing_steps: steps between two checkpoints.
        checkpoints_total_limit: newest checkpoints that are kept; null: all.
        logging_steps: steps between two readings of the log from the device; every step has its row.
        report_to: trackers beside log.csv: "tensorboard", "wandb".
        loss_spike_factor: training stops when the loss over 5 steps exceeds its median before by this; null: never.
        winner_alarm: share by which the error on winning patches may rise above the reference's before it is told;
            its root is how far the policy has moved, in units of how far the reference is from the truth.
        off_policy_pairs: pairs whose base errors are compared before training, to tell clips that are not the model's.
        off_policy_fresh: of these, pairs that are also sampled anew for comparison, which costs two clips each.
        heldout_share: share of the prompts whose pairs are kept out of training for diagnostics.csv.
        heldout_pairs: pairs of these that are looked at.
        heldout_draws: noises and times that each of them is looked at with.
        diagnostics_steps: steps between two rows of diagnostics.csv.
        validation_prompts: prompts of previews, base beside policy; null for none.
        validation_steps: steps between two previews; the first is made before training.
        network: part of the pipeline that is trained, where there are several: "transformer_2" is Wan 2.2's expert for
            low noise; null for its first.
        seed: of LoRA weights, order of pairs, noise and timesteps.
    """

    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    learning_rate: float = 2e-3
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    lr_warmup_steps: int = 10
    max_train_steps: int = 120
    reference_draws: int | None = 4
    train_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    rank: int = 16
    lora_alpha: int = 16
    target_modules: list[str] | None = None
    max_grad_norm: float = 1.0
    schedule: Literal["auto", "batched", "margin_first"] = "auto"
    skip_below: float = 0.0
    gradient_checkpointing: Literal["none", "full", "selective"] = "none"
    offload_activations: bool = False
    compile: bool = False
    attention_backend: str | None = None
    mixed_precision: Literal["no", "bf16"] = "no"
    auto_beta: float | None = None
    checkpointing_steps: int = 50
    checkpoints_total_limit: int | None = None
    logging_steps: int = 10
    report_to: list[str] = field(default_factory=list)
    loss_spike_factor: float | None = 5.0
    winner_alarm: float | None = 0.5
    off_policy_pairs: int = 16
    off_policy_fresh: int = 0
    heldout_share: float = 0.1
    heldout_pairs: int = 16
    heldout_draws: int = 4
    diagnostics_steps: int = 20
    validation_prompts: list[str] | None = None
    validation_steps: int = 500
    network: str | None = None
    seed: int = 0


@dataclass
class EvaluateConfig:
    """Base against aligned model on held-out prompts with the same seeds.

    Args:
        num_prompts: prompts taken from the top of the list.
        meter: "demo" for the demo's defect meter, "reward" for the trained reward model.
        bootstrap: resamples of the prompts behind each interval.
    """

    num_prompts: int = 64
    meter: str = "demo"
    bootstrap: int = 1000


@dataclass
class ReportConfig:
    """The HTML page.

    Args:
        num_clips: clips shown side by side.
    """

    num_clips: int = 8


@dataclass
class Config:
    """Everything a run is made with.

    Args:
        output_dir: the run directory, one folder a stage.
        pretrained_model_name_or_path: "demo:graded", "demo:patchy", a diffusers folder or a hub name.
        prompts: "demo:train", "demo:heldout" or a text file with one prompt a line.
        evaluation_prompts: likewise, for evaluate.
        grid: patches of a clip along time, height and width.
        seed: every random number of a run follows from it.
        generate: candidates of the base model.
        annotate: labels of the teacher.
        reward: reward model.
        score: rewards of the candidates.
        pairs: preference pairs.
        cache: latents and text embeddings.
        train: LoRA training.
        evaluate: base against aligned.
        report: the HTML page.
    """

    output_dir: str = "runs/demo"
    pretrained_model_name_or_path: str = "demo:graded"
    prompts: str = "demo:train"
    evaluation_prompts: str = "demo:heldout"
    grid: tuple[int, int, int] = (3, 4, 4)
    seed: int = 0
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    annotate: AnnotateConfig = field(default_factory=AnnotateConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    def __post_init__(self) -> None:
        check_numbers(asdict(self))
        clip = (self.generate.num_frames, self.generate.height, self.generate.width)
        if any(not 1 <= patches <= length for patches, length in zip(self.grid, clip, strict=True)):
            raise ValueError(
                f"grid: expected 1 to {clip} patches along frames, height and width of the clip, "
                f"got {tuple(self.grid)}; use fewer patches or larger clips"
            )
        if self.reward.examples and self.annotate.teacher != "demo":
            raise ValueError(
                f"reward.examples: expected 0 without annotate.teacher=demo, got {self.reward.examples} with "
                f"{self.annotate.teacher!r}; set it to 0"
            )


_MAY_BE_ZERO = {
    *("seed", "video_steps", "patch_steps", "lora_rank", "rank", "lr_warmup_steps", "reference_draws", "max_retries"),
    *("off_policy_pairs", "off_policy_fresh", "heldout_pairs", "examples"),
}


def check_numbers(values: Mapping[str, Any], place: str = "") -> None:
    """Counts are positive and shares are shares; ValueError naming the setting."""
    for name, value in values.items():
        if isinstance(value, dict):
            check_numbers(value, f"{place}{name}.")
        elif isinstance(value, int) and not isinstance(value, bool) and value < (least := name not in _MAY_BE_ZERO):
            raise ValueError(f"{place}{name}: expected at least {int(least)}, got {value}")
        elif name.endswith("_share") and not 0 <= value <= 1:
            raise ValueError(f"{place}{name}: expected a share from 0 to 1, got {value}")


def to_yaml(config: Config) -> str:
    """All settings as a YAML text that `halo VERB CONFIG.yaml` reads back."""
    import yaml

    return yaml.safe_dump(json.loads(json.dumps(asdict(config))), sort_keys=False)

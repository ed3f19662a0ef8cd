"""The settings of a run as dataclasses; the command line and the YAML files are built from these."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from halo_fast.data.imports import ImportConfig
from halo_fast.data.pairs import PairsConfig
from halo_fast.errors import UserError
from halo_fast.families.quantization import Quantization
from halo_fast.families.sampling import GenerateConfig
from halo_fast.families.weights import Precision
from halo_fast.rewards.base import RewardConfig
from halo_fast.settings import validate
from halo_fast.teachers.openai.config import OpenAIConfig
from halo_fast.train.config import TrainConfig

__all__ = [
    "AnnotateConfig",
    "CacheConfig",
    "Config",
    "EvaluateConfig",
    "GenerateConfig",
    "ImportConfig",
    "OpenAIConfig",
    "PairsConfig",
    "ReportConfig",
    "RewardConfig",
    "ScoreConfig",
    "TrainConfig",
    "check_round",
    "round_config",
    "to_yaml",
]


@dataclass
class AnnotateConfig:
    """Scores of videos and patches by a teacher.

    Args:
        teacher: name of the teacher, or your own as "package.module:attribute"; "openai" is a model that answers
            questions, "human:NAME" whoever scored on the page of halo label. Required.
        options: what only the named teacher has.
        num_clips: clips that are annotated, drawn at random; null for all.
        openai: the model that is asked, and what it may cost.
    """

    teacher: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    num_clips: Annotated[int, Ge(1)] | None = None
    openai: OpenAIConfig = field(default_factory=OpenAIConfig)


@dataclass
class ScoreConfig:
    """Rewards of every candidate.

    Args:
        batch_size: clips scored at once.
    """

    batch_size: Annotated[int, Ge(1)] = 1


@dataclass
class CacheConfig:
    """Latents and text embeddings; nothing to set."""


@dataclass
class EvaluateConfig:
    """Base against aligned model on held-out prompts with the same seeds.

    Args:
        num_prompts: prompts taken from the top of the list; null for all.
        meter: what measures defects: "reward", the trained reward model, which the aligned model was trained to please;
            or a meter of your own as "package.module:attribute".
        judges: what else scores the clips, by name: "frames", "vbench", "vbench2", "videoscore", "videoscore2",
            "videoreward", "reward_model", "openai", or your own as "package.module:function". At least one should be
            none that training optimised: without it, a gain on the reward may be reward hacking.
        judge_options: options of each judge, by its name.
        bootstrap: resamples of the prompts behind each interval.
    """

    num_prompts: Annotated[int, Ge(1)] | None = 64
    meter: str = "reward"
    judges: list[str] = field(default_factory=list)
    judge_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    bootstrap: Annotated[int, Ge(1)] = 1000


@dataclass
class ReportConfig:
    """The HTML page.

    Args:
        num_clips: held-out prompts whose clips are on the page, base beside aligned; null for all.
    """

    num_clips: Annotated[int, Ge(1)] | None = 64


@dataclass
class Config:
    """Everything a run is made with. Settings without a default are required by the stages that read them.

    Args:
        output_dir: the run directory, one folder a stage.
        pretrained_model_name_or_path: a diffusers folder, a hub name, a registered model, or your own as
            "package.module:attribute". Required.
        prompts: a text file with one prompt a line, or a registered list. Required by generate.
        evaluation_prompts: likewise, for evaluate; none of them should be among the prompts. Required.
        grid: patches of a clip along time, height and width.
        seed: of prompts, candidates, labels, the reward model and evaluation; train.seed is that of training.
        rounds: how often the model is aligned: round 2 makes and labels new candidates with the model of round 1, and
            trains on. Each round has as many prompts, labels and steps as the first.
        precision: of the model's weights: "fp32", "bf16", or "auto", the one in which they are stored. At train.rank 0
            training loads float32.
        quantization: of the frozen base in generate, train and evaluate, in 4 or 8 bits: "bnb_nf4", "bnb_int8",
            "torchao_int8" or "torchao_float8"; null for none. A LoRA belongs to the base that it was trained on.
        reward_model: folder of a trained reward model, such as runs/first/reward, or "fetv", which is shipped. Then
            nothing is annotated, and reward takes that one instead of training another.
        imports: clips, pairs and labels of your own.
        generate: candidates of the base model, and the format of all clips.
        annotate: labels of the teacher.
        reward: reward model.
        score: rewards of the candidates.
        pairs: preference pairs.
        cache: latents and text embeddings.
        train: LoRA training.
        evaluate: base against aligned.
        report: the HTML page.
    """

    output_dir: str = "runs/halo"
    pretrained_model_name_or_path: str = ""
    prompts: str = ""
    evaluation_prompts: str = ""
    grid: tuple[Annotated[int, Ge(1)], Annotated[int, Ge(1)], Annotated[int, Ge(1)]] = (7, 4, 6)
    seed: Annotated[int, Ge(0)] = 0
    rounds: Annotated[int, Ge(1)] = 1
    precision: Precision = "auto"
    quantization: Quantization | None = None
    reward_model: str = ""
    imports: ImportConfig = field(default_factory=ImportConfig)
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
        validate(self)
        if self.quantization and not self.train.rank:
            raise UserError(
                f"quantization: {self.quantization} freezes the base, and train.rank 0 trains it; set null, or a rank"
            )
        clip = (self.generate.num_frames, self.generate.height, self.generate.width)
        if any(patches > length for patches, length in zip(self.grid, clip, strict=True)):
            raise UserError(
                f"grid: expected 1 to {clip} patches along frames, height and width of the clip, "
                f"got {tuple(self.grid)}; use fewer patches or larger clips"
            )


def check_round(config: Config, number: int) -> int:
    """The number of a round, if the run has it.

    Raises:
        UserError: it has not.
    """
    if not 1 <= number <= config.rounds:
        raise UserError(f"--round: expected 1 to {config.rounds} (rounds), got {number}; set rounds, or name another")
    return number


def round_config(config: Config, number: int) -> Config:
    """The settings of a round.

    A later one works on candidates of its own alone. Without a teacher it takes the reward model of the first round.

    Args:
        config: of the run.
        number: of the round, from 1.
    """
    if number == 1:
        return config
    taken = config.reward_model or ("" if config.annotate.teacher else str(Path(config.output_dir) / "reward"))
    pairs = replace(config.pairs, real_wins=False)
    return replace(config, imports=ImportConfig(), pairs=pairs, reward_model=taken)


def to_yaml(config: Config) -> str:
    """All settings as a YAML text that `halo VERB CONFIG.yaml` reads back."""
    import yaml

    return yaml.safe_dump(json.loads(json.dumps(asdict(config))), sort_keys=False)

"""The patch reward that ships with the package, fitted to all of FETV's patch labels.

python -m tools.fetv_reward data/fetv     # writes halo_fast/rewards/weights/fetv
"""

import sys
from pathlib import Path

from halo_fast.agreement.patch_labels import labelled_clips, patch_model_config, patch_reward_config
from halo_fast.data.importers import read_ratings
from halo_fast.rewards import train_reward_model

__all__ = ["main"]

FOLDER = Path(__file__).parents[1] / "halo_fast" / "rewards" / "weights" / "fetv"


def main(data: str) -> None:
    """Fit the model to a folder in FETV's layout and write it."""
    ratings = read_ratings(data)
    if ratings.patches is None:
        raise SystemExit(f"{data}: expected patch_labels.csv beside clips.csv, got none")
    config = patch_model_config()
    clips = labelled_clips(ratings.patches, ratings.prompts, config)
    train_reward_model(config, clips, patch_reward_config(), seed=0)[0].save(FOLDER)


if __name__ == "__main__":
    main(*sys.argv[1:])

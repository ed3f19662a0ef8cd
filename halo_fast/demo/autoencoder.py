"""A linear causal autoencoder: the first frame alone, then groups of four, each in blocks of 8 x 8 pixels.

Each block is projected on the leading principal components of the corpus, the best linear code there is, so training
is one eigendecomposition. It carries AutoencoderKLWan's configuration keys, so WanPipeline uses it as it is.
"""

from __future__ import annotations

import torch
from diffusers import ConfigMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

__all__ = ["BlockAutoencoder"]


class BlockAutoencoder(ModelMixin, ConfigMixin):
    """Video [N, 3, 1 + 4k, 8h, 8w] in [-1, 1] <-> latent [N, z_dim, 1 + k, h, w], both maps linear."""

    @register_to_config
    def __init__(
        self,
        z_dim: int = 96,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        scale_factor_temporal: int = 4,
        scale_factor_spatial: int = 8,
    ) -> None:
        super().__init__()
        block = 3 * scale_factor_spatial**2
        self.first_basis = nn.Parameter(torch.zeros(block, z_dim))
        self.first_mean = nn.Parameter(torch.zeros(block))
        self.group_basis = nn.Parameter(torch.zeros(block * scale_factor_temporal, z_dim))
        self.group_mean = nn.Parameter(torch.zeros(block * scale_factor_temporal))

    def blocks(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Cut a video into first-frame blocks [N, h, w, 3*64] and group blocks [N, k, h, w, 4*3*64]."""
        size, group = self.config.scale_factor_spatial, self.config.scale_factor_temporal
        cells = video.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))  # [N, 3, F, h, 8, w, 8]
        cells = cells.permute(0, 2, 3, 5, 1, 4, 6)  # [N, F, h, w, 3, 8, 8]
        groups = cells[:, 1:].unflatten(1, (-1, group)).permute(0, 1, 3, 4, 2, 5, 6, 7)
        return cells[:, 0].flatten(-3), groups.flatten(-4)

    def encode(
        self, video: Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """The code of a video; its distribution has no spread to speak of."""
        code = self.code(video)
        posterior = DiagonalGaussianDistribution(torch.cat((code, torch.full_like(code, -30.0)), dim=1))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, latent: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """The video of a code, clamped to [-1, 1]."""
        video = self.pixels(latent)
        return DecoderOutput(sample=video) if return_dict else (video,)

    def code(self, video: Tensor) -> Tensor:
        """`encode` without the wrapping: [N, z_dim, 1 + k, h, w]."""
        first, groups = self.blocks(video)
        code = ((first - self.first_mean) @ self.first_basis)[:, None], (groups - self.group_mean) @ self.group_basis
        return torch.cat(code, dim=1).permute(0, 4, 1, 2, 3)

    def pixels(self, code: Tensor) -> Tensor:
        """`decode` without the wrapping: [N, 3, 1 + 4k, 8h, 8w], clamped to [-1, 1]."""
        size, group = self.config.scale_factor_spatial, self.config.scale_factor_temporal
        code = code.permute(0, 2, 3, 4, 1)
        first = (code[:, :1] @ self.first_basis.T + self.first_mean).unflatten(-1, (1, 3, size, size))
        groups = (code[:, 1:] @ self.group_basis.T + self.group_mean).unflatten(-1, (group, 3, size, size))
        frames = torch.cat([part.permute(0, 1, 4, 2, 3, 5, 6, 7).flatten(1, 2) for part in (first, groups)], dim=1)
        return frames.permute(0, 4, 1, 2, 5, 3, 6).flatten(-2).flatten(-3, -2).clamp(-1, 1)

    @classmethod
    @torch.no_grad()
    def fit(cls, video: Tensor, z_dim: int = 96) -> BlockAutoencoder:
        """Principal components of a corpus [N, 3, F, H, W] in [-1, 1].

        latents_std is the square root of each component's deviation (up to a common factor): full whitening would
        spend the model on detail that nobody sees, none would leave detail to the last denoising step alone.
        """
        model = cls(z_dim)
        for blocks, basis, mean in (
            (model.blocks(video)[0], model.first_basis, model.first_mean),
            (model.blocks(video)[1], model.group_basis, model.group_mean),
        ):
            rows = blocks.flatten(0, -2)
            mean.copy_(rows.mean(dim=0))
            centred = (rows - mean).double()
            basis.copy_(torch.linalg.eigh(centred.T @ centred)[1].flip(1)[:, :z_dim])
        code = model.code(video)
        deviation = code.std(dim=(0, 2, 3, 4))
        scale = deviation.sqrt() * (deviation / deviation.sqrt()).square().mean().sqrt()
        model.register_to_config(latents_mean=code.mean(dim=(0, 2, 3, 4)).tolist(), latents_std=scale.tolist())
        return model.eval()

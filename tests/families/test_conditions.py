"""Whatever a network takes beside noise and time is the same in training and in its own pipeline's sampling."""

import pytest
import torch
from tiny import TINY, tiny_clips, tiny_hunyuan, tiny_ltx
from training import CONFIG, quiet

from halo_fast.data import Pair
from halo_fast.families import family_of
from halo_fast.families.sampling import sample_clips
from halo_fast.train import fit


def watch(network, first=True):
    """All inputs of the network's calls, as one dict each; arguments by place have numbers."""
    calls = []

    def kept(value):
        return value.clone() if isinstance(value, torch.Tensor) else value  # some pipelines write into their latents

    def hook(module, args, named):
        calls.append({key: kept(value) for key, value in (dict(enumerate(args)) | named).items()})

    network.register_forward_pre_hook(hook, with_kwargs=True)
    return calls


def inputs_of(call, tensors=True):
    """The inputs that say something, flat; a missing one and None are alike."""
    flat = {}
    for name, value in call.items():
        parts = value if isinstance(value, tuple | list) else [value]
        for index, part in enumerate(parts):
            if part is not None and part is not False and name not in ("return_dict", "attention_kwargs"):
                flat[name, index] = torch.as_tensor(part).double()
    return flat


def rename(call):
    """The UNet's inputs by place, and the names that some pipelines give them."""
    names = {0: "sample", 1: "timestep", "hidden_states": "sample", "cross_attention_kwargs": "attention_kwargs"}
    return {names.get(name, name): value for name, value in call.items()}


@torch.no_grad()
def both(name, guidance, fps):
    """Inputs of the network in the first step of sampling, and in training at the same noise and time."""
    tiny = TINY[name]
    pipeline = tiny.build()
    family = family_of(pipeline, tiny.network)
    network = pipeline.transformer if name.startswith("Wan 2.2 A14B") else family.transformer
    calls = watch(network)
    frames, height, width = tiny.size
    clip = tiny_clips(
        num_frames=frames, height=height, width=width, num_inference_steps=2, guidance_scale=guidance, fps=fps
    )
    sample_clips(family, ["a red cube jumps"], [3], clip)
    sampled = rename(calls[0])
    noise = torch.randn(family.latent_shape(*tiny.size), generator=torch.Generator().manual_seed(3))[None]
    time = sampled["timestep"].double().flatten()[:1] / (1 if name.startswith("Cosmos") else 1000)
    t = 1 - time if name == "Mochi" else time
    family.predict(network, noise, t.float(), family.stack(family.encode_prompts(["a red cube jumps"])))
    return sampled, rename(calls[-1])


def of_video(inputs):
    """LTX-2's inputs but for the sound, and for what the network works out itself."""
    others = ("audio", "video_coords", "use_cross_timestep")
    return {key: value for key, value in inputs.items() if not str(key[0]).startswith(others)}


@pytest.mark.parametrize("name", TINY)
def test_every_input_of_the_network_is_the_same_in_training_and_sampling(name):
    guidance = 3.5 if name == "HunyuanVideo" else 1.0
    sampled, trained = (inputs_of(call) for call in both(name, guidance, 12))
    if name == "LTX-2":
        # trained without the sound; sampling gives the places of the tokens, which the network else finds itself
        assert trained.pop(("isolate_modalities", 0)) == 1
        sampled, trained = of_video(sampled), of_video(trained)
    if name == "HunyuanVideo 1.5":
        # tokens of an image that the network hides where all are zero (tests/families/test_attention.py)
        assert not sampled.pop(("image_embeds", 0)).any()
    assert sampled.keys() == trained.keys() and len(sampled) > 2
    for key, value in sampled.items():
        if key == ("sample", 0) and name in ("TextToVideoSD", "AnimateDiff", "CogVideoX 2B", "CogVideoX 5B"):
            continue  # the scheduler may scale the noise it starts from
        torch.testing.assert_close(
            value.broadcast_to(trained[key].shape), trained[key], rtol=1e-5, atol=1e-6, msg=str(key)
        )


@pytest.mark.parametrize(
    ("name", "change"),
    [("HunyuanVideo", "guidance"), ("LTX-Video", "fps"), ("LTX-Video 0.9.1", "fps"), ("LTX-2", "fps")],
)
def test_a_change_of_what_the_network_takes_reaches_both(name, change):
    first = both(name, 3.5 if change == "guidance" else 1.0, 12)
    second = both(name, 7.5 if change == "guidance" else 1.0, 30 if change == "fps" else 12)
    for before, after in zip(first, second, strict=True):
        before, after = of_video(inputs_of(before)), of_video(inputs_of(after))
        changed = {key[0] for key, value in before.items() if not torch.equal(value, after[key])}
        assert changed == {{"HunyuanVideo": "guidance", "LTX-2": "fps"}.get(name, "rope_interpolation_scale")}


@pytest.mark.parametrize(("build", "name"), [(tiny_ltx, "frame_rate"), (tiny_hunyuan, "guidance")])
def test_the_clips_settings_reach_training_from_python(build, name):
    pipeline = build()
    family = family_of(pipeline)
    pair = Pair(
        torch.randn(2, *family.latent_shape(9, 32, 32)),
        family.encode_prompts(["a ball"])[0],
        torch.rand(2, 1, 1, 1),
        torch.rand(2),
    )
    calls = watch(family.transformer)
    clip = tiny_clips(guidance_scale=2.5, fps=50)
    fit(pipeline, [pair], CONFIG.__class__(**vars(CONFIG) | {"max_train_steps": 1}), generate=clip, progress=quiet)
    if name == "guidance":
        assert {call["guidance"].max().item() for call in calls} == {2500.0}
    else:
        time = pipeline.vae_temporal_compression_ratio
        assert {call["rope_interpolation_scale"][0] for call in calls} == {time / 50}

"""Videos and folders of pictures as a player shows them; what is damaged or cut is refused."""

import gc
import platform
import struct
import subprocess
import sys

import av
import numpy as np
import pytest
import torch
from PIL import Image

from halo_fast import files
from halo_fast.data import clips
from halo_fast.data.clips import latent_factors, read_clip, read_frames, read_picture, write_clip
from halo_fast.data.tables import ClipRow
from halo_fast.errors import UserError
from halo_fast.files import write_safetensors

SIZE = 48, 64  # height, width
FORMATS = {
    "mkv": ("matroska", "libx264", "yuv420p", {}),
    "webm": ("webm", "libvpx-vp9", "yuv420p", {}),
    "ts": ("mpegts", "libx264", "yuv420p", {}),
    "avi": ("avi", "mpeg4", "yuv420p", {}),
    "gif": ("gif", "gif", "rgb8", {}),
    "mp4": ("mp4", "libx264", "yuv420p", {"movflags": "faststart"}),
    "flv": ("flv", "flv1", "yuv420p", {}),
    "mov": ("mov", "mpeg4", "yuv420p", {"movflags": "faststart"}),
}
RAW = "h264", "libx264", "yuv420p", {}


def noise(count=24, height=SIZE[0], width=SIZE[1]):
    rng = np.random.default_rng(0)
    return [rng.integers(256, size=(height, width, 3)).astype(np.uint8) for _ in range(count)]


def quadrants(height=SIZE[0], width=SIZE[1]):
    """Top left red, top right green, bottom left blue, bottom right black."""
    frame = np.zeros((height, width, 3), np.uint8)
    frame[: height // 2, : width // 2, 0] = 255
    frame[: height // 2, width // 2 :, 1] = 255
    frame[height // 2 :, : width // 2, 2] = 255
    return frame


def corners(frame):
    """The colour's letter at top left, top right, bottom left and bottom right."""
    height, width = frame.shape[:2]
    places = [(y, x) for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]
    return "".join("rgb"[int(frame[place].argmax())] if frame[place].max() > 90 else "." for place in places)


def write(path, frames, kind="mp4", aspect=None, **context):
    container_format, codec, pixels, options = FORMATS.get(kind, RAW)
    with av.open(str(path), "w", format=container_format, options=options) as container:
        stream = container.add_stream(codec, rate=8)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pixels
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=pixels)))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.35, 0.5, 0.85])
def test_a_file_cut_short_is_refused(tmp_path, kind, share):
    path = write(tmp_path / f"clip.{kind}", noise(), kind)
    assert len(read_clip(path)) == 24
    whole = path.read_bytes()
    # a transport stream cut between two of its packets may be a whole shorter one: the next test
    path.write_bytes(whole[: int(share * len(whole)) // 188 * 188 + 94])
    with pytest.raises(
        UserError, match=rf"clip .*clip\.{kind}: expected a readable video, got .*make it again"
    ) as caught:
        read_clip(path)
    assert "\n" not in str(caught.value)


def test_a_transport_stream_is_refused_unless_it_ends_with_a_frame(tmp_path):
    path = write(tmp_path / "clip.ts", noise(), "ts")
    whole = path.read_bytes()
    packets = [whole[start : start + 188] for start in range(0, len(whole), 188)]
    # ISO/IEC 13818-1: 13 bits of identity, and one bit that marks the packet in which a frame begins
    video = [int.from_bytes(packet[1:3], "big") & 0x1FFF == 0x100 for packet in packets]
    begins = [packet[1] & 0x40 and seen for packet, seen in zip(packets, video, strict=True)]
    third = [number for number, begin in enumerate(begins) if begin][2]
    last = max(number for number in range(third) if video[number])
    for end, frames in [(third, 2), (last + 1, 2), (last, None), (third + 4, None)]:
        path.write_bytes(b"".join(packets[:end]))
        if frames:
            assert len(read_clip(path)) == frames
            continue
        with pytest.raises(UserError, match="expected a readable video, got a damaged or cut one"):
            read_clip(path)


# a matrix (a, b, c, d) takes the pixel (x, y) to (a x + c y, b x + d y), as ISO/IEC 14496-12 has it
@pytest.mark.parametrize(
    ("matrix", "expected", "turned"),
    [
        ((1, 0, 0, 1), "rgb.", False),
        ((0, 1, -1, 0), "br.g", True),  # a quarter to the right: what was bottom left is top left
        ((0, -1, 1, 0), "g.rb", True),
        ((-1, 0, 0, -1), ".bgr", False),
        ((-1, 0, 0, 1), "gr.b", False),  # a mirrored selfie
        ((1, 0, 0, -1), "b.rg", False),
    ],
)
def test_a_clip_is_turned_as_its_display_matrix_says(tmp_path, matrix, expected, turned):
    path = write(tmp_path / "clip.mp4", [quadrants()] * 3)
    data = bytearray(path.read_bytes())
    # version, flags, two times, track, reserved, duration, 8 reserved, layer, group, volume, reserved
    place = data.index(b"tkhd") + 4 + 4 + 8 + 4 + 4 + 4 + 8 + 2 + 2 + 2 + 2
    a, b, c, d = (value * 65536 for value in matrix)
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    video = read_clip(path)
    assert video.shape[1:3] == (SIZE[::-1] if turned else SIZE)
    assert corners(video[0].numpy()) == expected


@pytest.mark.parametrize(("aspect", "width"), [(2, 128), ("1/2", 32), ("12/11", 70)])
def test_pixels_become_square(tmp_path, aspect, width):
    from fractions import Fraction

    video = read_clip(write(tmp_path / "clip.mkv", [quadrants()] * 3, "mkv", aspect=Fraction(aspect)))
    assert video.shape == (3, SIZE[0], width, 3)
    assert corners(video[0].numpy()) == "rgb."


def test_a_cover_picture_is_not_the_clip(tmp_path):
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.height, cover.width, cover.pix_fmt = 16, 16, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
        picture = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24").reformat(
            format="yuvj420p"
        )
        container.mux(cover.encode(picture))
        container.mux(cover.encode())
        for frame in noise(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    assert read_clip(path).shape == (4, *SIZE, 3)


def test_sound_alone_is_no_clip(tmp_path):
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(UserError, match="expected a readable video, got no video stream"):
        read_clip(tmp_path / "sound.wav")


@pytest.mark.parametrize(("number", "name"), [(16, "PQ"), (18, "HLG")])
def test_high_dynamic_range_is_refused_by_name(tmp_path, number, name):
    path = write(tmp_path / "clip.mkv", noise(3), "mkv", color_trc=number)
    with pytest.raises(UserError, match=rf"high dynamic range \({name}\)"):
        read_clip(path)


def test_a_stream_that_changes_its_size_is_refused_with_both(tmp_path):
    # raw streams may be strung together as they are
    one, two = (write(tmp_path / f"{side}.h264", noise(4, side, side), "h264") for side in (32, 48))
    (tmp_path / "both.h264").write_bytes(one.read_bytes() + two.read_bytes())
    with pytest.raises(UserError, match="both.h264: expected frames of one size, .* 32 x 32, got 48 x 48 at frame 5"):
        read_clip(tmp_path / "both.h264")


def test_frames_are_read_in_natural_order_without_hidden_files(tmp_path):
    for number in (1, 2, 9, 10, 100):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"shot-{number}.PNG")
    for junk in (".DS_Store", "._shot-1.PNG", "Thumbs.db"):
        (tmp_path / junk).write_bytes(b"not a picture")
    assert read_frames(tmp_path)[:, 0, 0, 0].tolist() == [1, 2, 9, 10, 100]
    Image.new("RGB", (6, 8)).save(tmp_path / "shot-3.PNG")
    with pytest.raises(UserError, match="height x width 8 x 8, got 8 x 6 at frame 3"):
        read_frames(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".DS_Store").write_bytes(b"")
    with pytest.raises(UserError, match="expected a folder of frames, got an empty one"):
        read_frames(tmp_path / "empty")


@pytest.mark.parametrize(("orientation", "expected"), [(1, "rgb."), (3, ".bgr"), (5, "rbg."), (6, "br.g"), (8, "g.rb")])
def test_a_picture_is_turned_as_its_exif_says(tmp_path, orientation, expected):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(quadrants()).save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert corners(read_picture(tmp_path / "a.jpg", "a").numpy()) == expected


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "tiff", "webp"])
def test_a_damaged_picture_is_refused_or_read(tmp_path, kind):
    Image.fromarray(np.stack(noise(1)[0])).save(tmp_path / f"whole.{kind}")
    whole = (tmp_path / f"whole.{kind}").read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        for place in rng.integers(len(whole), size=8):
            damaged[place] = rng.integers(256)
        (tmp_path / "damaged").write_bytes(damaged)
        try:
            assert read_picture(tmp_path / "damaged", "damaged").dtype == torch.uint8
        except UserError as error:
            refused += "damaged: expected a picture" in str(error) and "\n" not in str(error)
    assert refused


@pytest.mark.parametrize("kind", ["mkv", "avi", "mp4"])
def test_a_damaged_clip_is_refused_or_read(tmp_path, kind):
    whole = write(tmp_path / f"whole.{kind}", noise(6), kind).read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(40):
        damaged = bytearray(whole)
        for place in rng.integers(min(len(whole), 2000), size=8):
            damaged[place] = rng.integers(256)
        (tmp_path / f"damaged.{kind}").write_bytes(damaged)
        try:
            read_clip(tmp_path / f"damaged.{kind}")
        except UserError as error:
            refused += "expected" in str(error) and "\n" not in str(error)
    assert refused


def test_depth_and_transparency_of_pictures(tmp_path):
    grey = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    assert read_picture(tmp_path / "deep.png", "deep")[0, :, 1].tolist() == [0, 1, 128, 255]
    clear = np.array([[[200, 100, 50, 255], [200, 100, 50, 0]]], np.uint8)
    Image.fromarray(clear, "RGBA").save(tmp_path / "clear.png")
    assert read_picture(tmp_path / "clear.png", "clear")[0].tolist() == [[200, 100, 50], [0, 0, 0]]


def test_pictures_of_other_depths_and_palettes(tmp_path):
    deep = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.tiff")
    assert read_picture(tmp_path / "deep.tiff", "deep")[0, :, 0].tolist() == [0, 1, 128, 255]
    grey = Image.fromarray(np.array([[[200, 255], [200, 0]]], np.uint8), "LA")
    grey.save(tmp_path / "grey.png")
    assert read_picture(tmp_path / "grey.png", "grey")[0].tolist() == [[200] * 3, [0] * 3]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putdata([0, 1])
    palette.save(tmp_path / "palette.png", transparency=1)
    assert read_picture(tmp_path / "palette.png", "palette")[0].tolist() == [[10, 20, 30], [0, 0, 0]]


@pytest.mark.parametrize(("number", "weights"), [(1, (0.2126, 0.0722)), (5, (0.299, 0.114))])
def test_a_videos_colours_are_those_of_its_matrix(tmp_path, number, weights):
    """The matrices of ITU-T H.273: 1 is BT.709, 5 is BT.601; luma and two colour differences in the limited range."""
    (red, blue), colour = weights, np.array([200.0, 60.0, 30.0]) / 255
    luma = red * colour[0] + (1 - red - blue) * colour[1] + blue * colour[2]
    planes = [
        16 + 219 * luma, 128 + 112 * (colour[2] - luma) / (1 - blue), 128 + 112 * (colour[0] - luma) / (1 - red),
    ]  # fmt: skip
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv444p"
        stream.codec_context.colorspace = number
        stream.codec_context.color_range = 1
        values = np.stack([np.full(SIZE, round(plane), np.uint8) for plane in planes])
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(values, format="yuv444p")))
        container.mux(stream.encode())
    found = read_clip(tmp_path / "clip.mp4")[1, 20, 20]
    assert (found.double() - 255 * torch.from_numpy(colour)).abs().max() <= 2


def test_a_written_clip_reads_back_at_any_rate(tmp_path):
    video = torch.from_numpy(np.stack(noise(5)))
    for fps in (1, 24):
        write_clip(tmp_path / "clip.mp4", video, fps)
        assert (read_clip(tmp_path / "clip.mp4").int() - video.int()).abs().max() <= 2


def bt709(frame):
    """Y, Cb and Cr of RGB in the studio range, by the definition of ITU-R BT.709."""
    red, green, blue = np.moveaxis(frame.astype(np.float64) / 255, -1, 0)
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return 16 + 219 * luma, 128 + 224 * (blue - luma) / 1.8556, 128 + 224 * (red - luma) / 1.5748


def test_a_clip_for_every_player_has_the_colours_of_bt709(tmp_path):
    video = torch.from_numpy(np.stack([quadrants()] * 5))
    write_clip(tmp_path / "a.mp4", video, 8, crf=1)
    write_clip(tmp_path / "b.mp4", video, 8, crf=1)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        codec = stream.codec_context
        assert (codec.name, codec.pix_fmt, codec.colorspace, codec.color_range) == ("h264", "yuv420p", 1, 1)
        frame = next(container.decode(stream))
        planes = [plane.astype(np.float64) for plane in _planes(frame)]
    for plane, expected in zip(planes, bt709(quadrants()), strict=True):
        step = expected.shape[0] // plane.shape[0]
        assert np.abs(plane - expected[::step, ::step])[:10, :10].max() <= 2
        assert np.abs(plane - expected[::step, ::step])[-10:, -10:].max() <= 2
    # inside the quadrants, because colours are halved in size
    inside = np.s_[:, 2 : SIZE[0] // 2 - 4, 2 : SIZE[1] // 2 - 4]
    assert (read_clip(tmp_path / "a.mp4")[inside].int() - video[inside].int()).abs().max() <= 4


def _planes(frame):
    height, width = frame.height, frame.width
    values = frame.to_ndarray(format="yuv420p").reshape(-1)
    luma, chroma = height * width, height * width // 4
    parts = values[:luma], values[luma : luma + chroma], values[luma + chroma :]
    sizes = (height, width), (height // 2, width // 2), (height // 2, width // 2)
    return [part.reshape(size) for part, size in zip(parts, sizes, strict=True)]


def test_equal_clips_are_equal_bytes_however_often_they_are_written(tmp_path):
    """With x264's macroblock tree one file in six differed, for smooth clips of this size."""
    video = torch.full((9, 32, 32, 3), 70, dtype=torch.uint8)
    for frame in range(9):
        video[frame, 8:20, 2 + 2 * frame : 12 + 2 * frame, 2] = 250
    written = set()
    for _ in range(60):
        write_clip(tmp_path / "a.mp4", video, 8, 12)
        written.add((tmp_path / "a.mp4").read_bytes())
    assert len(written) == 1


def test_a_lower_factor_keeps_more_and_odd_sides_are_refused(tmp_path):
    video = torch.from_numpy(np.stack(noise(5)))
    sizes = []
    for crf in (12, 30):
        write_clip(tmp_path / f"{crf}.mp4", video, 8, crf)
        sizes.append((tmp_path / f"{crf}.mp4").stat().st_size)
    assert sizes[0] > sizes[1]
    with pytest.raises(ValueError, match="expected even sides, got 47 x 64"):
        write_clip(tmp_path / "odd.mp4", video[:, :47], 8, 12)
    assert not (tmp_path / "odd.mp4").exists()


@pytest.mark.parametrize(("layout", "shape"), [(None, (16, 3, 6, 8)), ("BFCHW", (3, 16, 6, 8))])
def test_factors_of_the_autoencoder_follow_the_layout(tmp_path, layout, shape):
    write_clip(tmp_path / "clip.mp4", torch.from_numpy(np.stack(noise(9))), 8)
    write_safetensors(tmp_path / "z.safetensors", {"latents": torch.zeros(shape)}, layout and {"layout": layout})
    clip = ClipRow("c", 0, "p", 0, 0, "clip.mp4", "z.safetensors")
    assert latent_factors(tmp_path, clip) == (8, 4, True, 0)
    assert latent_factors(tmp_path, ClipRow("c", 0, "p", 0, 0, "clip.mp4", None)) is None
    padded = torch.zeros(
        *[4 if length == 3 else length for length in shape]
    )  # 9 frames in 4, as CogVideoX 1.5 has them
    write_safetensors(tmp_path / "z.safetensors", {"latents": padded}, layout and {"layout": layout})
    with pytest.raises(UserError, match="9 frames cannot be divided among 4 .*`halo generate --force`"):
        latent_factors(tmp_path, clip)


FRAGMENTS = r"""
import re
from pathlib import Path
import torch
from halo_fast.files import return_freed_memory

def private():
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

large, small = zip(*((torch.ones(2**18, dtype=torch.uint8), torch.ones(64)) for _ in range(400)))
before = private()
del large
return_freed_memory()
print(before - private())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library returns memory by itself")
def test_freed_memory_goes_back_to_the_system():
    found = subprocess.run([sys.executable, "-c", FRAGMENTS], check=True, stdout=subprocess.PIPE, text=True).stdout
    assert float(found) > 90  # of 100 MiB


def test_systems_without_that_c_library_go_on(monkeypatch):
    monkeypatch.setattr(files.ctypes, "CDLL", lambda name: object())
    files.return_freed_memory()
    monkeypatch.setattr(files.ctypes, "CDLL", None)  # Windows has no library without a name
    monkeypatch.setattr(files.os, "name", "nt")
    files.return_freed_memory()


def test_a_large_clip_gives_back_what_its_frames_took(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(clips, "return_freed_memory", lambda: calls.append(1))
    for name, shape in (("small", (9, 64, 64, 3)), ("large", (9, 640, 512, 3))):
        write_clip(tmp_path / f"{name}.mp4", torch.zeros(shape, dtype=torch.uint8), 8)
        assert read_clip(tmp_path / f"{name}.mp4").shape == shape
        assert len(calls) == (name == "large")


def test_no_decoded_frame_outlives_its_clip(tmp_path):
    def alive() -> int:
        return sum(isinstance(one, av.VideoFrame) for one in gc.get_objects())

    write_clip(tmp_path / "clip.mp4", torch.stack([torch.from_numpy(frame) for frame in noise(40)]), 8)
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        known = alive()
        for rate, frames in ((None, 40), (4, 20)):
            assert len(read_clip(tmp_path / "clip.mp4", rate)) == frames and alive() == known
        counts = [alive() - known for _ in clips.stream_clip(tmp_path / "clip.mp4")]
        assert len(counts) == 40 and alive() == known
        # one key frame; a decoder with threads hands out several frames at the end
        assert max(counts) < 20
    finally:
        if enabled:
            gc.enable()

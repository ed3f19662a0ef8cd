"""Settings of a paid teacher."""

import os
from dataclasses import dataclass
from typing import Annotated, Literal
from urllib.parse import urlsplit

from annotated_types import Ge, Gt

from halo_fast.errors import UserError
from halo_fast.settings import validate

__all__ = ["KEY", "LOOPBACK", "OpenAIConfig", "check_config", "normal_address"]

KEY = "OPENAI_API_KEY"  # the environment variable that holds the API key
_ADDRESS = "OPENAI_BASE_URL"  # the environment variable by which OpenAI's clients choose another server
LOOPBACK = ("localhost", "127.0.0.1", "::1")
_PLACE = "annotate.openai"


@dataclass
class OpenAIConfig:
    """GPT-4o, or any model behind an OpenAI-compatible server; the key is read from OPENAI_API_KEY and nowhere else.

    Args:
        model: name of the model, best a dated one.
        reported_model: name that the server gives the model in its answers, where it differs; null for `model` itself,
            perhaps with a date or revision after it.
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
        patch_frames: frames of each span of patches, at equal steps.
        max_images: images in one request.
        max_patches: patches of a clip that are scored; null for all.
        max_output_tokens: length of an answer; models that reason need more.
        max_queued_tokens: prompt tokens that wait in batches at once; null for any number.
        temperature: of sampling; null for models that take none.
        pairwise: whether the candidates of a prompt are also compared with each other, in both orders.
    """

    model: str = "gpt-4o-2024-11-20"
    reported_model: str | None = None
    base_url: str = "https://api.openai.com/v1"
    api: Literal["responses", "chat", "batch"] = "responses"
    budget: Annotated[float, Ge(0)] = 5.0
    input_price: Annotated[float, Ge(0)] = 2.5
    output_price: Annotated[float, Ge(0)] = 10.0
    image_tokens: Annotated[int, Ge(0)] = 85
    tile_tokens: Annotated[int, Ge(0)] = 170
    max_concurrency: Annotated[int, Ge(1)] = 8
    timeout: Annotated[float, Gt(0)] = 120.0
    max_retries: Annotated[int, Ge(0)] = 8
    max_attempts: Annotated[int, Ge(1)] = 3
    retry_delay: Annotated[float, Ge(0)] = 1.0
    max_frames: Annotated[int, Ge(1)] = 16
    patch_frames: Annotated[int, Ge(1)] = 2
    max_images: Annotated[int, Ge(1)] = 24
    max_patches: Annotated[int, Ge(1)] | None = None
    max_output_tokens: Annotated[int, Ge(1)] = 2000
    max_queued_tokens: Annotated[int, Ge(1)] | None = None
    temperature: Annotated[float, Ge(0)] | None = 0.0
    pairwise: bool = False


def check_config(config: OpenAIConfig) -> None:
    """Check bounds, and that the key in the environment would be safe at the server's address.

    Raises:
        UserError: naming the setting.
    """
    validate(config, _PLACE)
    if config.max_frames > config.max_images:
        raise UserError(
            f"{_PLACE}.max_frames: expected at most max_images = {config.max_images}, got {config.max_frames}"
        )
    address = urlsplit(config.base_url)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise UserError(f"{_PLACE}.base_url: expected http(s)://host/v1, got {config.base_url!r}")
    if address.username or address.password or address.query:
        raise UserError(f"{_PLACE}.base_url: expected an address without credentials; keys belong in {KEY}")
    if address.scheme == "http" and address.hostname not in LOOPBACK and os.environ.get(KEY):
        raise UserError(f"{_PLACE}.base_url: {KEY} would travel unencrypted; use https, or unset {KEY}")
    other = os.environ.get(_ADDRESS, "")
    if other and normal_address(other) != normal_address(config.base_url):
        raise UserError(
            f"{_ADDRESS}: the environment has {normal_address(other)}, {_PLACE}.base_url is {config.base_url}; set "
            f"both to the same address, or unset {_ADDRESS}"
        )


def normal_address(url: str) -> str:
    """One spelling of a server's address, without credentials.

    Scheme and host are in lower case, this machine is "localhost", a default port and final slashes are left out.

    Raises:
        UserError: the port is no number.
    """
    address = urlsplit(url.strip())
    host = "localhost" if address.hostname in LOOPBACK else address.hostname or ""
    host = f"[{host}]" if ":" in host else host
    try:
        port = address.port
    except ValueError as error:
        raise UserError(f"{_PLACE}.base_url: expected http(s)://host:port/v1, got another port ({error})") from None
    suffix = "" if port in (None, {"http": 80, "https": 443}.get(address.scheme)) else f":{port}"
    return f"{address.scheme}://{host}{suffix}{address.path.rstrip('/')}"

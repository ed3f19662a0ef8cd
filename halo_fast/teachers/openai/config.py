"""Settings of a paid teacher."""

from dataclasses import dataclass

__all__ = ["OpenAIConfig"]


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

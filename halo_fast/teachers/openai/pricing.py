"""What questions cost: OpenAI's published rule for images, bounds and estimates for text."""

import json
import math

from halo_fast.teachers.openai.config import OpenAIConfig
from halo_fast.teachers.openai.pictures import Picture
from halo_fast.teachers.openai.questions import Question, schema
from halo_fast.teachers.rubric import RUBRIC

__all__ = [
    "context_needed",
    "fewest_tokens",
    "highest_cost",
    "image_tokens",
    "likely_cost",
    "prompt_tokens",
    "token_prices",
]

_BATCH_SHARE = 0.5  # of the price, in the Batch API
_OVERHEAD = 100  # tokens that a server may add around the texts of a request


def token_prices(config: OpenAIConfig) -> tuple[float, float]:
    """US dollars for one input token and one output token."""
    share = _BATCH_SHARE if config.api == "batch" else 1.0
    return config.input_price * share / 1e6, config.output_price * share / 1e6


def image_tokens(picture: Picture, base: int, tile: int) -> int:
    """Tokens of an image by OpenAI's published rule for gpt-4o.

    Low detail costs `base`. At high detail the image is scaled to fit 2048 x 2048, then its shorter side to 768, and
    costs base + tile times the 512-pixel squares that cover it.

    Args:
        picture: whose size and detail count.
        base: tokens of any image.
        tile: tokens of a 512-pixel square.
    """
    if picture.detail == "low":
        return base
    sides = (picture.width, picture.height)
    scale = min(1.0, 2048 / max(sides))
    scale *= 768 / (scale * min(sides))
    return base + tile * math.prod(math.ceil(round(side * scale) / 512) for side in sides)


def highest_cost(question: Question, config: OpenAIConfig) -> float:
    """Dollars that a question costs at most: no tokenizer makes more tokens than bytes."""
    return _cost(question, config, _size(question) + _OVERHEAD, config.max_output_tokens)


def likely_cost(question: Question, config: OpenAIConfig) -> float:
    """Dollars that a question costs about: four bytes a token, eight tokens a field of the answer."""
    return _cost(question, config, _size(question) / 4, 40 + 8 * len(question.fields))


def context_needed(question: Question, config: OpenAIConfig) -> int:
    """Tokens that a server's context must hold for a question and its answer, about."""
    return prompt_tokens(question, config) + config.max_output_tokens


def prompt_tokens(question: Question, config: OpenAIConfig) -> int:
    """Tokens of a question, rather too many than too few: three bytes a token, and the images."""
    return _size(question) // 3 + _image_tokens(question, config)


def fewest_tokens(question: Question, config: OpenAIConfig) -> int:
    """Prompt tokens that any model counts for a whole question: eight bytes a token, a quarter of an image's tokens.

    The schema is left out, since not every server shows it to the model.
    """
    return len((RUBRIC + question.text).encode()) // 8 + len(question.pictures) * config.image_tokens // 4


def _image_tokens(question: Question, config: OpenAIConfig) -> int:
    return sum(image_tokens(picture, config.image_tokens, config.tile_tokens) for picture in question.pictures)


def _size(question: Question) -> int:
    return len((RUBRIC + question.text + json.dumps(schema(question))).encode())


def _cost(question: Question, config: OpenAIConfig, text_tokens: float, output_tokens: float) -> float:
    input_price, output_price = token_prices(config)
    return (_image_tokens(question, config) + text_tokens) * input_price + output_tokens * output_price

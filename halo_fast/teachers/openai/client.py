"""The client of a server, and its errors in words."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from halo_fast.errors import UserError
from halo_fast.teachers.openai.config import KEY, OpenAIConfig
from halo_fast.teachers.openai.protocol import scrub

__all__ = ["named_errors", "open_client"]


def open_client(config: OpenAIConfig) -> Any:
    """An `openai.AsyncOpenAI` that never repeats a request by itself: each one is entered in the store first.

    Raises:
        UserError: the key in the environment is malformed, or missing where one is needed.
    """
    from openai import AsyncOpenAI

    key = os.environ.get(KEY, "")
    if not all("!" <= letter <= "~" for letter in key):
        raise UserError(
            f"{KEY}: expected ASCII letters, digits and signs, found a space, a line end or another character; "
            f"export the key without it"
        )
    if not key and urlsplit(config.base_url).hostname == "api.openai.com":
        raise UserError(f"{KEY}: expected an API key in the environment, found none; export {KEY}=...")
    # a server of one's own needs no key, but the client does
    return AsyncOpenAI(api_key=key or "none", base_url=config.base_url, timeout=config.timeout, max_retries=0)


@contextmanager
def named_errors(config: OpenAIConfig, cure: str) -> Iterator[None]:
    """Turn errors of the client into a UserError of one line, without the request that they carry.

    Args:
        config: whose address is named.
        cure: what the user can do, or what is unknown.
    """
    import openai

    try:
        yield
    except openai.OpenAIError as error:
        raise UserError(f"{config.base_url}: {scrub(error)[:200]}; {cure}") from None

"""The client of a server, and its errors in words."""

import os
import ssl
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from halo_fast.errors import UserError
from halo_fast.teachers.openai.config import KEY, LOOPBACK, OpenAIConfig
from halo_fast.teachers.openai.protocol import Outcome, scrub
from halo_fast.teachers.store import Reply

__all__ = ["connection_failure", "key_for", "named_errors", "open_client"]


def open_client(config: OpenAIConfig) -> Any:
    """An `openai.AsyncOpenAI` that never repeats a request by itself: each one is entered in the store first.

    A server on this machine is asked directly, whatever proxy the environment names.

    Raises:
        UserError: the key in the environment is malformed, or missing where one is needed; a proxy that cannot be used.
    """
    import openai

    key, host = key_for(config), urlsplit(config.base_url).hostname
    # OpenSSL itself reads SSL_CERT_FILE
    options = {"trust_env": False, "verify": ssl.create_default_context()} if host in LOOPBACK else {}
    try:
        http = openai.DefaultAsyncHttpxClient(timeout=config.timeout, **options)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{_proxy(config) or 'proxy of the environment'}: {scrub(error).splitlines()[0][:200]}; use an http proxy, "
            f"or unset it"
        ) from None
    # a server of one's own needs no key, but the client does
    return openai.AsyncOpenAI(
        api_key=key or "none", base_url=config.base_url, timeout=config.timeout, max_retries=0, http_client=http
    )


def key_for(config: OpenAIConfig) -> str:
    """The key in the environment; empty where there is none and a server of one's own needs none.

    Raises:
        UserError: it is malformed, or missing where one is needed.
    """
    key = os.environ.get(KEY, "")
    if not all("!" <= letter <= "~" for letter in key):
        raise UserError(
            f"{KEY}: expected ASCII letters, digits and signs, found a space, a line end or another character; "
            f"export the key without it"
        )
    if not key and urlsplit(config.base_url).hostname == "api.openai.com":
        raise UserError(f"{KEY}: expected an API key in the environment, found none; export {KEY}=...")
    return key


def connection_failure(error: Exception, config: OpenAIConfig) -> Outcome:
    """What an error without a response means: "failed" if the request cannot have arrived, else "lost"."""
    import openai

    causes = list(_causes(error))
    kinds = {type(cause).__name__ for cause in causes}
    proxy = _proxy(config)
    way = f" by way of {proxy}" if proxy else ""
    tls = next((cause for cause in causes if isinstance(cause, ssl.SSLError)), None)
    if isinstance(tls, ssl.SSLCertVerificationError):
        cure = "if it is right, set SSL_CERT_FILE to a file with its authority's certificate"
        reason = f"its certificate is not trusted ({tls.verify_message}){way}; {cure}"
        return Outcome(Reply("failed", f"{config.base_url}: {reason}"), fatal=True)
    if tls is not None and "ConnectError" in kinds:
        reason = f"no TLS connection{way} ({tls.reason}); does the server speak https?"
        return Outcome(Reply("failed", f"{config.base_url}: {reason}"), fatal=True)
    if "ProxyError" in kinds:
        said = next(scrub(cause) for cause in causes if type(cause).__name__ == "ProxyError")
        return Outcome(Reply("failed", f"{config.base_url}: {proxy} answered {said[:100]}; check it"), fatal=True)
    if kinds & {"ConnectError", "ConnectTimeout"}:
        return Outcome(Reply("failed", f"{config.base_url}: no connection{way}"))
    if isinstance(error, TimeoutError | openai.APITimeoutError):
        return Outcome(Reply("lost", f"{config.base_url}: no answer within {config.timeout:g} s"))
    return Outcome(Reply("lost", f"{config.base_url}: the connection broke"))


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
    except openai.APIConnectionError as error:
        raise UserError(f"{connection_failure(error, config).reply.reason}; {cure}") from None
    except openai.OpenAIError as error:
        raise UserError(f"{config.base_url}: {scrub(error)[:200]}; {cure}") from None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _proxy(config: OpenAIConfig) -> str:
    """The environment's proxy for the server: its variable and its address without credentials; "" for none."""
    address = urlsplit(config.base_url)
    host = address.hostname or ""
    if host in LOOPBACK or urllib.request.proxy_bypass(host):
        return ""
    proxies = urllib.request.getproxies()
    for scheme in (address.scheme, "all"):
        if scheme in proxies:
            found = urlsplit(proxies[scheme])
            port = f":{found.port}" if found.port else ""
            return f"{scheme.upper()}_PROXY {found.scheme}://{found.hostname}{port}"
    return ""

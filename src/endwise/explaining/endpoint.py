"""Endpoint of calls, and its key: checked before the first call, so that a key never leaves for elsewhere."""

import ipaddress
import os
import re
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from endwise.common.errors import ConfigError

_PATH = "/chat/completions"


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible endpoint."""

    url: str
    """Address of chat completions."""
    key: str | None = field(default=None, repr=False)
    """Sent as a bearer token; never written, logged or part of a message."""
    key_variable: str | None = None
    """The environment variable that it was taken from."""

    @property
    def is_local(self) -> bool:
        """True if it is on this machine."""
        return _is_loopback(urlsplit(self.url).hostname or "")

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.key is None else {"Authorization": f"Bearer {self.key}"}

    def hidden(self, text: str) -> str:
        """The text without the key, which some servers repeat in their errors."""
        return text.replace(self.key, "***") if self.key else text


def find_endpoint(address: str, key_variable: str | None = None) -> Endpoint:
    """
    Args:
        address: the base of the API, `http://127.0.0.1:8080/v1`, or of chat completions itself.
        key_variable: name of the environment variable that holds the key; without it no key is sent.

    Raises:
        ConfigError: it is no such address, or the variable holds no key, or the key would go unencrypted to another
            machine.
    """
    try:
        parts = urlsplit(address)
        host = parts.hostname
        _ = parts.port
    except ValueError as error:
        raise ConfigError(f"--endpoint {address!r:.200} is not an address ({error}). {_EXAMPLE}") from None
    if parts.username or parts.password:
        raise ConfigError(
            "--endpoint must not hold a user or a password. Put the key into an environment variable and "
            "name it: --key-variable NAME."
        )
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
        raise ConfigError(f"--endpoint {address!r:.200} must be http(s)://HOST[:PORT]/PATH without ? and #. {_EXAMPLE}")
    base = address.rstrip("/").removesuffix(_PATH)
    key = None if key_variable is None else _key(key_variable)
    if key is not None and parts.scheme == "http" and not _is_loopback(host):
        raise ConfigError(
            f"The key would go unencrypted to {host}. Use https://, or leave out --key-variable if the server needs "
            "none."
        )
    return Endpoint(base + _PATH, key, key_variable)


_EXAMPLE = "For example: --endpoint http://127.0.0.1:8080/v1"


def _key(variable: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*", variable, re.ASCII):
        raise ConfigError(  # never repeated: it may be the key itself
            "--key-variable takes the name of an environment variable that holds the key, such as OPENAI_API_KEY, not "
            "the key itself."
        )
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(f"The environment variable {variable} holds no key. Set it, or leave out --key-variable.")
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(f"The environment variable {variable} holds no valid key: it has blanks or is not ASCII.")
    return key


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

"""Addresses, and the keys that servers want: a key is never written into a config, only where it is found."""

import os
import re
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from configs.errors import ConfigError


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("should be http://HOST... or https://HOST...")
    if parts.username is not None:
        raise ValueError(
            "holds a user or a password, which would be written into the run's directory; take them out, and name "
            "the environment variable that holds the key (api_key_env)"
        )
    return url


def has_password(text: str) -> bool:
    """Whether a text is, or has in it, an address with a password."""
    return re.search(r"://[^/@\s]*:[^/@\s]+@", text) is not None


def without_passwords(text: str) -> str:
    """A text for a message, with what comes before a host in URLs left out."""
    return re.sub(r"[^\s/'\"]*:[^\s/'\"]+@", "...@", text)


Url = Annotated[str, Field(min_length=1), AfterValidator(_without_password)]
"""http:// or https://, with nobody's password in it."""
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


def bearer(variable: str | None, option: str) -> dict[str, str]:
    """Headers with the key that the environment variable holds; none where there is no variable.

    Raises ConfigError naming `option` when the variable is not set in this process.
    """
    if variable is None:
        return {}
    key = os.environ.get(variable)
    if not key:
        raise ConfigError(
            f"{option}: the environment variable {variable} is not set where the key is needed; on a cluster, set "
            "it in the pods or in the job's environment"
        )
    return {"Authorization": f"Bearer {key}"}

"""Ask once whether the Hugging Face Hub can be reached: libraries retry for half a minute, call after call."""

from __future__ import annotations

import functools
import ssl
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

TIMEOUT = 5.0  # seconds


@functools.cache
def why_offline() -> str:
    """Return why the Hub can't be reached; empty if it can. One request in a process, none with HF_HUB_OFFLINE."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        with urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=TIMEOUT):
            return ""
    except HTTPError:
        return ""  # it answers, if not to this
    except URLError as error:
        if isinstance(error.reason, ssl.SSLError):
            return ""  # certificates that only the libraries know of
        return f"{constants.ENDPOINT}: {error.reason}"
    except (OSError, ValueError) as error:
        return f"{constants.ENDPOINT}: {error}"

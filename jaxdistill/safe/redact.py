"""Takes keys and passwords out of text before it is kept or shown."""

import os
import re
from typing import Any

_SHOWN = "[redacted]"
_SHORTEST = 12  # characters of a value of the environment that can be told from a plain word
# Every part is bounded: a hostile text must not be able to make the search take for ever.
_NAME = r"(?:secret|passw(?:or)?d|api[_-]?key|(?:auth|access|hf)[_-]?token)"
_SECRET = re.compile(
    rf"(?i)(--[\w-]{{0,40}}{_NAME}\s{{1,9}}"
    rf"|{_NAME}[\"']?\s{{0,9}}[:=]\s{{0,9}}[\"']?"
    r"|\bbearer\s{1,9}"
    r"|[?&](?:token|key|sig|signature|x-amz-signature)=)[^\s\"',}&]+"
    r"|\b(?:hf_|sk-|ghp_|gho_|AKIA)[A-Za-z0-9_-]{16,}"
    r"|(?<=://)[^\s/:@]{1,100}:[^\s/@]{1,200}(?=@)"
)
_VARIABLE = re.compile(r"(?i)(?:^|_)(?:key|token|secret|passw(?:or)?d|credentials?)$|api_?key")
_learnt: set[str] = set()


def learn(value: str) -> str:
    """Remembers a key that this process uses, whatever its variable is called; returns it."""
    if len(value) >= _SHORTEST:
        _learnt.add(value)
    return value


def redact(text: str) -> str:
    """The text with what looks like a key or a password, or is one here, as [redacted].

    Known are the keys that were learnt, and what the environment's variables with such names hold.

    >>> redact("curl https://me:hunter2@host/x?token=abc -H 'Authorization: Bearer xyz'")
    "curl https://[redacted]@host/x?token=[redacted] -H 'Authorization: Bearer [redacted]'"
    """
    for value in sorted(_known(), key=len, reverse=True):
        text = text.replace(value, _SHOWN)
    return _SECRET.sub(lambda match: (match.group(1) or "") + _SHOWN, text)


def redacted(value: Any) -> Any:
    """A value of JSON with all its texts redacted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {redact(str(name)): redacted(item) for name, item in value.items()}
    return [redacted(item) for item in value] if isinstance(value, list | tuple) else value


def _known() -> set[str]:
    """Values that are secrets in this process; plain words are none."""
    ours = {value for name, value in os.environ.items() if _VARIABLE.search(name)}
    return _learnt | {
        value for value in ours if len(value) >= _SHORTEST and re.search("[0-9]", value)
    }

"""What math-verify says of an answer; for a process that can be killed, as SymPy may never end."""

import importlib.util
import logging
from typing import Any

# Imported with this module: SymPy takes seconds, which belong to the start of the process, not to
# the first answer. It is an extra; without it the verifier refuses before it starts a process.
_math_verify: Any = None
if importlib.util.find_spec("math_verify"):
    _math_verify = importlib.import_module("math_verify")
logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own limits are off


def judge(completion: str, gold: str) -> tuple[str | None, bool]:
    """(answer, whether it equals the gold one)."""
    wanted = _math_verify.parse(f"\\boxed{{{gold}}}", parsing_timeout=None)
    answers = _math_verify.parse(completion, parsing_timeout=None)
    if not answers:
        return None, False
    return str(answers[-1])[:200], _math_verify.verify(wanted, answers, timeout_seconds=None)

"""Names in the template of a context: the fields of a record, the prompt, a sibling's answer."""

import re

PROMPT, SIBLING = "prompt", "sibling"  # names in a template that are no fields of a record


def places(template: str) -> list[str]:
    """The names in braces of a template, in order; other braces are text."""
    return re.findall(r"\{([a-z_]+)\}", template)

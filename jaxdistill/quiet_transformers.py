"""transformers, imported without its notice that PyTorch is missing: it serves tokenizers here.

from jaxdistill.quiet_transformers import transformers
"""

import os

_ADVICE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
_before = os.environ.get(_ADVICE)
os.environ[_ADVICE] = "1"
try:
    import transformers as transformers
finally:
    if _before is None:
        del os.environ[_ADVICE]
    else:
        os.environ[_ADVICE] = _before

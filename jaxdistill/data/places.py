"""Places that TensorStore reads and writes: a folder, or a prefix of a bucket behind gs:// or s3://."""

import os
import re
from typing import Any

from jaxdistill.errors import ConfigError

SCHEMES = ("gs", "s3", "memory")
ERRORS = (OSError, ValueError, RuntimeError)  # TensorStore has no class of its own


def spec(tensorstore: Any, place: str) -> dict[str, Any]:
    """TensorStore's description of a place; its path ends with a slash, or is empty.

    An S3 server of one's own is named by $AWS_ENDPOINT_URL, one that speaks Google's protocol by
    $TENSORSTORE_GCS_HTTP_URL.

    Raises:
      ConfigError: for a URL of another scheme, or one without a bucket.
    """
    scheme, separator, _ = place.partition("://")
    if not separator:
        return {"driver": "file", "path": os.path.abspath(os.path.expanduser(place)) + "/"}
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES if name != "memory")
        raise ConfigError(f"{place}: give a folder, or a URL that begins with {known}")
    if not re.match(r"^[a-z0-9]+://[^/]+", place):
        raise ConfigError(f"{place}: names no bucket")
    try:
        found = tensorstore.KvStore.Spec(place + "/").to_json()
    except ERRORS as error:
        raise ConfigError(f"{place}: is no URL of a bucket: {first_line(error)}") from error
    if scheme == "s3" and (endpoint := os.environ.get("AWS_ENDPOINT_URL")):
        found |= {"endpoint": endpoint, "aws_region": os.environ.get("AWS_REGION", "us-east-1")}
    if scheme == "s3" and {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= os.environ.keys():
        # They come first anyway; the client says on stderr that it finds no files in ~/.aws.
        found |= {"aws_credentials": {"type": "environment"}}
    return found


def first_line(error: BaseException) -> str:
    """What TensorStore says of a failure, without the places in its own code."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]

"""The options of a teacher behind a server that speaks OpenAI's protocol."""

from pydantic import Field

from jaxdistill.section import Path, Section


class Api(Section):
    """A server that speaks OpenAI's protocol, such as vLLM or `jaxdistill serve`."""

    base_url: Path = Field(description="Such as http://localhost:8000/v1.")
    model: Path = Field(description="Its name for the model.")
    key_env: Path = Field(
        "OPENAI_API_KEY", description="Environment variable that holds the key; may be unset."
    )
    chat: bool = Field(
        False, description="Ask as the user's turn of a chat; else continue the prompt as text."
    )
    concurrency: int = Field(8, ge=1, le=512, description="Requests at the same time.")
    timeout_s: float = Field(120.0, gt=0, le=1e5, description="Seconds until a request failed.")
    retries: int = Field(
        5, ge=0, le=100, description="Further tries after an error that may pass, ever later."
    )
    max_failures: int = Field(
        20, ge=1, le=10**6, description="Give up after so many failed requests in a row."
    )
    logprobs: bool = Field(True, description="Ask for log-probabilities; not all servers can.")
    price_in: float = Field(0.0, ge=0, le=1e6, description="Cost of a million tokens read.")
    price_out: float = Field(0.0, ge=0, le=1e6, description="Cost of a million tokens written.")

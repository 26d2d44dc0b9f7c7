"""Model files of other tools: Hugging Face, GGUF, compressed-tensors and peft, read and written."""

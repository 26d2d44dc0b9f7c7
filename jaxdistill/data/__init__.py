"""From files to batches: read, check, template, tokenise, mask, pack, and feed by step number."""

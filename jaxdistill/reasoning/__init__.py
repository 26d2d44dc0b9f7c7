"""Reasoning: prompts that ask for it, rationales that teach it, verifiers that judge it."""

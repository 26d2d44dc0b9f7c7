"""The student's own text as a source of batches: prompts answered, packed, and made again alike."""

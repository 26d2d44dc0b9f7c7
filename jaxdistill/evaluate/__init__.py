"""How good a model is: on text, on questions, on tasks, beside others, and how fast."""

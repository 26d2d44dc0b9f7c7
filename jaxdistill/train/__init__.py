"""Training: the state, the compiled step, the loop around it, its checkpoints and its meter."""

"""What we measure, each against a named baseline in the same run."""

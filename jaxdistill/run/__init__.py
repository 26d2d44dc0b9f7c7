"""One run: its start, its session, its folder, and what is made of it."""

"""What a teacher said about texts, kept on TensorStore by the text, not by its place in a run."""

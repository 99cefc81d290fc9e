"""One table per model family."""

"""Where it runs: Ray actors, placement, the command line."""

"""What `bascule view` shows: reading the files of a run, choosing among its completions, and the page."""

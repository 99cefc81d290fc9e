"""What a run is: the schema of every option, and how YAML and the command line fill it."""

"""The pipeline: a run directory, its stages and the command line, on top of the libraries."""

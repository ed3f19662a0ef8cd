"""The stages of a run, a file each: read tables, call one library function, write tables."""

"""The page of a run in one HTML file: clips side by side, tables, curves, every setting."""

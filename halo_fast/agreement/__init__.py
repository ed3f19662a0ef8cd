"""How scores agree with labels: figures with intervals, baselines, probes."""

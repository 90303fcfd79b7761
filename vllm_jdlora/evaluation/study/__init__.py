"""The quality figures in one run: compression, baselines, sweeps and ablations, measured once and gone on with."""

"""What the benchmarks share: scripts and ``compare`` import from here, and nothing here imports a script."""

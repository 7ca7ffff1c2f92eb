"""How good a generator is and why: figures, memorised samples, findings, maps."""

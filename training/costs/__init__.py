"""What SPARSE layers cost each prompt: measured once, modelled, and spent within a budget."""

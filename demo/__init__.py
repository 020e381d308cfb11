"""`make demo`: serve a small real model with flux, ask it, and show what its layers did."""

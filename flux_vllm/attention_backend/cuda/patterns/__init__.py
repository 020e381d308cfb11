"""How CUDA prefills under each sparse pattern: `plan(pattern, batch, device)` of a file each."""

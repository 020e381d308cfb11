"""How the CPU prefills under each sparse pattern: `plan(pattern, chunk)` of a file each."""

"""KV memory of SPARSE layers given back while their requests live: "free_kv" (docs/KV_MEMORY.md).

vLLM lets several KV cache groups draw blocks from one pool. Layers that are SPARSE for every
request are put into groups of their own, whose manager frees what neither sinks nor window hold.
"""

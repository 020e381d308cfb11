"""KV memory of SPARSE layers given back while their requests live: "free_kv" (docs/KV_MEMORY.md).

vLLM lets several KV cache groups draw blocks from one pool. Layers that can be SPARSE are put into
groups of their own. Their managers free what neither sinks nor window hold: of every request where
the layers are always SPARSE, else of those whose routes, which come with a step's output, say so.
"""

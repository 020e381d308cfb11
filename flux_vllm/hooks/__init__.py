"""The places where vLLM has no extension point for what we need, wrapped.

vLLM 0.32 and 0.33. Each hook wraps one function; the tests in `tests/unit/hooks` fail when vLLM's
side of it changes. Those of `front_end` and the worker classes' touch other engines' functions, and
ask first whether the engine uses flux; the rest wrap the objects of a flux engine alone. What
`free_kv` wraps besides stands in `flux_vllm/kv`, and `tests/unit/kv` hold vLLM's side of it.
"""

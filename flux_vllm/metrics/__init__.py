"""Numbers for operators: counted in the worker, shown on the API server's `/metrics`."""

"""Numbers for operators: counted in worker and scheduler, shown on the API server's `/metrics`."""

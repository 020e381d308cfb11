"""The routes of recent requests over HTTP: a live page, its numbers, a view for one request."""

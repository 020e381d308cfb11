"""Apparatus of questions that were asked once; the pages of results say what came of them."""

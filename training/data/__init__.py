"""Prompts to train and evaluate routers on: task families over real text, files, batches."""

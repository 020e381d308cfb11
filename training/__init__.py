"""Train and evaluate Layer Routers for a frozen language model. Runs from the checkout."""

"""What several tests share: the independent reference, and tiny random models for it."""

"""What everything is held to: float32 in torch alone, with no regard to speed."""

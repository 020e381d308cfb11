"""Answers to real tasks through served engines, scored beside full attention's own."""

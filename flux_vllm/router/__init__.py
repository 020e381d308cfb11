"""The Layer Router: what it looks at, how it decides, how it is stored. Imports torch only."""

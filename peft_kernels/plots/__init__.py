"""Pictures of runs: of the examples', of the demo's, and of adapters. Needs matplotlib, which no other part does.

Every drawing function takes plain values and returns a matplotlib Figure, which no window and no file belongs to.
"""

"""The operations in plain torch: the fallback everywhere, and what runs on a CPU. Imports torch only."""

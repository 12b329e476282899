"""`make gpu`: what a GPU is for, and what becomes of it; `__main__` says how it is called."""

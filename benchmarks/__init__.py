"""What each operation costs: cases and providers in bench_<op>.py, the least time possible in floor.py."""

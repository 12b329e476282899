"""What each operation costs: bench_<op>.py has cases and providers, floor_<op>.py the least time possible."""

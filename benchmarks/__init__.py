"""What each operation costs: bench_<op>.py has cases and providers, floor/<op>.py the least time possible."""

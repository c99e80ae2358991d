"""What people write today, as well as its users would: the arms that benchmarks.study compares."""

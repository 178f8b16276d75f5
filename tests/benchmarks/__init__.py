"""What each lesson costs and brings, measured: python tests/benchmarks/run.py"""

"""Benchmarks. Each prints tables and, as the last line on stdout, one JSON document."""

"""The benchmark suite: one registry of cases, one way to measure, results in CSV files, and plots of them.

    python -m benchmarks list [pattern]
    python -m benchmarks run [pattern] [--tag paper] [--device cpu] [--only eager,cpp]
    python -m benchmarks report
    python -m benchmarks compare OLD NEW

A case is checked against the float64 reference before it is timed; one that fails has no speed and makes the
run exit with an error.
"""

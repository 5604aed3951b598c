"""End-to-end benchmarks: ``python -m dlmom_rs.bench``.

Everything is quoted as a ratio of two variants that ran in turns in one process, because the
absolute times of a shared machine mean little. ``docs/performance.md`` says what each means.
"""

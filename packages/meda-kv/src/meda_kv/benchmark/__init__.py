"""What the bench is made of: clocks and paired runs, caches to compare, the cost line, memory, and the report.

:func:`meda_kv.bench.run_bench` puts the pieces together.
"""

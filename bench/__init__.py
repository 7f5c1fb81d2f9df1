"""The benchmarks: `python -m bench` measures, `python -m bench.report` shows.

Read in this order: `workloads` (what is saved), `contenders` (who saves it), `cases`
(what is asked), `sessions` (a process for each), `running` (who is when asked).
"""

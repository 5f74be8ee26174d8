"""The steps of gpu_check.py, a file each: `run(report)` does one, in a process of its own."""

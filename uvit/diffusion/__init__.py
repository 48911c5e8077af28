"""The mathematics, on callables: processes, objectives, solvers and samplers."""

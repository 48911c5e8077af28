"""The mathematics of diffusion: processes, objectives, solvers and samplers, for any network that is a callable."""

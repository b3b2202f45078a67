"""Runs on a Slurm cluster: the plan of jobs, their submission, and what watches over each. Imports no torch."""

"""Pictures of the report, as SVG that needs nothing else."""

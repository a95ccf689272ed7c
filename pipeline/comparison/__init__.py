"""What ``python -m pipeline compare`` is made of: the plan, the trainings, the statistics and the table."""

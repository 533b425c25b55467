"""Those who do the jobs of a fleet or a study, on other processes and machines, any of which may die."""

"""Ways of training that a study compares: a file per arm ([Note: an arm's file] in studies/arm.py)."""

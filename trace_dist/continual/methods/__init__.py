"""Ways to learn a stream of tasks and to answer from what was learned; one file and one row in ``parts.METHODS`` each."""

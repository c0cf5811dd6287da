"""Where the training of a new task begins; one file and one row in ``parts.STARTS`` each."""

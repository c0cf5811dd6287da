"""Ways to keep a task off what earlier tasks trained; one file and one row in ``parts.ISOLATIONS`` each."""

"""Small-to-large: budgets from the proxy, places on the target."""

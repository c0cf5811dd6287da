"""Finding a task's core parameters: on the proxy, and in compact memory on the target."""

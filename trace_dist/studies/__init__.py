"""Studies: many short trainings that answer one question, each kept as it ends, and a page that shows what they say."""

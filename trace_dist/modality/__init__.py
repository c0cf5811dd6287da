"""What an example, a reader, a loss and a representation are ([Note: a modality's file] in data/modality.py)."""

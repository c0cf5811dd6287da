"""One rank of many, run without values: the training program itself, on torch's ``meta`` device and fake process group.

``rank`` makes the rank, ``recorder`` writes down what it asks of its accelerator and how much memory it holds, ``replay`` says
how long that takes on a GPU of ``gpus``. Everything said of time is a prediction by the model that ``replay`` states.
"""

"""Cluster models of a task's representations: a file per kind of signature.

A file gives ``label``, ``likelihood`` ([Note: likelihoods] in bank/signature.py) and ``fit(x, max_clusters, seed) ->
Clusters``: x [N, D] float64 without its held-out part, one covariance factor or, for the likelihood ``density``, the
tensors of ``density.Mixture``.
"""

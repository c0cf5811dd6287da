"""How places inside a tensor are chosen: a file per placement.

A file gives ``label``, ``scores(site, options) -> Scores`` (collective), its ``Options`` where it has any, and
``check_mask(options, mask)`` where they must fit the section ``mask``. ``check_models(options, outline)``, where there is one,
refuses models before anything is probed (``site.Outline``). With ``needs_proxy = False`` there are no budgets: the
units of all tensors compete by its scores. With ``needs_scores = True`` it reads the proxy's scores (``Site.shown``), and
``matching(site, mask)`` says, JSON-ready, where the mask's entries come from; the mask keeps it. With ``needs_module = True`` it
runs the proxy itself.
"""

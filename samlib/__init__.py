"""Sharpness-aware minimisation: the optimisers, measures of flatness, and a study of what four papers claim.

    samlib.optim      SAM, ASAM, average SAM and mSAM beside torch.optim
    samlib.batchnorm  what batch norm does on the second pass
    samlib.measures   sharpness, top Hessian eigenvalue, the perturbation that acts at a precision
    samlib.augment    random changes of batches of images, on their device

Those four take plain values and need nothing else of samlib. The study goes one way through the house:

    experiments -> spec -> train (sweep) -> store -> stats, claims, plots, report
"""

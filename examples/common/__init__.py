"""What the examples share.

    data.py         readers of the published files, images, and loaders
    training.py     command line, training loop, checkpoints
    blip.py         BLIP's parts and its adapters
    retrieval.py    BLIP between images (or videos) and texts: objective and recall
    answering.py    BLIP's answers: objective, ranking, generation
    vilt.py         ViLT's tasks
"""

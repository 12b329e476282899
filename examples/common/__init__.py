"""What the examples share.

    data.py         readers of the published files, images, and loaders
    videos.py       readers of videos' captions, questions and frames
    augment.py      what Aurora's release does to training images
    training.py     command line, training loop, checkpoints
    predictions.py  what evaluations leave, case by case
    blip.py         BLIP's parts and its adapters
    hooks.py        what the release's BLIP does in training and transformers' does not
    retrieval.py    BLIP between images (or videos) and texts: objective and recall
    answering.py    BLIP's answers: objective, ranking, generation
    vilt.py         ViLT's tasks

It is no package to install: a script finds it beside itself.
"""

"""What the examples share.

    data.py         readers of the published files, images, and loaders
    videos.py       readers of videos' captions, questions and frames
    augment.py      images as Aurora's release changes them
    training.py     command line, training loop, checkpoints
    predictions.py  what evaluations leave, case by case
    blip.py         BLIP's parts and its adapters
    hooks.py        what the release's BLIP does in training and transformers' does not
    retrieval.py    BLIP between images (or videos) and texts: objective and recall
    answering.py    BLIP's answers: objective, ranking, generation
    vilt.py         ViLT's tasks
    moil.py         MoIL's options, optimizer groups and evaluations
    questions.py    VQA v2 and NLVR2 as classification: splits, labels, scores, and what an evaluation writes
    randaugment.py  images as MoIL's release changes them
    regions.py      files of region features
    region_models.py  LXMERT, VisualBERT, and a BERT that reads regions

It is no package to install: a script finds it beside itself.
"""

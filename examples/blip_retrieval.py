"""Fine-tune BLIP for image-text retrieval with Aurora or LoRA, on Flickr30K or COCO with Karpathy's splits.

ITC against a momentum queue with soft targets, ITM with hard negatives and context enhancement; recall@1, 5 and 10 and
ranks both ways, the best candidates ranked again by the matching head. Defaults are those of Aurora's release
(github.com/WillDreamer/Aurora, train_retrieval.py and configs/retrieval_*.yaml): rank 32, the dense core in its own
layout, additive gates, text_proj frozen, weight decay for all that trains, images cropped, flipped and changed. The
article's are --core cp --rank 64 --no-released. Context enhancement lets labels leak (--enhance has more of it).

What differs: the release trains on 8 GPUs, and for COCO draws hard negatives from all of them. It starts from BLIP's
pre-trained model_base.pth, whose temperature, momentum encoder and queue it goes on with where the file has them. The
files of transformers have none: the temperature is 0.07, and the momentum encoder starts as the model.

    python examples/blip_retrieval.py --data flickr30k [--zero-shot]

--data holds dataset_flickr30k.json with images/, or dataset_coco.json with train2014/ and val2014/.
"""

from functools import partial
from pathlib import Path

from common import blip, retrieval, training
from common.data import Examples, checked, clean_caption, karpathy_dataset, loader, read_karpathy
from transformers import BlipForImageTextRetrieval

PUBLISHED = {
    "flickr30k": {"lr": 1e-4, "epochs": 4, "batch_size": 16, "k_test": 128},
    "coco": {"lr": 1e-5, "epochs": 6, "batch_size": 16, "k_test": 256},
}
WORDS = 30  # of a caption


def main(argv: list[str] | None = None) -> list[dict] | dict:
    """Returns what every epoch's line prints; of an evaluation alone, its metrics."""
    options = training.parser(__doc__.splitlines()[0], model="Salesforce/blip-itm-base-coco", out="runs/blip_retrieval")
    options.set_defaults(rank=32, drop_path=0.0)
    options.add_argument("--images", type=Path, help="instead of DATA/images, or DATA")
    options.add_argument("--split", choices=("val", "test"), default="test", help="to evaluate (default: %(default)s)")
    blip.add_options(options, "blip-retrieval")
    retrieval.add_options(options, beta=0.0)
    args = training.parse(options, argv)
    training.fill(args, PUBLISHED[karpathy_dataset(args.data)])
    blip.configuration(args)

    splits = read_karpathy(args.data, args.images)
    train, test = splits["train"][: args.limit], splits[args.split][: args.limit]
    checked(test if training.only_evaluates(args) else train + test)

    model, processor = blip.load(args, BlipForImageTextRetrieval)
    batches = blip.Batches(processor, partial(clean_caption, words=WORDS), args.image_size)
    evaluate = retrieval.RetrievalTest(args, model, batches, test)
    if args.zero_shot:
        return training.report(args, model, evaluate)
    adapter = blip.wrap(args, model)
    if args.evaluate is not None:
        return training.report(args, model, evaluate)
    loss = retrieval.RetrievalLoss(args, adapter)
    return training.fit(
        args,
        adapter,
        loader(args, Examples(train, batches.augment(args)), batches, train=True),
        loss,
        evaluate,
        groups=blip.groups(args, adapter),
        after_step=loss.after_step,
        state={"loss": loss},
    )


if __name__ == "__main__":
    main()

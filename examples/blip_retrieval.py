"""Fine-tune BLIP for image-text retrieval with Aurora or LoRA, on Flickr30K or COCO with Karpathy's splits.

ITC against a momentum queue with soft targets, ITM with hard negatives; recall@1, 5 and 10 both ways, the best
candidates ranked again by the matching head. Defaults are those of Aurora's release (github.com/WillDreamer/Aurora,
configs/retrieval_*.yaml), which trains on 8 GPUs; this runs on one.

    python examples/blip_retrieval.py --data flickr30k [--zero-shot]

--data holds dataset_flickr30k.json with images/, or dataset_coco.json with train2014/ and val2014/.
"""

from pathlib import Path

from common import blip, retrieval, training
from common.data import Examples, checked, karpathy_dataset, loader, read_karpathy
from transformers import BlipForImageTextRetrieval

PUBLISHED = {
    "flickr30k": {"lr": 1e-4, "epochs": 4, "batch_size": 16, "k_test": 128},
    "coco": {"lr": 1e-5, "epochs": 6, "batch_size": 16, "k_test": 256},
}


def main(argv: list[str] | None = None) -> list[dict] | dict:
    """Returns what every epoch's line prints; of an evaluation alone, its metrics."""
    options = training.parser(__doc__.splitlines()[0], model="Salesforce/blip-itm-base-coco", out="runs/blip_retrieval")
    options.add_argument("--images", type=Path, help="instead of DATA/images, or DATA")
    options.add_argument("--split", choices=("val", "test"), default="test", help="to evaluate (default: %(default)s)")
    options.add_argument("--augment", action="store_true", help="random crops and flips, no RandAugment")
    blip.add_options(options, "blip-retrieval")
    retrieval.add_options(options, beta=0.0)
    args = training.parse(options, argv)
    training.fill(args, PUBLISHED[karpathy_dataset(args.data)])

    splits = read_karpathy(args.data, args.images)
    train, test = splits["train"][: args.limit], splits[args.split][: args.limit]
    checked(test if training.only_evaluates(args) else train + test)

    model, processor = blip.load(args, BlipForImageTextRetrieval)
    batches = blip.Batches(processor)
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
        loader(args, Examples(train, augment=args.augment), batches, train=True),
        loss,
        evaluate,
        after_step=loss.after_step,
        state={"loss": loss},
    )


if __name__ == "__main__":
    main()

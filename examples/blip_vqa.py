"""Fine-tune BLIP for visual question answering with Aurora or LoRA, on VQA v2's own files.

The decoder's loss of every answer, weighted by how many annotators gave it; accuracy as the challenge counts it, of
the likeliest of 3,128 frequent answers or of freely written ones. Defaults are those of Aurora's release
(github.com/WillDreamer/Aurora, configs/vqa.yaml), which trains on 8 GPUs, and on the validation split and Visual Genome
too: --train train2014 val2014 --test test-dev2015 writes answers for the challenge's server.

    python examples/blip_vqa.py --data vqa2 [--zero-shot]

--data holds v2_OpenEnded_mscoco_train2014_questions.json, v2_mscoco_train2014_annotations.json, train2014/, the same
for val2014.
"""

import json

from common import answering, blip, training
from common.data import Examples, checked, fail, loader, read_vqa
from transformers import BlipForQuestionAnswering


def main(argv: list[str] | None = None) -> list[dict] | dict:
    """Returns what every epoch's line prints; of an evaluation alone, its metrics."""
    options = training.parser(__doc__.splitlines()[0], model="Salesforce/blip-vqa-base", out="runs/blip_vqa")
    options.set_defaults(lr=2e-5, epochs=5, batch_size=16, k_test=128)
    options.add_argument("--train", nargs="+", default=["train2014"], help="splits (default: train2014)")
    options.add_argument("--test", default="val2014", help="the split to evaluate (default: %(default)s)")
    options.add_argument("--image-size", type=int, help="the release's 384 is the processor's own")
    options.add_argument("--augment", action="store_true", help="random crops and flips")
    blip.add_options(options, "blip-vqa")
    answering.add_options(options, inference="rank")
    args = training.parse(options, argv)

    train = [example for split in args.train for example in read_vqa(args.data, split)[: args.limit]]
    test = read_vqa(args.data, args.test)[: args.limit]
    checked(test if training.only_evaluates(args) else train + test)
    candidates = answering.common_answers(train, args.answers) if args.inference == "rank" else None
    if candidates == []:
        fail(f"--train: {' '.join(args.train)}: no answers to choose from")

    model, processor = blip.load(args, BlipForQuestionAnswering)
    batches = blip.Batches(processor, args.image_size)
    task = answering.Answering(args, model, processor.tokenizer)
    questions = loader(args, Examples(test), batches)

    def evaluate() -> dict[str, float]:
        predictions = task.predict(questions, candidates)
        rows = [{"question_id": key, "answer": answer} for key, answer in predictions.items()]
        training.save_text(args.out / f"answers_{args.test}.json", json.dumps(rows) + "\n")
        return {"accuracy": answering.accuracy(test, predictions)} if test[0].answers else {"answered": len(rows)}

    if args.zero_shot:
        return training.report(args, model, evaluate)
    adapter = blip.wrap(args, model)
    if args.evaluate is not None:
        return training.report(args, model, evaluate)
    shuffled = loader(args, Examples(train, augment=args.augment), batches, train=True)
    return training.fit(args, adapter, shuffled, task.loss, evaluate)


if __name__ == "__main__":
    main()

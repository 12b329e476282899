"""Fine-tune BLIP for visual question answering with Aurora or LoRA, on VQA v2's own files.

The decoder's loss of every answer, weighted by how many annotators gave it; accuracy as the challenge counts it, of
the likeliest of 3,128 frequent answers or of freely written ones. Defaults are those of Aurora's release
(github.com/WillDreamer/Aurora, train_vqa.py and configs/vqa.yaml): rank 32, the dense core in the release's layout,
additive gates, no label smoothing, drop-path 0.1, images cropped, flipped and changed. The article's are --core cp
--rank 64.

What differs: the release trains on 8 GPUs, on the validation split too, and writes answers for the challenge's server:
--train train2014 val2014 --test test2015. (It asks for Visual Genome, and trains on nothing of it.) It chooses from
BLIP's answer_list.json (--answer-list); here candidates are the training split's most frequent answers.

    python examples/blip_vqa.py --data vqa2 [--zero-shot]

--data holds v2_OpenEnded_mscoco_train2014_questions.json, v2_mscoco_train2014_annotations.json, train2014/, the same
for val2014.
"""

from common import answering, blip, predictions, training
from common.data import Examples, checked, clean_question, loader, read_vqa
from transformers import BlipForQuestionAnswering


def main(argv: list[str] | None = None) -> list[dict] | dict:
    """Returns what every epoch's line prints; of an evaluation alone, its metrics."""
    options = training.parser(__doc__.splitlines()[0], model="Salesforce/blip-vqa-base", out="runs/blip_vqa")
    options.add_argument("--train", nargs="+", default=["train2014"], help="splits (default: train2014)")
    options.add_argument("--test", default="val2014", help="the split to evaluate (default: %(default)s)")
    blip.add_options(options, "blip-vqa")
    answering.add_options(options, inference="rank")
    options.set_defaults(lr=2e-5, epochs=5, batch_size=16, rank=32, drop_path=0.1, k_test=128)
    args = training.parse(options, argv)
    blip.configuration(args)

    train = [example for split in args.train for example in read_vqa(args.data, split)[: args.limit]]
    test = read_vqa(args.data, args.test)[: args.limit]
    checked(test if training.only_evaluates(args) else train + test)
    candidates = answering.candidates(args, train)

    model, processor = blip.load(args, BlipForQuestionAnswering)
    batches = blip.Batches(processor, clean_question, args.image_size)
    task = answering.Answering(args, model, processor.tokenizer)
    questions = loader(args, Examples(test), batches)

    def evaluate() -> dict[str, float]:
        answers = task.predict(questions, candidates)
        rows = [{"question_id": key, "answer": answer} for key, answer in answers.items()]
        training.save_json(args.out / f"answers_{args.test}.json", rows)
        predictions.save(args.out, predictions.answer_rows(test, answers, answering.accuracy))
        return {"accuracy": answering.accuracy(test, answers)} if test[0].answers else {"answered": len(rows)}

    if args.zero_shot:
        return training.report(args, model, evaluate)
    adapter = blip.wrap(args, model)
    if args.evaluate is not None:
        return training.report(args, model, evaluate)
    shuffled = loader(args, Examples(train, batches.augment(args)), batches, train=True)
    return training.fit(args, adapter, shuffled, task.loss, evaluate, groups=blip.groups(args, adapter))


if __name__ == "__main__":
    main()

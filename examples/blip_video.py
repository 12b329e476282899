"""BLIP on MSR-VTT with Aurora or LoRA: text-to-video retrieval and question answering, from folders of frames.

retrieval   A video is the mean of its frames where it is compared, and all of their states, one frame after the other,
            where the matching head reads it. With --zero-shot an image-text model is evaluated as it is. Trains as
            blip_retrieval.py does, on all captions of videos that are not in the test file.
qa          MSRVTT-QA: the question reads the states of all frames, one after the other (--frames-read concat) or
            averaged place by place (mean), and a decoder writes the answer; it counts if it is the annotated one.

Frames are taken evenly from those that are there (the release decodes videos, and draws frames at random). Other
defaults are those of Aurora's release (github.com/WillDreamer/Aurora, configs/retrieval_msrvtt.yaml and videoqa.yaml).

    python examples/blip_video.py --task retrieval --data msrvtt [--zero-shot]
    python examples/blip_video.py --task qa --data msrvtt

--data holds frames/video7020/*.jpg (or frames/video7020_*.jpg), and train.jsonl and test.jsonl, or train_qa.json and
test_qa.json.
"""

from pathlib import Path

from common import answering, blip, retrieval, training
from common.data import Examples, checked, loader, read_video_captions, read_video_questions
from transformers import BlipForImageTextRetrieval, BlipForQuestionAnswering

PUBLISHED = {
    "retrieval": {"lr": 1e-4, "epochs": 5, "batch_size": 8, "k_test": 128, "model": "Salesforce/blip-itm-base-coco"},
    "qa": {"lr": 2e-5, "epochs": 5, "batch_size": 12, "k_test": 128, "model": "Salesforce/blip-vqa-base"},
}
MODELS = {"retrieval": BlipForImageTextRetrieval, "qa": BlipForQuestionAnswering}
FILES = {"retrieval": ("train.jsonl", "test.jsonl"), "qa": ("train_qa.json", "test_qa.json")}
READERS = {"retrieval": read_video_captions, "qa": read_video_questions}


def main(argv: list[str] | None = None) -> list[dict] | dict:
    """Returns what every epoch's line prints; of an evaluation alone, its metrics."""
    options = training.parser(__doc__.splitlines()[0], model=None, out="runs/blip_video")
    options.add_argument("--task", choices=PUBLISHED, required=True)
    options.add_argument("--train", help="file in DATA: .jsonl, MSRVTT_data.json, or questions (default: train.jsonl)")
    options.add_argument("--test", help="file in DATA: .jsonl, .csv, or questions (default: test.jsonl)")
    options.add_argument("--images", type=Path, help="the folder of frames (default: DATA/frames)")
    options.add_argument("--frames", type=int, default=8, help="of each video (default: %(default)s)")
    options.add_argument("--frames-read", choices=("concat", "mean"), default="concat", help="qa (default: concat)")
    options.add_argument("--image-size", type=int, default=224, help="(default: %(default)s)")
    options.add_argument("--augment", action="store_true", help="random crops and flips, of each frame its own")
    blip.add_options(options, "blip-video")
    retrieval.add_options(options, beta=1.0)
    answering.add_options(options, inference="generate")
    args = training.parse(options, argv)
    training.fill(args, PUBLISHED[args.task])

    folder, read = args.images or args.data / "frames", READERS[args.task]
    files = [args.data / (given or usual) for given, usual in zip((args.train, args.test), FILES[args.task])]
    test, train = read(files[1], folder), []
    if not training.only_evaluates(args) or (args.task == "qa" and args.inference == "rank"):
        train = read(files[0], folder)
    if args.task == "retrieval":
        tested = {example.key for example in test}
        train = [example for example in train if example.key not in tested]
    train, test = train[: args.limit], test[: args.limit]
    checked(test if training.only_evaluates(args) else train + test)

    model, processor = blip.load(args, MODELS[args.task])
    batches = blip.Batches(processor, args.image_size)
    task = answering.Answering(args, model, processor.tokenizer, args.frames_read)
    questions = loader(args, Examples(test, args.frames), batches)
    candidates = answering.common_answers(train, args.answers) if args.inference == "rank" else None

    def accuracy() -> dict[str, float]:
        return {"accuracy": answering.accuracy(test, task.predict(questions, candidates))}

    recall = retrieval.RetrievalTest(args, model, batches, test, args.frames)
    evaluate = recall if args.task == "retrieval" else accuracy
    if args.zero_shot:
        return training.report(args, model, evaluate)
    adapter = blip.wrap(args, model)
    if args.evaluate is not None:
        return training.report(args, model, evaluate)
    shuffled = loader(args, Examples(train, args.frames, args.augment), batches, train=True)
    if args.task == "qa":
        return training.fit(args, adapter, shuffled, task.loss, evaluate)
    loss = retrieval.RetrievalLoss(args, adapter)
    after = {"after_step": loss.after_step, "state": {"loss": loss}}
    return training.fit(args, adapter, shuffled, loss, evaluate, **after)


if __name__ == "__main__":
    main()

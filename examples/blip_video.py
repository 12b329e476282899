"""BLIP on MSR-VTT and DiDeMo with Aurora or LoRA: text-to-video retrieval and question answering, from frames.

retrieval   A video is the mean of its frames where it is compared, and all of their states, one frame after the other,
            where the matching head reads it: in training, of frames that are like the text it reads more
            (--frame-aware). Trains as blip_retrieval.py does, on all captions of videos that are not in the test file.
            DiDeMo's captions of one video are one paragraph. With --zero-shot a model of images is evaluated as it is.
qa          MSRVTT-QA: the question reads the states of all frames, one after the other (--frames-read concat) or
            averaged place by place (mean), and a decoder writes the answer; it counts if it is the annotated one.

Defaults are those of Aurora's release (github.com/WillDreamer/Aurora, train_video_retrieval.py, train_vqa.py and
configs/retrieval_msrvtt.yaml, retrieval_didemo.yaml, videoqa.yaml): rank 64 (qa 32), 8 frames of 224 pixels, drawn at
random in training and in evaluation, the answers' loss times 0.05 / 8, no augmentation. Of DiDeMo the release crops the
frames' middle, does not normalise them (--normalize does), and reads a clip of 2.7 seconds: of frames at 3 a second, 8
neighbours. (Its configuration has 16 for DiDeMo's evaluation, which its code does not read.)

What differs: the release decodes videos and draws from all of their frames; and it trains on 8 GPUs. blip_retrieval.py
has the rest.

    python examples/blip_video.py --task retrieval --data msrvtt [--zero-shot]
    python examples/blip_video.py --task retrieval --dataset didemo --data didemo
    python examples/blip_video.py --task qa --data msrvtt

--data holds frames/video7020/*.jpg (or frames/video7020_*.jpg), and train.jsonl and test.jsonl, or train_qa.json and
test_qa.json.
"""

import argparse
from functools import partial
from pathlib import Path

from common import answering, blip, predictions, retrieval, training
from common.data import Examples, checked, clean_caption, fail, loader
from common.videos import DRAWN, draw_frames, read_video_captions, read_video_questions
from transformers import BlipForImageTextRetrieval, BlipForQuestionAnswering

PUBLISHED = {
    "retrieval": {"lr": 1e-4, "batch_size": 8, "rank": 64, "drop_path": 0.0, "model": "Salesforce/blip-itm-base-coco"},
    "qa": {"lr": 2e-5, "batch_size": 12, "rank": 32, "drop_path": 0.1, "model": "Salesforce/blip-vqa-base"},
    "msrvtt": {"frames_drawn": "random", "crop": False, "normalize": True},
    "didemo": {"frames_drawn": "clip", "crop": True, "normalize": False},
}
MODELS = {"retrieval": BlipForImageTextRetrieval, "qa": BlipForQuestionAnswering}
FILES = {"retrieval": ("train.jsonl", "test.jsonl"), "qa": ("train_qa.json", "test_qa.json")}
WORDS = 40  # of a caption; questions are read as they are


def parse(argv: list[str] | None) -> argparse.Namespace:
    options = training.parser(__doc__.splitlines()[0], model=None, out="runs/blip_video")
    add = options.add_argument
    add("--task", choices=MODELS, required=True)
    add("--dataset", choices=("msrvtt", "didemo"), default="msrvtt", help="(default: %(default)s)")
    add("--train", help="file in DATA: .jsonl, MSRVTT_data.json, train_data.json, or questions (default: train.jsonl)")
    add("--test", help="file in DATA: .jsonl, .csv, test_data.json, or questions (default: test.jsonl)")
    add("--images", type=Path, help="the folder of frames (default: DATA/frames)")
    add("--frames", type=int, default=8, help="of each video (default: %(default)s, as the release reads DiDeMo too)")
    add("--frames-drawn", choices=DRAWN, help="(default: random, of DiDeMo a clip of neighbours)")
    add("--frames-read", choices=("concat", "mean"), default="concat", help="qa (default: concat)")
    add(
        "--frame-aware",
        action=blip.FLAG,
        default=True,
        help="retrieval: attention to frames like the text, in training",
    )
    add("--crop", action=blip.FLAG, help="the middle of a frame instead of all of it, squeezed (default: DiDeMo)")
    add("--normalize", action=blip.FLAG, help="frames as BLIP was trained on them (default: not DiDeMo's)")
    add("--loss-scale", type=float, help="qa (default: 0.05 / FRAMES)")
    blip.add_options(options, "blip-video", augment=False)
    retrieval.add_options(options, beta=1.0)
    answering.add_options(options, inference="generate")
    options.set_defaults(epochs=5, k_test=128, image_size=224)
    args = training.parse(options, argv)
    if args.task == "qa" and args.dataset == "didemo":
        fail("--task qa: DiDeMo has no questions")
    training.fill(args, {**PUBLISHED[args.task], **PUBLISHED[args.dataset], "loss_scale": 0.05 / max(args.frames, 1)})
    blip.configuration(args)
    return args


def main(argv: list[str] | None = None) -> list[dict] | dict:
    """Returns what every epoch's line prints; of an evaluation alone, its metrics."""
    args = parse(argv)
    folder, read = args.images or args.data / "frames", read_video_questions
    if args.task == "retrieval":
        read = partial(read_video_captions, paragraphs=args.dataset == "didemo")
    files = [args.data / (given or usual) for given, usual in zip((args.train, args.test), FILES[args.task])]
    test, train = read(files[1], folder), []
    listed = args.task == "qa" and args.inference == "rank" and args.answer_list is None
    if not training.only_evaluates(args) or listed:
        train = read(files[0], folder)
    if args.task == "retrieval":
        tested = {example.key for example in test}
        train = [example for example in train if example.key not in tested]
    train, test = train[: args.limit], test[: args.limit]
    checked(test if training.only_evaluates(args) else train + test)
    candidates = answering.candidates(args, train) if args.task == "qa" else None

    model, processor = blip.load(args, MODELS[args.task])
    clean = partial(clean_caption, words=WORDS) if args.task == "retrieval" else str
    batches = blip.Batches(processor, clean, args.image_size, args.crop, args.normalize)
    draw = partial(draw_frames, count=args.frames, drawn=args.frames_drawn)
    task = answering.Answering(args, model, processor.tokenizer, args.frames_read, args.loss_scale)
    questions = loader(args, Examples(test, draw=draw), batches)

    def answer() -> dict[str, float]:
        answers = task.predict(questions, candidates)
        predictions.save(args.out, predictions.answer_rows(test, answers, answering.accuracy))
        return {"accuracy": answering.accuracy(test, answers)}

    evaluate = answer if args.task == "qa" else retrieval.RetrievalTest(args, model, batches, test, draw)
    if args.zero_shot:
        return training.report(args, model, evaluate)
    adapter = blip.wrap(args, model)
    if args.evaluate is not None:
        return training.report(args, model, evaluate)
    shuffled = loader(args, Examples(train, batches.augment(args), draw), batches, train=True)
    groups = blip.groups(args, adapter)
    if args.task == "qa":
        return training.fit(args, adapter, shuffled, task.loss, evaluate, groups=groups)
    loss = retrieval.RetrievalLoss(args, adapter, args.frame_aware)
    after = {"after_step": loss.after_step, "state": {"loss": loss}}
    return training.fit(args, adapter, shuffled, loss, evaluate, groups=groups, **after)


if __name__ == "__main__":
    main()

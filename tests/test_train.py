"""examples/train.py: its photographs and crops, its score, and that a training is the same however it is run.

Run as a script, by torchrun or alone, this file writes the gradients of one step: see `step_gradients`.
"""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
for module in ("torchvision", "pycocotools", "matplotlib", "skimage"):
    pytest.importorskip(module)
sys.path.insert(0, str(EXAMPLES))

import photos  # noqa: E402
import results  # noqa: E402
import train  # noqa: E402
from PIL import Image  # noqa: E402

RED, GREEN = (255, 0, 0), (0, 255, 0)
SMALL = ["--size", "64", "--batch", "2", "--device", "cpu"]


def write_data(folder: Path, **changes) -> tuple[Path, Path]:
    """Five photographs of 40 x 20 pixels, green with a red rectangle; the last is without objects."""
    images, annotations = [], []
    for i in range(5):
        picture = Image.new("RGB", (40, 20), GREEN)
        if i < 4:
            picture.paste(RED, (8, 4, 16, 16))
            box = {"image_id": 10 + i, "bbox": [8, 4, 8, 12], "area": 96, "iscrowd": 0}
            annotations.append({"id": 1 + i, "category_id": 7 if i % 2 else 90, **box})
        picture.save(folder / f"{i}.png")
        images.append({"id": 10 + i, "file_name": f"{i}.png", "width": 40, "height": 20})
    document = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 90, "name": "late"}, {"id": 7, "name": "early"}],
    }
    for key, change in changes.items():
        document[key] = change(document[key])
    (folder / "annotations.json").write_text(json.dumps(document))
    return folder, folder / "annotations.json"


def photo(folder: Path, **changes) -> photos.Photo:
    """The first of them. Its rectangle is [8, 4, 16, 16]."""
    folder, annotations = write_data(folder, **changes)
    data = photos.load(folder, annotations)
    return min(data.train + data.held_out, key=lambda photo: photo.path.name)


class TestSample:
    """Oracle: the files themselves."""

    def test_annotations_fit_the_photographs(self):
        document = json.loads(photos.SAMPLE.read_text())
        images = {image["id"]: image for image in document["images"]}
        assert len({annotation["id"] for annotation in document["annotations"]}) == len(document["annotations"])
        for image in images.values():
            with Image.open(photos.sample_folder() / image["file_name"]) as picture:
                assert picture.size == (image["width"], image["height"])
        for annotation in document["annotations"]:
            image = images[annotation["image_id"]]
            left, top, width, height = image.get("region", [0, 0, image["width"], image["height"]])
            x, y, w, h = annotation["bbox"]
            assert w > 0 and h > 0 and annotation["area"] == w * h
            assert left <= x and x + w <= left + width and top <= y and y + h <= top + height

    def test_no_training_crop_shows_what_is_held_out(self):
        data = photos.load()
        for held_out in data.held_out:
            for shown in data.train:
                if shown.path == held_out.path and held_out.use == "held out":
                    assert shown.region[3] <= held_out.region[1]  # the coins above, and those below
        assert {photo.path.name for photo in data.held_out if photo.use == "held out"} == {
            "motorcycle_right.png",
            "coins.png",
        }

    def test_evaluation_is_at_sizes_that_training_leaves_out(self, monkeypatch):
        data, trained = photos.load(), []

        def record(photo, window, mirrored, size):
            trained.append(share(photo, window))
            return torch.empty(0), {
                "crowd": torch.tensor([False]),
                "boxes": photo.boxes[:1],
                "labels": photo.labels[:1],
            }

        def share(photo, window):
            x1, y1, x2, y2 = photo.region
            return window[2] / ((x2 - x1) * (y2 - y1)) ** 0.5

        held_out = [share(photo, window) for photo, window, _ in photos.held_out_views(data)]
        monkeypatch.setattr(photos, "crop", record)
        for sample in range(500):
            photos.training_crop(data, 0, 0, sample, 64)
        low, high = min(held_out), max(held_out)
        assert low > 0.76 and high < 0.84
        assert sum(side < low for side in trained) > 100 and sum(side > high for side in trained) > 100
        assert not any(low - 0.01 < side < high + 0.01 for side in trained)

    def test_a_training_crop_follows_from_seed_step_and_sample(self):
        data = photos.load()
        image, target = photos.training_crop(data, 3, 5, 1, 64)
        torch.manual_seed(77)
        again, same = photos.training_crop(data, 3, 5, 1, 64)
        assert torch.equal(image, again) and torch.equal(target["boxes"], same["boxes"])
        for other in ((4, 5, 1), (3, 6, 1), (3, 5, 2)):
            assert not torch.equal(image, photos.training_crop(data, *other, 64)[0])

    def test_training_targets_lie_in_the_crop(self):
        data = photos.load()
        for sample in range(60):
            image, target = photos.training_crop(data, 0, 0, sample, 96)
            assert image.shape == (3, 96, 96) and 0 <= image.min() and image.max() <= 1
            boxes = target["boxes"]
            assert boxes.shape == (len(target["labels"]), 4) and len(boxes) > 0
            assert ((boxes >= 0) & (boxes <= 96)).all()
            assert (boxes[:, 2:] - boxes[:, :2] >= photos.SMALLEST).all()
            assert ((target["labels"] >= 1) & (target["labels"] < len(data.names))).all()


class TestCrop:
    """Oracle: answers by eye, and the colours of the pixels."""

    def seen(self, folder: Path, window, mirrored=False, size=40, **changes):
        image, target = photos.crop(photo(folder, **changes), window, mirrored, size)
        return image, target["boxes"].tolist(), target["crowd"].tolist()

    def colours(self, image: Tensor, box) -> tuple[Tensor, Tensor]:
        """Those inside of a box and those outside, away from its edges."""
        x1, y1, x2, y2 = (round(edge) for edge in box)
        inside = torch.zeros(image.shape[1:], dtype=torch.bool)
        inside[y1 + 2 : y2 - 2, x1 + 2 : x2 - 2] = True
        around = torch.ones_like(inside)
        around[max(0, y1 - 2) : y2 + 2, max(0, x1 - 2) : x2 + 2] = False
        return image[:, inside], image[:, around]

    @pytest.mark.parametrize("mirrored, expected", [(False, [12, 4, 28, 28]), (True, [12, 4, 28, 28])])
    def test_boxes_follow_a_symmetric_window(self, tmp_path, mirrored, expected):
        _, boxes, crowd = self.seen(tmp_path, (2, 2, 20), mirrored)
        assert boxes == [expected] and crowd == [False]

    @pytest.mark.parametrize("mirrored, expected", [(False, [16, 8, 32, 32]), (True, [8, 8, 24, 32])])
    def test_boxes_and_pixels_are_zoomed_and_mirrored_alike(self, tmp_path, mirrored, expected):
        image, boxes, _ = self.seen(tmp_path, (0, 0, 20), mirrored)
        assert boxes == [expected]
        inside, around = self.colours(image, expected)
        assert (inside[0] == 1).all() and (inside[1] == 0).all()
        assert (around[0] == 0).all() and (around[1] == 1).all()

    def test_beyond_the_photograph_is_grey(self, tmp_path):
        image, boxes, _ = self.seen(tmp_path, (0, -20, 40))
        assert boxes == [[8, 24, 16, 36]]
        grey = torch.tensor(photos.GREY)[:, None, None] / 255
        assert torch.equal(image[:, :20], grey.expand(3, 20, 40))
        assert torch.equal(image[:, 20, 0], torch.tensor([0.0, 1.0, 0.0]))

    def test_a_window_beside_the_photograph_is_all_grey(self, tmp_path):
        image, boxes, _ = self.seen(tmp_path, (100, 100, 20))
        assert boxes == [] and image.flatten(1).std(dim=1).max() == 0

    def test_nothing_outside_of_the_region_is_shown(self, tmp_path):
        def left_half(images):
            return [{**image, "region": [0, 0, 12, 20]} for image in images]

        image, boxes, _ = self.seen(tmp_path, (0, 0, 40), images=left_half)
        assert boxes == [[8, 4, 12, 16]]
        assert torch.equal(image[:, :, 12:], (torch.tensor(photos.GREY)[:, None, None] / 255).expand(3, 40, 28))

    @pytest.mark.parametrize("x, asked_for", [(12, True), (12.7, True), (12.9, False), (15, False)])
    def test_an_object_of_which_little_is_left_is_not_asked_for(self, tmp_path, x, asked_for):
        _, boxes, crowd = self.seen(tmp_path, (x, 0, 20))
        assert boxes[0][0] == 0 and boxes[0][2] == pytest.approx((16 - x) * 2)
        assert crowd == [not asked_for]

    def test_an_object_out_of_sight_is_gone(self, tmp_path):
        assert self.seen(tmp_path, (16, 0, 20))[1:] == ([], [])

    def test_a_tiny_object_is_not_asked_for(self, tmp_path):
        _, boxes, crowd = self.seen(tmp_path, (0, 0, 40), size=16)
        assert boxes == [pytest.approx([3.2, 1.6, 6.4, 6.4])] and crowd == [True]

    def test_a_crowd_is_no_training_target(self, tmp_path):
        def with_crowds(annotations):
            return annotations + [{**row, "id": 10 + row["id"], "category_id": 1, "iscrowd": 1} for row in annotations]

        def with_people(categories):
            return [*categories, {"id": 1, "name": "people"}]

        data = photos.load(*write_data(tmp_path, annotations=with_crowds, categories=with_people))
        labels = [photos.training_crop(data, 0, 0, sample, 64)[1]["labels"].tolist() for sample in range(40)]
        assert {tuple(row) for row in labels} == {(), (2,), (3,)}


class TestData:
    """Oracle: a data set small enough to read."""

    def test_labels_are_in_the_order_of_category_ids(self, tmp_path):
        data = photos.load(*write_data(tmp_path))
        assert data.names == ["background", "early", "late"]
        for shown in data.train + data.held_out:
            index = int(shown.path.stem)
            assert shown.labels.tolist() == ([] if index == 4 else [1] if index % 2 else [2])
            assert shown.boxes.tolist() == ([] if index == 4 else [[8, 4, 16, 16]])

    def test_a_fifth_is_held_out_by_the_seed(self, tmp_path):
        folder, annotations = write_data(tmp_path)
        seen = set()
        for seed in range(20):
            data = photos.load(folder, annotations, seed)
            train_paths, held_out = ({photo.path for photo in part} for part in (data.train, data.held_out))
            assert len(train_paths) == 4 and len(held_out) == 1 and not train_paths & held_out
            seen |= held_out
        assert len(seen) == 5

    def test_images_held_out_by_the_seed_are_seen_whole(self, tmp_path):
        data = photos.load(*write_data(tmp_path))
        [(shown, window, mirrored)] = photos.held_out_views(data)
        assert shown is data.held_out[0] and window == (0, -10, 40) and not mirrored

    def test_boxes_are_clipped_and_those_without_area_dropped(self, tmp_path):
        def spoil(annotations):
            boxes = [[-5, -5, 20, 20], [8, 4, 0, 12], [50, 4, 8, 12], [8, 4, float("nan"), 12]]
            return [{**annotations[0], "id": 1 + i, "bbox": box} for i, box in enumerate(boxes)] + annotations[1:]

        data = photos.load(*write_data(tmp_path, annotations=spoil))
        assert data.dropped == 3
        first = min(data.train + data.held_out, key=lambda photo: photo.path.name)
        assert first.boxes.tolist() == [[0, 0, 15, 15]]

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"images": lambda rows: rows + rows[:1]}, "more than one image has the id 10"),
            ({"images": lambda rows: rows + [{**rows[0], "id": 1, "file_name": "gone.png"}]}, "1 of the 6 .* gone.png"),
            ({"images": lambda rows: rows[:1]}, "unknown image_id, 11"),
            ({"images": lambda rows: [{**row, "width": 0} for row in rows]}, "image 10: .* positive"),
            ({"images": lambda rows: [{**row, "use": "fun"} for row in rows]}, "`use` must be one of .*'fun'"),
            ({"images": lambda rows: [{**row, "use": "train"} for row in rows]}, "images to hold out"),
            ({"images": lambda rows: [{"id": 10}]}, "the key 'file_name'"),
            ({"annotations": lambda rows: [{**rows[0], "category_id": 8}]}, "unknown category_id, 8"),
            ({"annotations": lambda rows: [{**rows[0], "bbox": [1, 2, 3]}]}, "annotation 1: `bbox`"),
            ({"annotations": lambda rows: []}, "objects on the images to train on"),
            ({"annotations": lambda rows: {}}, "a list 'annotations' is missing"),
            ({"categories": lambda rows: []}, "there are no categories"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_broken_annotations_are_refused_with_their_place(self, tmp_path, changes, message):
        with pytest.raises(photos.DataError, match=message):
            photos.load(*write_data(tmp_path, **changes))

    def test_files_that_are_not_what_they_should_be_are_named(self, tmp_path):
        folder, annotations = write_data(tmp_path, images=lambda rows: [{**row, "width": 41} for row in rows])
        data = photos.load(folder, annotations)
        with pytest.raises(photos.DataError, match="png: the file has 40 x 20 pixels, its annotations say 41 x 20"):
            photos.crop(data.train[0], (0, 0, 20), False, 20)
        data.train[0].path.write_text("no picture")
        photos._pixels.cache_clear()
        with pytest.raises(photos.DataError, match="png: cannot identify"):
            photos.crop(data.train[0], (0, 0, 20), False, 20)
        annotations.write_text("{")
        with pytest.raises(photos.DataError, match="not JSON"):
            photos.load(folder, annotations)
        with pytest.raises(photos.DataError, match="No such file"):
            photos.load(folder, folder / "gone.json")


class TestScore:
    """Oracle: precision and recall by eye; the 101 points at which COCO reads precision."""

    NAMES = ("background", "cat", "dog")
    BOXES = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 40.0, 40.0]])

    def score(self, found, crowd=(False, False)):
        target = {"boxes": self.BOXES, "labels": torch.tensor([1, 1]), "crowd": torch.tensor(crowd)}
        boxes = torch.tensor(found, dtype=torch.float32).reshape(-1, 4)
        scores = torch.linspace(0.9, 0.5, len(boxes))
        return results.average_precision(
            [target],
            [{"boxes": boxes, "labels": torch.ones(len(boxes), dtype=torch.int64), "scores": scores}],
            self.NAMES,
        )

    def test_everything_found_scores_one(self):
        result = self.score(self.BOXES.tolist())
        assert result == {"AP50": 1.0, "AP": 1.0, "by name": {"cat": 1.0, "dog": None}}

    def test_half_found_scores_half(self):
        assert self.score(self.BOXES[:1].tolist())["AP50"] == pytest.approx(51 / 101)

    def test_nothing_found_scores_zero(self):
        assert self.score([])["AP50"] == 0

    def test_a_detection_of_a_crowd_counts_neither_way(self):
        assert self.score(self.BOXES.flip(0).tolist(), crowd=(False, True))["AP50"] == pytest.approx(1)
        assert self.score([[50, 50, 60, 60], *self.BOXES.tolist()], crowd=(False, True))["AP50"] == pytest.approx(0.5)

    def test_words_tell_what_was_nowhere_asked_for(self):
        assert results.in_words({"AP50": None, "AP": 0.25}) == "AP50 none, AP 0.25"


class TestTraining:
    def test_a_sample_does_not_depend_on_the_images_beside_it(self):
        """Oracle: the images one at a time."""
        labels = [torch.randint(-1, 3, (50,)) for _ in range(3)]
        sampler = train.SeededSampler(8, 0.25)
        sampler.seeds = [11, 12, 13]
        together = sampler(labels)
        assert sampler.taken == sum(int(mask.sum()) for masks in together for mask in masks) == 24
        for i in range(3):
            sampler.seeds = [11 + i]
            for masks, [alone] in zip(together, sampler(labels[i : i + 1])):
                assert torch.equal(masks[i], alone)

    def test_the_learning_rate_rises_and_falls(self):
        """Oracle: by eye."""
        assert train.learning_rate(2.0, 0.0) == 0
        assert train.learning_rate(2.0, train.WARM_UP / 2) == pytest.approx(1.0)
        assert train.learning_rate(2.0, train.WARM_UP) == pytest.approx(2.0)
        assert train.learning_rate(2.0, (1 + train.WARM_UP) / 2) == pytest.approx(1.0)
        assert train.learning_rate(2.0, 1.0) == pytest.approx(0.0)

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (["--images", "x", "--annotations", "gone.json"], "gone.json: No such file"),
            (["--resume", "--out", "nowhere"], "nothing to resume: nowhere/checkpoint.pt"),
            (["--batch", "3"], "must be a multiple of the 2 processes, got 3"),
        ],
        ids=["annotations", "resume", "batch"],
    )
    def test_what_cannot_be_run_is_said_in_a_line(self, monkeypatch, arguments, message):
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(SystemExit, match=message):
            train.main(arguments)

    @pytest.mark.parametrize("arguments", [["--images", "x"], ["--steps", "0"], ["--size", "8"]], ids=" ".join)
    def test_wrong_options_are_refused(self, arguments, capsys):
        with pytest.raises(SystemExit):
            train.parse(arguments)
        assert "--" + arguments[0].strip("-") in capsys.readouterr().err.splitlines()[-1]

    @pytest.mark.parametrize("missing", ["pycocotools.coco", "torchvision.models.resnet", "matplotlib"])
    def test_a_missing_package_is_named(self, monkeypatch, missing):
        monkeypatch.delitem(sys.modules, "results")
        monkeypatch.setitem(sys.modules, missing, None)
        with pytest.raises(SystemExit, match=rf"needs {missing}.*pip install 'roialign_ext\[demo\]'"):
            runpy.run_path(str(EXAMPLES / "train.py"))

    def test_missing_sample_photographs_are_explained(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "skimage", None)
        with pytest.raises(photos.DataError, match="pip install scikit-image"):
            photos.load()


# Whole runs


def losses_of(out: Path) -> list[dict[str, float]]:
    return json.loads((out / "history.json").read_text())["losses"]


@pytest.mark.slow
class TestRuns:
    def test_a_resumed_run_has_the_losses_and_weights_of_one_that_never_stopped(self, tmp_path, monkeypatch):
        """Oracle: the uninterrupted run, bit for bit."""
        arguments = [*SMALL, "--steps", "6", "--every", "3", "--out"]
        train.main([*arguments, str(tmp_path / "whole")])

        def interrupt(*arguments):
            save(*arguments)
            raise KeyboardInterrupt

        save = train.save
        monkeypatch.setattr(train, "save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train.main([*arguments, str(tmp_path / "parts")])
        monkeypatch.undo()
        torch.rand(7)  # leaves the random state elsewhere
        train.main(["--resume", "--device", "cpu", "--out", str(tmp_path / "parts")])

        assert len(losses_of(tmp_path / "whole")) == 6
        assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole")
        whole, parts = (
            torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"] for name in ("whole", "parts")
        )
        assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)

    def test_a_data_set_of_the_user_trains_from_end_to_end(self, tmp_path):
        """Oracle: the files that the run says it writes."""

        def one_crowd(annotations):
            return [{**annotation, "iscrowd": int(annotation["id"] == 1)} for annotation in annotations]

        folder, annotations = write_data(tmp_path, annotations=one_crowd)
        train.main(
            [*SMALL, "--steps", "3", "--images", str(folder), "--annotations", str(annotations)]
            + ["--out", str(tmp_path / "out")]
        )
        history = json.loads((tmp_path / "out" / "history.json").read_text())
        assert history["step"] == len(history["losses"]) == 3
        assert list(history["evaluations"][-1]["by name"]) == ["early", "late"]
        with Image.open(tmp_path / "out" / "detections.png") as picture:
            assert picture.size == (1800, 819)

    def test_the_clock_ends_a_run(self, tmp_path):
        """Oracle: the time in its history."""
        train.main([*SMALL, "--seconds", "3", "--out", str(tmp_path)])
        history = json.loads((tmp_path / "history.json").read_text())
        assert history["step"] > 1 and history["seconds"] >= 3

    def test_held_out_objects_are_found(self, tmp_path):
        """Oracle: pycocotools on boxes drawn by hand."""
        train.main(["--device", "cpu", "--out", str(tmp_path)])
        assert json.loads((tmp_path / "history.json").read_text())["evaluations"][-1]["AP50"] > 0.5


# Two processes


def step_gradients(samples: range) -> dict[str, Tensor]:
    """Gradients, and what is known of the losses, of one step in float64 on the crops `samples` of four.

    The samplers take all that there is, so that the images, and with them the processes, differ in the number of
    """
    data = photos.load()
    torch.manual_seed(0)
    detector = train.Detector(len(data.names)).double()
    for stage in (detector.rpn, detector.roi_heads):
        stage.fg_bg_sampler.batch_size_per_image = 1_000_000
    assign = detector.rpn.assign_targets_to_anchors

    def assign_in_float64(anchors, targets):
        labels, boxes = assign(anchors, targets)
        return [label.double() for label in labels], boxes

    # torchvision's labels are float32; of float32 would be the loss, and the rounding of its gradient.
    detector.rpn.assign_targets_to_anchors = assign_in_float64
    options = train.parse(["--size", "96", "--batch", "4", "--device", "cpu"])
    images, targets, seeds = train.make_batch(data, options, 0, samples)
    targets = [{"boxes": target["boxes"].double(), "labels": target["labels"]} for target in targets]
    model = train.DistributedDataParallel(detector) if distributed.is_initialized() else detector
    losses = train.backward(model, (images.double(), targets, seeds), torch.device("cpu"))
    taken = [stage.fg_bg_sampler.taken for stage in (detector.rpn, detector.roi_heads)]
    return {
        "taken": torch.tensor(taken),
        "losses": torch.tensor(list(losses.values()), dtype=torch.float64),
        "gradients": torch.cat([parameter.grad.flatten() for parameter in detector.parameters()]),
    }


def torchrun(*arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
class TestTwoProcesses:
    def test_gradients_are_those_of_one_process_on_the_joint_batch(self, tmp_path):
        """Oracle: the same four crops in one process, float64. The sums are the same but for their order, and the
        layers between are some 50, so 1e-9 of the largest gradient leaves room for rounding and for nothing else."""
        torchrun(str(Path(__file__).resolve()), str(tmp_path))
        ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
        joint = step_gradients(range(4))

        assert torch.equal(ranks[0]["taken"] + ranks[1]["taken"], joint["taken"])
        assert (ranks[0]["taken"] != ranks[1]["taken"]).all()
        largest = joint["gradients"].abs().max()
        for rank in ranks:
            assert (rank["gradients"] - joint["gradients"]).abs().max() <= 1e-9 * largest
            torch.testing.assert_close(rank["losses"], joint["losses"], rtol=1e-12, atol=0)

        # A mean of the two processes' means misses by more than a thousand times the tolerance.
        halves = [step_gradients(range(rank, 4, 2))["gradients"] for rank in range(2)]
        assert ((halves[0] + halves[1]) / 2 - joint["gradients"]).abs().max() > 1e-6 * largest

    def test_a_run_under_torchrun_has_the_losses_of_one_process(self, tmp_path):
        """Oracle: one process. The losses before the first update differ by rounding, those that follow by what
        the optimizer makes of it: Adam divides by the size of a gradient, also where it is little but rounding."""
        arguments = [*SMALL, "--steps", "3", "--out"]
        torchrun(str(EXAMPLES / "train.py"), *arguments, str(tmp_path / "two"))
        train.main([*arguments, str(tmp_path / "one")])
        two, one = (torch.tensor([list(step.values()) for step in losses_of(tmp_path / out)]) for out in ("two", "one"))
        assert two.shape == one.shape == (3, 4)
        torch.testing.assert_close(two[0], one[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(two, one, rtol=1e-2, atol=1e-3)


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    torch.save(step_gradients(range(rank, 4, world)), Path(sys.argv[1]) / f"{rank}.pt")
    distributed.destroy_process_group()
